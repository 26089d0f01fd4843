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

from cluster.errors import InputError

FINGERPRINT_KEY = b"shoal.encoder_fingerprint"
SUFFIXES = (".parquet", ".npy", ".lance")
ROWS_PER_SHARD = 200_000
_HEAD_ROWS = 1_024


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


@dataclass(frozen=True)
class FileSummary:
    """What a file holds, by its header."""

    dimension: int
    fingerprint: str | None
    id_type: str
    names: tuple[str, ...]
    pieces: list[Piece]


def describe_file(filesystem: pafs.FileSystem, path: str, columns: Columns) -> FileSummary:
    """Dimension, fingerprint, columns and pieces of a file, from its header.

    Raises :class:`InputError` for a file that cannot be read or lacks a column.
    """
    if path.endswith(".npy"):
        return _describe_npy(filesystem, path, columns)
    if path.endswith(".lance"):
        return _describe_lance(path, columns)
    try:
        with filesystem.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            schema = file.schema_arrow
            _require_columns(schema, columns, path)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            dimension = _vector_length(schema, columns, path)
            filled = [i for i, rows in enumerate(groups) if rows]
            if dimension is None and filled:
                head = next(file.iter_batches(_HEAD_ROWS, [filled[0]], columns=[columns.embedding]))
                dimension = _first_length(head.column(0), path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {_first_line(error)}") from error
    fingerprint = (schema.metadata or {}).get(FINGERPRINT_KEY)
    return FileSummary(
        dimension or 0,
        fingerprint.decode() if fingerprint else None,
        str(schema.field(columns.id).type),
        tuple(schema.names),
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
    return FileSummary(shape[1], None, "row number", (), pieces)


def _describe_lance(path: str, columns: Columns) -> FileSummary:
    dataset = _open_lance(path)
    _require_columns(dataset.schema, columns, path)
    fingerprint = (dataset.schema.metadata or {}).get(FINGERPRINT_KEY)
    return FileSummary(
        _vector_length(dataset.schema, columns, path) or 0,
        fingerprint.decode() if fingerprint else None,
        str(dataset.schema.field(columns.id).type),
        tuple(dataset.schema.names),
        [Piece(path, f.fragment_id, f.count_rows()) for f in dataset.get_fragments()],
    )


def _open_lance(path: str) -> Any:
    import lance  # slow, and few inputs are of this kind

    return lance.dataset(path)


def _require_columns(schema: pa.Schema, columns: Columns, path: str) -> None:
    for name in columns.names():
        if schema.get_field_index(name) < 0:
            raise InputError(
                f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}"
            )


def _vector_length(schema: pa.Schema, columns: Columns, path: str) -> int | None:
    """The length that a fixed-size list's type states; None where only the rows can tell."""
    kind = schema.field(columns.embedding).type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)
    if not (is_list or pa.types.is_large_list(kind)) or not pa.types.is_floating(kind.value_type):
        raise InputError(
            f"{path}: column {columns.embedding!r} is {kind}; required is a list of floats"
        )
    return kind.list_size if pa.types.is_fixed_size_list(kind) else None


def _first_length(column: pa.Array, path: str) -> int:
    lengths = column.drop_null().value_lengths().to_pylist()
    if not any(lengths):
        raise InputError(f"{path}: its first {len(column)} vectors are null or empty")
    return next(length for length in lengths if length)


def read_batches(
    filesystem: pafs.FileSystem, piece: Piece, columns: Columns, block_rows: int
) -> Iterator[pa.RecordBatch]:
    """The rows of ``piece`` in order, up to ``block_rows`` at a time."""
    if piece.read is not None:
        yield from piece.read(columns.names(), block_rows)
    elif piece.path.endswith(".npy"):
        yield from _read_npy(filesystem, piece, columns, block_rows)
    elif piece.path.endswith(".lance"):
        fragment = _open_lance(piece.path).get_fragment(piece.part)
        yield from fragment.to_batches(columns=columns.names(), batch_size=block_rows)
    else:
        with filesystem.open_input_file(piece.path) as stream:
            # A buffered reader holds pages instead of the row group's whole column.
            file = pq.ParquetFile(stream, buffer_size=4 << 20)
            yield from file.iter_batches(block_rows, [piece.part], columns=columns.names())


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
