"""Arrow columns of any writer as plain types, and Parquet files as their table has them.

Dictionaries, extension types and views are the writer's business: :func:`plain_type` says what
their values are, :func:`plain_column` gives them so. :func:`read_parquet` adds the columns that a
table, a folder's name or pandas' index holds beside the file, and leaves out deleted rows.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError
from pipelines.runtime.table_view import TableView, unpack_rows

FINGERPRINT_KEY = b"shoal.encoder_fingerprint"
"""Metadata of a schema of vectors: the fingerprint of the encoder that made them."""
LONGEST_VECTOR = 1e18
"""Length of a vector from which its square leaves the range of float32."""
_NAMES_KEY = b"huggingface"
_UUID = "arrow.uuid"
_STRING = pa.string()
_INT64_DIGITS = 18
_BUFFER_BYTES = 4 << 20


class _WholeLineEnds(io.RawIOBase):
    """A stream of which no part that is read ends between the two bytes of a ``\\r\\n``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, none only at the end."""
        data = self._held + self._stream.read(size - len(self._held))
        self._held = b"\r" if len(data) > 1 and data.endswith(b"\r") else b""
        return data.removesuffix(self._held)


def open_csv(
    stream: Any, delimiter: str = ",", convert: pa.csv.ConvertOptions | None = None
) -> Any:
    """pyarrow's streaming reader of CSV whose quoted values keep their line breaks.

    Where two of its blocks part a quoted "\\r\\n", pyarrow by itself loses the newline (26.0.1).
    """
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    whole = pa.PythonFile(_WholeLineEnds(stream), "r")
    return pa.csv.open_csv(whole, parse_options=parse, convert_options=convert)


def plain_type(kind: pa.DataType, null: pa.DataType = _STRING) -> pa.DataType:
    """The type of a column's values: without dictionary, extension, view or null type.

    UUIDs are strings; maps are lists of ``key`` and ``value``, small decimals decimal128, and only
    numbers are in lists of fixed size. ``null`` becomes of what holds nothing but nulls.
    """
    if isinstance(kind, pa.BaseExtensionType):
        is_uuid = kind.extension_name == _UUID
        return pa.string() if is_uuid else plain_type(kind.storage_type, null)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type, null)
    if pa.types.is_null(kind):
        return null
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_map(kind):
        pair = {"key": kind.key_type, "value": kind.item_type}
        return pa.list_(pa.struct({n: plain_type(each, null) for n, each in pair.items()}))
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(plain_type(f.type, null)) for f in kind])
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_fixed_size_list(kind):
        values = plain_type(kind.value_type, null)
        return pa.list_(values, -1 if _is_no_number(values) else kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type, null))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.list_(plain_type(kind.value_type, null))
    return kind


def _is_no_number(kind: pa.DataType) -> bool:
    return not (
        pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    )


def unstorable(kind: pa.DataType) -> pa.DataType | None:
    """The plain type within ``kind`` that a store cannot hold; None where it can hold all."""
    if pa.types.is_interval(kind) or pa.types.is_union(kind):
        return kind
    if pa.types.is_struct(kind) and not kind.num_fields:
        return kind
    inner = [kind.field(i).type for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return next((bad for each in inner if (bad := unstorable(each)) is not None), None)


def plain_column(column: pa.Array) -> pa.Array:
    """The same values as a column of :func:`plain_type`."""
    kind = column.type
    target = plain_type(kind)
    if kind == target:
        return column
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == _UUID:
            return uuid_strings(column.storage)
        return plain_column(column.storage)
    if pa.types.is_dictionary(kind):
        # not by dictionary_decode, which has no way with views
        return plain_column(column.dictionary).take(column.indices)
    if pa.types.is_run_end_encoded(kind):  # not by run_end_decode, which has none with dictionaries
        rows = np.arange(column.offset, column.offset + len(column))
        runs = np.searchsorted(column.run_ends.to_numpy(), rows, side="right")
        return plain_column(column.values).take(pa.array(runs))
    if pa.types.is_string_view(kind):  # by way of bytes, which need not be UTF-8
        return column.cast(pa.binary_view()).cast(pa.binary()).view(pa.string())
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.string())
    return with_children(column, plain_column) if pa.types.is_nested(kind) else column.cast(target)


def with_children(column: pa.Array, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """A nested column with what is within changed; its kind of list or struct as in plain types.

    pyarrow's own casts take the bytes of a UUID for text, and have no way with some types.
    """
    kind, count = column.type, len(column)
    bits = None
    if column.null_count:  # copied, so that its first bit is the first row's
        bits = pa.array(column.is_valid().to_numpy(zero_copy_only=False)).buffers()[1]
    if pa.types.is_struct(kind):
        parts = [change(column.field(place)) for place in range(kind.num_fields)]
        fields = [f.with_type(part.type) for f, part in zip(kind, parts, strict=True)]
        return pa.Array.from_buffers(pa.struct(fields), count, [bits], children=parts)
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        values = change(column.values.slice(column.offset * size, count * size))
        if not _is_no_number(values.type):
            return pa.Array.from_buffers(
                pa.list_(values.type, size), count, [bits], children=[values]
            )
        offsets = np.arange(count + 1) * size
    elif pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        sizes = np.where(column.is_valid(), column.sizes, 0)
        offsets = np.append(0, np.cumsum(sizes))
        places = np.repeat(np.asarray(column.offsets) - offsets[:-1], sizes)
        values = change(column.values.take(pa.array(places + np.arange(offsets[-1]))))
    else:
        offsets = np.asarray(column.offsets)
        if pa.types.is_map(kind):
            pairs = {"key": column.keys, "value": column.items}
            values = pa.StructArray.from_arrays(pairs.values(), pairs)
        else:
            values = column.values
        values = change(values.slice(offsets[0], offsets[-1] - offsets[0]))
        offsets = offsets - offsets[0]
    is_large = pa.types.is_large_list(kind)
    plain = pa.large_list(values.type) if is_large else pa.list_(values.type)
    starts = pa.py_buffer(offsets.astype(np.int64 if is_large else np.int32))
    return pa.Array.from_buffers(plain, count, [bits, starts], children=[values])


def valid_strings(column: pa.Array) -> pa.Array:
    """A column of plain type in whose strings undecodable bytes are U+FFFD."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.cast(pa.large_binary()).to_pylist()
        return pa.array(
            [v if v is None else v.decode("utf-8", "replace") for v in raw], column.type
        )
    return with_children(column, valid_strings) if pa.types.is_nested(column.type) else column


