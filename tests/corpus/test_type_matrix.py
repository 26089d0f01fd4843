"""Every type of every writer, with nulls and in pieces, read, kept, stored and read again."""

import tempfile
import uuid
from pathlib import Path

import lance
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writers import KINDS, TYPES, VALUES, WRITERS, column_of, write_arrow

from pipelines.corpus.documents import Checker
from pipelines.corpus.files import Columns, Shard, find_files
from pipelines.corpus.kept_columns import parquet_schema
from pipelines.corpus.readers import inspect_files, read_shard
from pipelines.runtime.arrow import plain_column, plain_type
from pipelines.runtime.errors import InputError


def documents(corpus, keep=("value",)):
    """Accepted documents with their kept columns as they will be stored."""
    columns = Columns(keep=tuple(keep))
    files = inspect_files(find_files(str(corpus)), columns, shard_bytes=500)
    assert not [file.problem for file in files if file.problem]
    checker = Checker(columns.keep, parquet_schema(files, columns.keep, columns.text), 10**6)
    tables = [
        checker.check(batch)[0]
        for file in files
        for shard in file.shards()
        for batch in read_shard(Shard.from_unit(shard.to_unit()), columns)
    ]
    return pa.concat_tables(tables)


def stored_and_read(table):
    """The same table out of Lance, the store's format."""
    with tempfile.TemporaryDirectory() as folder:
        lance.write_dataset(table, f"{folder}/a.lance")
        return lance.dataset(f"{folder}/a.lance").to_table()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_column_of_any_type_is_stored_and_comes_back_equal(tmp_path, kind):
    values = [*KINDS[kind][1], None] * 3
    column = column_of(kind, values)
    texts = [f"text {n}" for n in range(len(values))]
    table = pa.table({"id": range(len(values)), "text": texts, "value": column})
    write_arrow(tmp_path, table, 4)
    kept = documents(tmp_path)["kept.value"]
    again = documents(tmp_path)["kept.value"]
    assert kept == again
    back = stored_and_read(pa.table({"value": kept}))["value"]
    assert back.type == kept.type
    assert back.to_pylist() == kept.to_pylist()
    assert kept.null_count == (len(values) if kind == "null" else 3)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(pa.month_day_nano_interval(), pa.MonthDayNano((1, 2, 3))), (pa.struct([]), {})],
)
def test_what_no_store_can_hold_is_refused_by_name(tmp_path, kind, value):
    table = pa.table({"text": ["a"], "value": pa.array([value], kind)})
    write_arrow(tmp_path, table, 4)
    with pytest.raises(InputError, match=r"kept column 'value' holds .*, which cannot be stored"):
        documents(tmp_path)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    writer=st.sampled_from(WRITERS),
    kind=st.sampled_from(sorted(VALUES)),
    chunk=st.integers(1, 7),
    data=st.data(),
)
def test_every_row_of_every_writer_comes_back(writer, kind, chunk, data):
    values = data.draw(st.lists(st.none() | VALUES[kind], min_size=1, max_size=12))
    rows = len(values)
    texts = [f"text {n} ü" for n in range(rows)]
    table = pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "text": texts,
            "value": pa.array(values, TYPES[kind]),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        writer(Path(folder), table, chunk)
        read = documents(folder)
    assert read["id"].to_pylist() == [str(n) for n in range(rows)]
    assert read["text"].to_pylist() == texts
    assert read["kept.value"].to_pylist() == table["value"].to_pylist()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), min_size=1),
        min_size=1,
        max_size=8,
    ),
    separator=st.sampled_from([",", "\t"]),
    writer=st.sampled_from(["pandas", "polars", "json"]),
)
def test_texts_of_any_characters_survive_csv_and_json_lines(texts, separator, writer):
    texts = [text if text.strip() else f"x{text}" for text in texts]
    ids = [f"k{n}" for n in range(len(texts))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.tsv" if separator == "\t" else "a.csv")
        if writer == "json":
            pl.DataFrame({"id": ids, "text": texts}).write_ndjson(Path(folder) / "a.jsonl")
        elif writer == "pandas":
            frame = pd.DataFrame({"id": ids, "text": texts})
            frame.to_csv(path, sep=separator, index=False, quoting=1)
        else:
            frame = pl.DataFrame({"id": ids, "text": texts})
            frame.write_csv(path, separator=separator, quote_style="always")
        read = documents(folder, keep=())
    assert read["text"].to_pylist() == texts


KEYS = [uuid.UUID(bytes=b"abcdefghijklmnop"), uuid.UUID(int=2**127), uuid.UUID(int=0)]
UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([k.bytes for k in KEYS], pa.binary(16)))
VIEWS = pa.ListViewArray.from_arrays([2, 0, 1], [1, 2, 1], pa.array(["a", "b", "c"]))
RUNS = pa.RunEndEncodedArray.from_arrays(
    pa.array([2, 3], pa.int32()), pa.array(["x", None]).dictionary_encode()
)
TOLD = [str(key) for key in KEYS]
HIDDEN = pa.array([False, False, True])


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (pa.StructArray.from_arrays([UUIDS], ["u"]), [{"u": key} for key in TOLD]),
        (pa.ListArray.from_arrays([0, 1, 1, 3], UUIDS), [[TOLD[0]], [], TOLD[1:]]),
        (
            pa.StructArray.from_arrays([VIEWS], ["v"]),
            [{"v": v} for v in (["c"], ["a", "b"], ["b"])],
        ),
        (
            pa.StructArray.from_arrays([VIEWS], ["v"], mask=HIDDEN),
            [{"v": ["c"]}, {"v": ["a", "b"]}, None],
        ),
        (RUNS, ["x", "x", None]),
        (pa.StructArray.from_arrays([RUNS], ["r"]), [{"r": "x"}, {"r": "x"}, {"r": None}]),
        (
            pa.array(
                [[("k", [("a", 1)])], None, [("q", None)]],
                pa.map_(pa.string(), pa.map_(pa.string(), pa.int8())),
            ),
            [
                [{"key": "k", "value": [{"key": "a", "value": 1}]}],
                None,
                [{"key": "q", "value": None}],
            ],
        ),
        (
            pa.array([["a", "b"], None, ["c", None]], pa.list_(pa.string_view(), 2)),
            [["a", "b"], None, ["c", None]],
        ),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_nested_columns_become_plain_in_pieces_of_any_size(column, values):
    for start, stop in ((0, 3), (0, 1), (1, 3), (2, 2)):
        plain = plain_column(column[start:stop])
        plain.validate(full=True)
        assert plain.type == plain_type(column.type)
        assert plain.to_pylist() == values[start:stop]
