"""Tables of every type as their usual writers leave them, with nulls and in pieces."""

import datetime
import decimal
import uuid

import datasets
import duckdb
import lance
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

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


def column_of(kind, values):
    """A column of one of :data:`KINDS`."""
    target = KINDS[kind][0]
    if kind == "uuid":
        return pa.ExtensionArray.from_storage(target, pa.array(values, pa.binary(16)))
    return pa.array(values, target)


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


def write_pyarrow(path, table, chunk):
    pq.write_table(table, path / "a.parquet", row_group_size=chunk)


def write_views(path, table, chunk):
    views = table.set_column(1, "text", table["text"].cast(pa.string_view()))
    pq.write_table(views, path / "a.parquet", row_group_size=chunk)


def write_polars(path, table, chunk):
    pl.from_arrow(table).write_parquet(path / "a.parquet", row_group_size=chunk)


def write_polars_ipc(path, table, chunk):
    pl.from_arrow(table).write_ipc(path / "a.arrow", compression="lz4", record_batch_size=chunk)


def write_pandas(path, table, chunk):
    frame = table.to_pandas(types_mapper=pd.ArrowDtype)
    frame.to_parquet(path / "a.parquet", row_group_size=chunk)


def write_duckdb(path, table, chunk):
    connection = duckdb.connect()
    connection.register("t", table)
    connection.execute(f"COPY t TO '{path}/a.parquet' (FORMAT parquet)")
    connection.close()


def write_datasets(path, table, chunk):
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(path / "saved"), num_shards=min(2, len(table)))


def write_lance(path, table, chunk):
    lance.write_dataset(table, str(path / "a.lance"), max_rows_per_file=max(1, chunk))


def write_arrow(path, table, chunk):
    file = pa.OSFile(str(path / "a.arrow"), "wb")
    with file as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)


WRITERS = (
    write_pyarrow,
    write_views,
    write_polars,
    write_polars_ipc,
    write_arrow,
    write_pandas,
    write_duckdb,
    write_datasets,
    write_lance,
)
REFUSED = {
    write_polars: {"list view"},
    write_polars_ipc: {"list view"},
    # nulls in arrays: Arrow cannot read what DuckDB 2.0 writes
    write_duckdb: {"fixed list", "fixed list of strings", "half"},
    write_datasets: {"list view", "map", "small decimal", "uuid"},
    write_lance: {"list view", "fixed list of strings", "small decimal"},
}
"""Kinds that a writer itself refuses to write."""