def uuid_strings(column: pa.Array) -> pa.Array:
    """16 bytes a value, as the 36 characters of a UUID."""
    values = column.to_pylist()
    return pa.array([None if v is None else str(uuid.UUID(bytes=v)) for v in values], pa.string())


def id_column(column: pa.Array) -> pa.Array:
    """Ids as strings, bytes that may be UTF-8, or integers, where that is what they mean.

    16 bytes of fixed size are UUIDs, other fixed sizes are given in hexadecimal, decimals without
    a fraction are integers (strings where they exceed 64 bits). Other types stay as they are.
    """
    column = plain_column(column)
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        if kind.byte_width == 16:
            return uuid_strings(column)
        values = column.to_pylist()
        return pa.array([None if v is None else v.hex() for v in values], pa.string())
    if pa.types.is_decimal(kind) and kind.scale == 0:
        with contextlib.suppress(pa.ArrowInvalid):
            return column.cast(pa.int64())
        return column.cast(pa.string())
    return column


def id_kind(kind: pa.DataType) -> str | None:
    """What :func:`id_column` gives of a plain type: 'string', 'int64', 'uint64'; None if no ids."""
    if pa.types.is_decimal(kind) and kind.scale == 0:
        return "int64" if kind.precision <= _INT64_DIGITS else "string"
    if pa.types.is_integer(kind):
        return "uint64" if pa.types.is_uint64(kind) else "int64"
    strings = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
    )
    return "string" if any(is_one(kind) for is_one in strings) else None


def label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the values of columns that ``datasets`` keeps as numbers of a ClassLabel."""
    try:
        about = json.loads((schema.metadata or {}).get(_NAMES_KEY, b"{}"))
        features = about.get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}
    return {
        name: list(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        if feature.get("names") and name in schema.names
    }


def named_labels(column: pa.Array, names: Sequence[str]) -> pa.Array:
    """A ClassLabel's numbers as its names; null where there is none (-1)."""
    numbers = column.to_pylist()
    return pa.array(
        [names[n] if n is not None and 0 <= n < len(names) else None for n in numbers], pa.string()
    )


def fingerprint_of(schema: pa.Schema) -> str:
    """The encoder's fingerprint that a schema names; empty where it names none."""
    return (schema.metadata or {}).get(FINGERPRINT_KEY, b"").decode()


