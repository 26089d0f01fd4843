"""Nights over tables and many types: nothing is lost, and a second night changes nothing."""

import datetime
import json
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from nights import night, rows_of, text_of
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.types import StringType

from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import read_run
from pipelines.store.store import Store

pytestmark = pytest.mark.usefixtures("no_model")
ROWS = 60
TYPES = {
    "view": pa.array([f"v{n}" if n % 7 else None for n in range(ROWS)], pa.string_view()),
    "dictionary": pa.array([f"d{n % 3}" for n in range(ROWS)]).dictionary_encode(),
    "map": pa.array([[("a", n)] for n in range(ROWS)], pa.map_(pa.string(), pa.int32())),
    "struct": pa.array(
        [{"a": n, "b": None} for n in range(ROWS)],
        pa.struct({"a": pa.int8(), "b": pa.string_view()}),
    ),
    "list": pa.array([["x"] * (n % 3) for n in range(ROWS)], pa.list_(pa.string_view())),
    "null": pa.nulls(ROWS),
    "uuid": pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([uuid.UUID(int=n).bytes for n in range(ROWS)], pa.binary(16))
    ),
    "day": pa.array([datetime.date(2026, 1, 1 + n % 28) for n in range(ROWS)]),
}


def write_kept(corpus, values):
    """A corpus whose kept column ``k`` holds an Arrow array, or values of JSON lines."""
    corpus.mkdir(exist_ok=True)
    if isinstance(values, pa.Array):
        pq.write_table(table_of(k=values), corpus / "a.parquet")
        return
    texts = table_of()["text"].to_pylist()
    rows = ({"id": n, "text": texts[n], "k": value} for n, value in enumerate(values))
    (corpus / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


NUMBERS = list(range(ROWS))
WORDS = [f"w{n}" for n in NUMBERS]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (NUMBERS, [None] * ROWS),
        ([*NUMBERS[:-1], "x"], [*NUMBERS[:-1], 7.5]),  # mixed, and then numbers alone
        ([None] * ROWS, NUMBERS),
        (pa.array(NUMBERS), pa.nulls(ROWS)),
        (pa.array([[n] for n in NUMBERS]), pa.array([[]] * ROWS, pa.list_(pa.null()))),
        (pa.array(WORDS, pa.large_string()), pa.array([None, *WORDS[1:]])),
        (
            pa.array([[w] for w in WORDS], pa.large_list(pa.string())),
            pa.array([["x"], *([w] for w in WORDS[1:])]),
        ),
        (
            pa.array(NUMBERS, pa.timestamp("us")),
            pa.array([0, *(1000 * n + 1000 for n in NUMBERS[1:])], pa.timestamp("ns")),
        ),
    ],
    ids=lambda values: str(getattr(values, "type", type(values[0]).__name__)),
)
def test_a_kept_column_may_come_in_another_type_that_fits_the_store(
    tmp_path, tiny_model_folder, before, now
):
    corpus, store = tmp_path / "in", tmp_path / "store"
    for values in (before, now):
        write_kept(corpus, values)
        night(str(corpus), store, tiny_model_folder, keep_columns=("k",))
    stored = [row["k"] for _, row in sorted(rows_of(store).items())]
    wanted = now.to_pylist() if isinstance(now, pa.Array) else now
    kind = Store.open(str(store)).version().schema.field("k").type
    if pa.types.is_string(kind) and not isinstance(now, pa.Array):
        wanted = [value if value is None else str(value) for value in wanted]
    assert stored == wanted
    counts = counts_of(store)
    assert counts["retouched"] == sum(
        one != other for one, other in zip(wanted, as_stored(before, kind), strict=True)
    )
    again = night(str(corpus), store, tiny_model_folder, keep_columns=("k",))
    assert "nothing changed" in again.summary


def as_stored(values, kind):
    if isinstance(values, pa.Array):
        return values.cast(kind).to_pylist()
    strings = pa.types.is_string(kind)
    return [str(value) if strings and value is not None else value for value in values]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (pa.array(NUMBERS), pa.array(WORDS)),
        (pa.array(NUMBERS), pa.array([1.5] * ROWS)),
        (pa.array([{"a": 1}] * ROWS), pa.array([{"b": 1}] * ROWS)),
        (NUMBERS, [[n] for n in NUMBERS]),
    ],
    ids=["strings", "fractions", "fields", "lists"],
)
def test_a_kept_column_that_the_store_s_type_does_not_hold_is_refused(
    tmp_path, tiny_model_folder, before, now
):
    corpus, store = tmp_path / "in", tmp_path / "store"
    write_kept(corpus, before)
    night(str(corpus), store, tiny_model_folder, keep_columns=("k",))
    write_kept(corpus, now)
    with pytest.raises(InputError, match=r"column 'k' is .* mend the corpus, or begin a new store"):
        night(str(corpus), store, tiny_model_folder, keep_columns=("k",))


