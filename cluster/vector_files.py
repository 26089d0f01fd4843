"""Files of vectors, format by format: what each holds, and its rows as Arrow batches.

Parquet (row groups), ``.npy`` matrices (ranges of rows) and Lance datasets (fragments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    check_store,
    exists,
    join,
    split_options,
)
from pipelines.runtime.listing import match_files
from pipelines.runtime.tables import STORE_DOCUMENTS, STORE_MARK, open_lance

FINGERPRINT_KEY = b"shoal.encoder_fingerprint"
EMBEDDINGS_FOLDER = "embeddings"
"""Where the output folder of an embedding job keeps its vectors, beside what it rejected."""
_LANCE = ".lance"
_SUFFIXES = (".parquet", ".npy", _LANCE)
ROWS_PER_SHARD = 200_000
_HEAD_ROWS = 1_024
_TEXT_BYTES = 64 << 20
_LANCE_TEXT_ROWS = 2_048


@dataclass(frozen=True)
class Columns:
    """Which columns to read; ``text`` and ``label`` may be absent (None)."""

    id: str = "id"
    embedding: str = "embedding"
    text: str | None = None
    label: str | None = None

    def names(self) -> list[str]:
        """The columns that are there, each once."""
        wanted = [self.id, self.embedding, self.text, self.label]
        return list(dict.fromkeys(name for name in wanted if name is not None))


@dataclass(frozen=True)
class Piece:
    """Rows of one file: a Parquet row group, a Lance fragment, or a range of ``.npy`` rows.

    With ``read``, rows from wherever that finds them: it is given the columns' names and the most
    rows of a batch, and must give the same rows in the same order whenever it is called.
    """

    path: str
    part: int
    rows: int
    read: Callable[[Sequence[str], int], Iterator[pa.RecordBatch]] | None = None
    version: int | None = None
    """Lance's number of the version that the fragment is read in."""


@dataclass(frozen=True)
class FileSummary:
    """What a file holds, by its header."""

    dimension: int
    fingerprint: str | None
    id_kind: str
    """'string', 'int64' or 'uint64': what its ids are read as."""
    schema: pa.Schema
    pieces: list[Piece]


def find_files(uri: str) -> list[str]:
    """Files of vectors and Lance datasets at ``uri``, sorted, as paths on its filesystem.

    Of an embedding job's output folder only ``embeddings/`` is looked at, of a store its
    documents. Raises :class:`InputError` where there are none.
    """
    inside = STORE_DOCUMENTS if exists(join(uri, STORE_MARK)) else EMBEDDINGS_FOLDER
    results = join(uri, inside)
    infos = match_files(results if exists(results) else uri, datasets=(_LANCE,))
    paths = [info.path for info in infos if info.path.endswith(_SUFFIXES)]
    if not paths:
        raise InputError(f"{uri} holds no file that ends in {' or '.join(_SUFFIXES)}")
    return paths


def describe_file(
    filesystem: pafs.FileSystem, path: str, address: str, columns: Columns
) -> FileSummary:
    """Dimension, fingerprint, columns and pieces of a file, from its header.

    ``path`` is that on ``filesystem``, ``address`` the same with its scheme. Raises
    :class:`InputError` for a file that cannot be read, lacks a column, or has one of a type that
    cannot be used.
    """
    if path.endswith(".npy"):
        return _describe_npy(filesystem, path, columns)
    if path.endswith(_LANCE):
        return _describe_lance(address, columns)
    try:
        with filesystem.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            schema = file.schema_arrow
            id_kind = _check_columns(schema, columns, path)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            dimension = _vector_length(schema, columns, path)
            filled = [i for i, rows in enumerate(groups) if rows]
            if dimension is None and filled:
                head = next(file.iter_batches(_HEAD_ROWS, [filled[0]], columns=[columns.embedding]))
                dimension = _first_length(plain(head.column(0)), path)
    except (pa.ArrowInvalid, OSError) as error:
        check_store(address, error)
        raise InputError(f"{path} is not a readable Parquet file: {_first_line(error)}") from error
    fingerprint = (schema.metadata or {}).get(FINGERPRINT_KEY)
    return FileSummary(
        dimension or 0,
        fingerprint.decode() if fingerprint else None,
        id_kind,
        schema,
        [Piece(path, i, rows) for i, rows in enumerate(groups) if rows],
    )


def _describe_npy(filesystem: pafs.FileSystem, path: str, columns: Columns) -> FileSummary:
    if columns.label is not None:
        raise InputError(
            f"{path} holds vectors only, so there is no label column {columns.label!r}"
        )
    shape, dtype, _ = _npy_header(filesystem, path)
    if len(shape) != 2 or dtype.kind not in "fiu":
        raise InputError(f"{path} holds {dtype} {shape}; required is a matrix of numbers (n, d)")
    starts = range(0, shape[0], ROWS_PER_SHARD)
    pieces = [Piece(path, start, min(ROWS_PER_SHARD, shape[0] - start)) for start in starts]
    return FileSummary(shape[1], None, "int64", pa.schema([]), pieces)


def _describe_lance(path: str, columns: Columns) -> FileSummary:
    dataset = open_lance(path)
    id_kind = _check_columns(dataset.schema, columns, path)
    fingerprint = (dataset.schema.metadata or {}).get(FINGERPRINT_KEY)
    return FileSummary(
        _vector_length(dataset.schema, columns, path) or 0,
        fingerprint.decode() if fingerprint else None,
        id_kind,
        dataset.schema,
        [
            Piece(path, fragment.fragment_id, fragment.count_rows(), version=dataset.version)
            for fragment in dataset.get_fragments()
        ],
    )