def vectors_to_column(vectors: np.ndarray, kind: pa.DataType | None = None) -> pa.Array:
    """Vectors (n, d) as a column of lists of d numbers, of their own type or of ``kind``."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), kind)
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def column_to_vectors(
    column: pa.Array | pa.ChunkedArray, dtype: type[np.generic] = np.float32
) -> np.ndarray:
    """A column of lists of d numbers, none of them null, as vectors (n, d) of ``dtype``."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    numbers = array.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(array), array.type.list_size).astype(dtype, copy=False)


# ---- columns that a file has, or that stand beside it


@dataclass(frozen=True)
class FileColumns:
    """The columns of one file under its table's view.

    ``schema`` has their plain types, with names that the table gives them; ``sources`` says where
    each is: a path of names in the file, or None for one that stands beside it.
    """

    own: pa.Schema
    view: TableView
    index: Mapping[str, range]
    null: pa.DataType = _STRING
    """Type of what holds nothing but nulls."""

    @functools.cached_property
    def labels(self) -> dict[str, list[str]]:
        """Names of the values of ClassLabel columns."""
        return label_names(self.own)

    @functools.cached_property
    def constants(self) -> dict[str, pa.Scalar]:
        """The columns of one value that stand beside the file, of plain types."""
        arrays = {name: pa.array([value]) for name, value in self.view.scalars().items()}
        return {name: plain_column(array)[0] for name, array in arrays.items()}

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Names and plain types of all columns; metadata is the file's."""
        names = self.view.names
        fields: dict[str, pa.Field] = {}
        for name, there in (names or {name: name for name in self.own.names}).items():
            places = [] if there is None else self.own.get_all_field_indices(there)
            fields[name] = pa.field(name, self._type(name, places))
        for name, value in self.constants.items():
            fields.setdefault(name, pa.field(name, value.type))
        for name in self.index:
            fields.setdefault(name, pa.field(name, pa.int64()))
        return pa.schema(list(fields.values()), metadata=self.own.metadata)

    def _type(self, name: str, places: list[int]) -> pa.DataType:
        if not places:
            return pa.null()
        if self.own.names[places[0]] in self.labels:
            return pa.string()
        return plain_type(self.own.field(places[0]).type, self.null)

    def type_of(self, name: str) -> pa.DataType | None:
        """Plain type of a column or of a struct's field ``column.field``; None for neither."""
        if name in self.schema.names:
            return self.schema.field(name).type
        kind: pa.DataType | None = None
        first, *rest = name.split(".")
        if first in self.schema.names and rest:
            kind = self.schema.field(first).type
            for part in rest:
                if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
                    return None
                kind = kind.field(part).type
        return kind

    def paths(self, wanted: Sequence[str]) -> dict[str, str]:
        """What to read of the file for these columns: each path, and the file's column it is in."""
        paths: dict[str, str] = {}
        for name in wanted:
            first = name if name in self.schema.names else name.split(".")[0]
            source = first if self.view.names is None else self.view.names.get(first)
            if first in self.view.regrouped:
                raise InputError(
                    f"column {first!r} of the table has fields that were renamed or replaced since "
                    "some of its files were written, which cannot be read: have the table rewrite "
                    "them (rewrite_data_files)"
                )
            if source is None or source not in self.own.names:
                continue
            if self.type_of(name) is not None:  # a struct that has such a field
                path = source if first == name else ".".join([source, *name.split(".")[1:]])
                paths[path] = source
        return paths

    def select(self, table: pa.Table, wanted: Sequence[str], first_row: int) -> pa.Table:
        """The columns wanted of a batch read from the file, nulls for those that are nowhere."""
        columns = [self._column(table, name, first_row) for name in wanted]
        return pa.table(columns, names=list(wanted))

    def _column(self, table: pa.Table, name: str, first_row: int) -> pa.ChunkedArray:
        first, *rest = [name] if name in self.schema.names else name.split(".")
        source = first if self.view.names is None else self.view.names.get(first)
        if source is not None and source in table.column_names:
            if self.type_of(name) is None:  # of a struct that has no such field here
                return pa.chunked_array([pa.nulls(len(table))])
            column = table.column(source)
            for part in rest:
                column = pc.struct_field(column, part)
            names = None if rest else self.labels.get(source)
            chunks = [plain_column(chunk) for chunk in column.chunks]
            if names:
                chunks = [named_labels(chunk, names) for chunk in chunks]
            kind = pa.string() if names else plain_type(column.type)
            return pa.chunked_array(chunks, kind)
        if name in self.constants:
            return pa.chunked_array([pa.repeat(self.constants[name], len(table))])
        if name in self.index:
            numbers = self.index[name]
            rows = np.arange(first_row, first_row + len(table), dtype=np.int64)
            return pa.chunked_array([pa.array(numbers.start + rows * numbers.step)])
        return pa.chunked_array([pa.nulls(len(table))])