def test_a_field_of_a_struct_is_kept_in_a_store_with_its_column_only(tmp_path, tiny_model_folder):
    corpus, store = tmp_path / "in", tmp_path / "store"
    write_kept(corpus, pa.array([{"n": n} for n in NUMBERS]))
    with pytest.raises(InputError, match=r"kept column 'k\.n': .*; keep 'k' whole, or it under an"):
        night(str(corpus), store, tiny_model_folder, keep_columns=("k.n",))
    night(str(corpus), store, tiny_model_folder, keep_columns=("k",))
    assert rows_of(store)[5]["k"] == {"n": 5}


def counts_of(store):
    return read_run(f"{store}/_work")["counts"]


def table_of(**columns):
    texts = [text_of(n) for n in range(ROWS)]
    return pa.table({"id": pa.array(range(ROWS), pa.int64()), "text": texts, **columns})


def test_two_nights_over_every_type_of_kept_column(tmp_path, tiny_model_folder):
    (tmp_path / "in" / "label=x").mkdir(parents=True)
    table = table_of(**TYPES)
    path = str(tmp_path / "in" / "label=x" / "a.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=11)
    keep = (*TYPES, "label")
    corpus, store = str(tmp_path / "in"), tmp_path / "store"
    night(corpus, store, tiny_model_folder, keep_columns=keep)
    assert counts_of(store)["new"] == ROWS
    rows = rows_of(tmp_path / "store")
    assert rows[5]["view"] == "v5"
    assert rows[5]["map"] == [{"key": "a", "value": 5}]
    assert rows[5]["uuid"] == str(uuid.UUID(int=5))
    assert rows[5]["label"] == "x"
    second = night(corpus, store, tiny_model_folder, keep_columns=keep)
    assert "nothing changed" in second.summary


def test_a_night_follows_a_delta_table(tmp_path, tiny_model_folder):
    path = tmp_path / "table"
    write_deltalake(str(path), table_of())
    night(str(path), tmp_path / "store", tiny_model_folder)
    assert counts_of(tmp_path / "store")["new"] == ROWS
    DeltaTable(str(path)).delete("id < 5")
    update = {"text": f"'{text_of(7, version=1)}'"}
    DeltaTable(str(path)).update(predicate="id = 7", updates=update)
    night(str(path), tmp_path / "store", tiny_model_folder)
    counts = counts_of(tmp_path / "store")
    assert (counts["new"], counts["changed"], counts["deleted"]) == (0, 1, 5)
    rows = rows_of(tmp_path / "store")
    assert rows[7]["text"] == text_of(7, version=1)
    assert len(rows) == ROWS - 5
    with pytest.raises(InputError, match="names files within a table"):
        night(f"{path}/*.parquet", tmp_path / "store", tiny_model_folder)


def test_a_night_follows_an_iceberg_table_and_its_schema(tmp_path, tiny_model_folder):
    catalog = SqlCatalog("c", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/w")
    catalog.create_namespace("n")
    rows = table_of(k=[f"k{n % 5}" for n in range(ROWS)])
    table = catalog.create_table("n.t", schema=rows.schema)
    table.append(rows)
    corpus, store = str(tmp_path / "w" / "n" / "t"), tmp_path / "store"

    def tonight():
        result = night(corpus, store, tiny_model_folder, keep_columns=("k",))
        counts = counts_of(store)
        return result, {name: counts[name] for name in ("new", "changed", "deleted", "retouched")}

    assert tonight()[1]["new"] == ROWS
    table.delete("id < 5")
    new = {"id": pa.array([7], pa.int64()), "text": [text_of(7, version=1)]}
    changed = pa.table({**new, "k": ["k2"]})
    table.overwrite(changed, overwrite_filter="id = 7")
    assert tonight()[1] == {"new": 0, "changed": 1, "deleted": 5, "retouched": 0}
    with table.update_schema() as update:
        update.add_column("other", StringType())
    assert "nothing changed" in tonight()[0].summary
    with table.update_schema() as update:
        update.rename_column("k", "old")
    with table.update_schema() as update:
        update.add_column("k", StringType())
    assert tonight()[1] == {"new": 0, "changed": 0, "deleted": 0, "retouched": ROWS - 5}
    found = rows_of(store)
    assert {row["k"] for row in found.values()} == {None}
    assert found[7]["text"] == text_of(7, version=1)
    catalog.engine.dispose()