def _check_columns(schema: pa.Schema, columns: Columns, path: str) -> str:
    """What kind the ids are; :class:`InputError` for a column that is missing or cannot be used."""
    flags = {columns.id: "--id-column", columns.embedding: "--embedding-column"}
    for name in columns.names():
        places = schema.get_all_field_indices(name)
        if len(places) != 1:
            found = f"{len(places)} columns {name!r}" if places else f"no column {name!r}"
            flag = flags.get(name, "--label-column")
            raise InputError(
                f"{path} has {found}; its columns are {', '.join(schema.names)}. Name the right "
                f"one with {flag}"
            )
    for shown in (columns.text, columns.label):
        if shown is not None:
            check_readable(schema, shown, path)
    kind = plain_type(schema.field(columns.id).type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "string"
    if pa.types.is_integer(kind):
        return "uint64" if pa.types.is_uint64(kind) else "int64"
    raise InputError(
        f"{path}: column {columns.id!r} is {kind}; ids must be strings or integers. Name another "
        "with --id-column, or cast it"
    )


def check_readable(schema: pa.Schema, name: str, path: str) -> None:
    """Raise :class:`InputError` unless column ``name`` holds single values that can be shown."""
    kind = plain_type(schema.field(name).type)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise InputError(
            f"{path}: column {name!r} is {kind}; texts and labels must be strings or numbers. "
            "Name other columns with --text-column and --label-column"
        )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type under a dictionary encoding or an extension, as tensors of Ray or Hugging Face."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def plain(column: pa.Array) -> pa.Array:
    """The same values without dictionary encoding or extension type."""
    while True:
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        elif pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        else:
            return column


def _vector_length(schema: pa.Schema, columns: Columns, path: str) -> int | None:
    """The length that a fixed-size list's type states; None where only the rows can tell."""
    kind = plain_type(schema.field(columns.embedding).type)
    is_fixed = pa.types.is_fixed_size_list(kind)
    if is_fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = kind.value_type
        if pa.types.is_floating(values) or pa.types.is_integer(values):
            return kind.list_size if is_fixed else None
    raise InputError(
        f"{path}: column {columns.embedding!r} is {kind}; required is a list of numbers. Name the "
        "right one with --embedding-column"
    )


def _first_length(column: pa.Array, path: str) -> int:
    lengths = column.drop_null().value_lengths().to_pylist()
    if not any(lengths):
        raise InputError(f"{path}: its first {len(column)} vectors are null or empty")
    return next(length for length in lengths if length)


def read_batches(
    filesystem: pafs.FileSystem, piece: Piece, columns: Columns, block_rows: int
) -> Iterator[pa.RecordBatch]:
    """The rows of ``piece`` in order, ``block_rows`` at a time or, where texts are long, fewer."""
    if piece.read is not None:
        yield from piece.read(columns.names(), block_rows)
    elif piece.path.endswith(".npy"):
        yield from _read_npy(filesystem, piece, columns, block_rows)
    elif split_options(piece.path)[0].endswith(_LANCE):
        fragment = open_lance(piece.path, piece.version or "").get_fragment(piece.part)
        rows = min(block_rows, _LANCE_TEXT_ROWS) if columns.text else block_rows
        yield from fragment.to_batches(columns=columns.names(), batch_size=rows)
    else:
        with filesystem.open_input_file(piece.path) as stream:
            # A buffered reader holds pages instead of the row group's whole column.
            file = pq.ParquetFile(stream, buffer_size=4 << 20)
            rows = min(block_rows, _rows_that_fit(file.metadata.row_group(piece.part), columns))
            yield from file.iter_batches(rows, [piece.part], columns=columns.names())


def _rows_that_fit(group: Any, columns: Columns) -> int:
    """Rows of a Parquet row group whose texts fill about 64 MiB, by its own sizes."""
    parts = [group.column(i) for i in range(group.num_columns)]
    text_bytes = sum(p.total_uncompressed_size for p in parts if p.path_in_schema == columns.text)
    return max(1, int(_TEXT_BYTES * group.num_rows / max(1, text_bytes)))


def _read_npy(
    filesystem: pafs.FileSystem, piece: Piece, columns: Columns, block_rows: int
) -> Iterator[pa.RecordBatch]:
    shape, dtype, offset = _npy_header(filesystem, piece.path)
    row_bytes = shape[1] * dtype.itemsize
    with filesystem.open_input_file(piece.path) as stream:
        for start in range(piece.part, piece.part + piece.rows, block_rows):
            rows = min(block_rows, piece.part + piece.rows - start)
            data = stream.read_at(rows * row_bytes, offset + start * row_bytes)
            if len(data) < rows * row_bytes:
                raise InputError(f"{piece.path} ends before row {start + rows} of {shape[0]}")
            values = np.frombuffer(data, dtype).astype(np.float32)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), shape[1])
            ids = pa.array(np.arange(start, start + rows, dtype=np.int64))
            names = [columns.id, columns.embedding]
            yield pa.RecordBatch.from_arrays([ids, vectors], names=names)


def _npy_header(
    filesystem: pafs.FileSystem, path: str
) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, dtype, where the numbers begin) of an ``.npy`` file in row-major order."""
    with filesystem.open_input_file(path) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, is_fortran, dtype = read(stream)
        except ValueError as error:
            raise InputError(f"{path} is not a NumPy matrix: {_first_line(error)}") from error
        if is_fortran:
            raise InputError(f"{path} is stored column by column; save it row by row (C order)")
        return shape, dtype, stream.tell()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