def file_columns(
    own: pa.Schema,
    view: TableView | None = None,
    null: pa.DataType = _STRING,
    rows: int | None = None,
) -> FileColumns:
    """The columns of a file with this schema; ``null`` as in :func:`plain_type`.

    pandas' index in the metadata is a column of a file of ``rows``, if it has as many numbers.
    """
    index = {} if rows is None or (view and view.names is not None) else _pandas_index(own)
    whole = {name: numbers for name, numbers in index.items() if len(numbers) == rows}
    return FileColumns(own, view or TableView(), whole, null)


def _pandas_index(schema: pa.Schema) -> dict[str, range]:
    """An evenly spaced index with a name, which pandas keeps in the metadata only.

    Writers of several files give each the metadata of the whole table.
    """
    try:
        columns = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))["index_columns"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {
        about["name"]: range(about["start"], about["stop"], about["step"])
        for about in columns
        if isinstance(about, dict) and about.get("kind") == "range"
        if isinstance(about.get("name"), str) and about["name"] not in ("", *schema.names)
    }


def open_parquet(source: Any, **options: Any) -> pq.ParquetFile:
    """A Parquet file of whatever writer.

    INT96, as Spark writes timestamps, comes in microseconds: nanoseconds, pyarrow's choice, have no
    room for years before 1678 or after 2261 and give others instead.
    """
    return pq.ParquetFile(source, coerce_int96_timestamp_unit="us", **options)


def parquet_columns(
    parquet: pq.ParquetFile, view: TableView | None = None, null: pa.DataType = _STRING
) -> FileColumns:
    """The columns of an open Parquet file, pandas' index among them."""
    return file_columns(parquet.schema_arrow, view, null, parquet.metadata.num_rows)


def read_parquet(
    filesystem: pafs.FileSystem,
    inner: str,
    view: TableView | None,
    wanted: Sequence[str],
    groups: range,
    batch_rows: int,
) -> Iterator[pa.Table]:
    """Columns of some row groups in order, in batches; deleted rows are left out.

    Args:
        filesystem: holds the file at ``inner``.
        inner: the file's path there.
        view: the file's place in its table.
        wanted: names of columns, or of a struct's field as ``column.field``.
        groups: the row groups.
        batch_rows: rows of a batch at most.
    """
    # Pages are held instead of the row group's whole columns, which pyarrow reads ahead by default.
    options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    with open_parquet(inner, filesystem=filesystem, **options) as parquet:
        columns = parquet_columns(parquet, view)
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(groups.stop)]
        row = sum(sizes[: groups.start])
        deleted = unpack_rows(view.deleted) if view and view.deleted else None
        paths = columns.paths(wanted)
        if paths:
            kinds = [columns.own.field(source).type for source in paths.values()]
            alone = any(map(_has_inner_dictionary, kinds))
            batches: Iterator[pa.RecordBatch] = itertools.chain.from_iterable(
                parquet.iter_batches(batch_rows, row_groups=some, columns=list(paths))
                for some in ([[group] for group in groups] if alone else [list(groups)])
            )
        else:
            batches = _empty_batches(sum(sizes) - row, batch_rows)
        for batch in batches:
            table = columns.select(pa.Table.from_batches([batch]), wanted, row)
            rows = np.arange(row, row + len(table))
            row += len(table)
            if deleted is not None and (gone := np.isin(rows, deleted)).any():
                table = table.take(np.flatnonzero(~gone))
            yield table


def _has_inner_dictionary(kind: pa.DataType) -> bool:
    """Whether a dictionary is within, which pyarrow reads of no two row groups at once."""
    inner = [kind.field(i).type for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return any(pa.types.is_dictionary(each) or _has_inner_dictionary(each) for each in inner)


def _empty_batches(rows: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches without a column but with rows."""
    for start in range(0, rows, batch_rows):
        count = min(batch_rows, rows - start)
        struct = pa.array([{}] * count, pa.struct([]))
        yield pa.RecordBatch.from_struct_array(struct)
