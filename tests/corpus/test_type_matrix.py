"""Every type of every writer, with nulls and in pieces, read, kept, stored and read again."""

import datetime
import decimal
import tempfile
import uuid
from pathlib import Path

import datasets
import duckdb
import lance
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.corpus.documents import Checker
from pipelines.corpus.files import Columns, Shard, find_files
from pipelines.corpus.kept_columns import parquet_schema
from pipelines.corpus.readers import inspect_files, read_shard
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


def write_arrow(folder, table):
    path = str(folder / "a.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
KINDS = {
    "string": (pa.string(), ["a", "", "ü"]),
    "string_view": (pa.string_view(), ["a", "long enough to lie outside of the view"]),
    "large_string": (pa.large_string(), ["a"]),
    "binary_view": (pa.binary_view(), [b"a", b"\xff" * 20]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"]),
    "list of views": (pa.list_(pa.string_view()), [["a", None], []]),
    "list view": (pa.list_view(pa.int32()), [[1, 2], []]),
    "struct of dictionaries": (
        pa.struct({"a": pa.dictionary(pa.int8(), pa.string()), "b": pa.int32()}),
        [{"a": "x", "b": 1}],
    ),
    "map": (pa.map_(pa.string(), pa.int32()), [[("a", 1)], []]),
    "null": (pa.null(), [None]),
    "uuid": (pa.uuid(), [uuid.UUID(int=1).bytes, uuid.UUID(int=2**127).bytes]),
    "small decimal": (pa.decimal64(10, 2), [decimal.Decimal("1.50")]),
    "decimal": (pa.decimal128(38, 0), [decimal.Decimal(10**30)]),
    "fixed list of strings": (pa.list_(pa.string(), 2), [["a", "b"]]),
    "fixed list": (pa.list_(pa.float32(), 2), [[1.0, 2.0]]),
    "time": (pa.time64("us"), [NOW.time()]),
    "timestamp": (pa.timestamp("us", "Europe/Berlin"), [NOW.replace(tzinfo=datetime.UTC)]),
    "duration": (pa.duration("us"), [datetime.timedelta(1)]),
    "half": (pa.float16(), [1.5]),
    "bool": (pa.bool_(), [True, False]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_column_of_any_type_is_stored_and_comes_back_equal(tmp_path, kind):
    target, values = KINDS[kind]
    values = [*values, None] * 3
    if kind == "uuid":
        column = pa.ExtensionArray.from_storage(target, pa.array(values, pa.binary(16)))
    else:
        column = pa.array(values, target)
    texts = [f"text {n}" for n in range(len(values))]
    table = pa.table({"id": range(len(values)), "text": texts, "value": column})
    write_arrow(tmp_path, table)
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
    write_arrow(tmp_path, table)
    with pytest.raises(InputError, match=r"kept column 'value' holds .*, which cannot be stored"):
        documents(tmp_path)


VALUES = {
    "text": st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8),
    "int": st.integers(-(2**31), 2**31),
    "float": st.floats(allow_nan=False, width=32),
    "bool": st.booleans(),
    "list": st.lists(st.integers(0, 9), min_size=1, max_size=3),
    "date": st.dates(datetime.date(1990, 1, 1), datetime.date(2030, 1, 1)),
}
TYPES = {
    "text": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "list": pa.list_(pa.int64()),
    "date": pa.date32(),
}


def write_pyarrow(path, rows, table, chunk):
    pq.write_table(table, path / "a.parquet", row_group_size=chunk)


def write_views(path, rows, table, chunk):
    views = table.set_column(1, "text", table["text"].cast(pa.string_view()))
    pq.write_table(views, path / "a.parquet", row_group_size=chunk)


def write_polars(path, rows, table, chunk):
    pl.from_arrow(table).write_parquet(path / "a.parquet", row_group_size=chunk)


def write_polars_ipc(path, rows, table, chunk):
    pl.from_arrow(table).write_ipc(path / "a.arrow", compression="lz4", record_batch_size=chunk)


def write_pandas(path, rows, table, chunk):
    frame = table.to_pandas(types_mapper=pd.ArrowDtype)
    frame.to_parquet(path / "a.parquet", row_group_size=chunk)


def write_duckdb(path, rows, table, chunk):
    connection = duckdb.connect()
    connection.register("t", table)
    connection.execute(f"COPY t TO '{path}/a.parquet' (FORMAT parquet)")
    connection.close()


def write_datasets(path, rows, table, chunk):
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(path / "saved"), num_shards=min(2, len(table)))


def write_lance(path, rows, table, chunk):
    lance.write_dataset(table, str(path / "a.lance"), max_rows_per_file=max(1, chunk))


WRITERS = (
    write_pyarrow,
    write_views,
    write_polars,
    write_polars_ipc,
    write_pandas,
    write_duckdb,
    write_datasets,
    write_lance,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
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
        writer(Path(folder), rows, table, chunk)
        read = documents(folder)
    assert read["id"].to_pylist() == [str(n) for n in range(rows)]
    assert read["text"].to_pylist() == texts
    assert read["kept.value"].to_pylist() == table["value"].to_pylist()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
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
