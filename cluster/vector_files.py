"""Files of vectors, format by format: what each holds, and its rows as Arrow batches.

Parquet (row groups; alone or as the files of a Delta or Iceberg table), Lance datasets (fragments),
JSON lines and CSV (whole files), and what :mod:`cluster.matrix_files` reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.line_files import LINE_SUFFIXES, is_lines, read_lines
from cluster.matrix_files import MATRIX_SUFFIXES, open_matrix
from cluster.vector_columns import first_length, vector_column, vector_length
from pipelines.runtime.arrow import (
    FileColumns,
    file_columns,
    fingerprint_of,
    id_column,
    id_kind,
    open_parquet,
    parquet_columns,
    plain_column,
    read_parquet,
    vectors_to_column,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    check_store,
    exists,
    first_line,
    join,
    open_filesystem,
    split_options,
    with_inner_path,
)
from pipelines.runtime.listing import EMBEDDINGS_FOLDER, match_files, root_of
from pipelines.runtime.table_folders import LANCE_SUFFIX, refuse_files_of_tables, require_table
from pipelines.runtime.table_view import TableView, hive_view
from pipelines.runtime.tables import STORE_DOCUMENTS, STORE_MARK, open_lance, table_files

PARQUET_SUFFIXES = (".parquet", ".pq")
_USUAL = (*PARQUET_SUFFIXES, ".npy", LANCE_SUFFIX)
ROWS_PER_SHARD = 200_000
_HEAD_ROWS = 1_024
_TEXT_BYTES = 64 << 20
_LANCE_TEXT_ROWS = 2_048
_ARROW = (".arrow", ".arrows", ".feather", ".ipc")
_DESCRIPTIONS = ("/dataset_info.json", "/dataset_dict.json", "/state.json")
_KNOWN_BEGINNINGS = {
    b"\x89HDF": "an HDF5 file",
    b"\x80\x04": "a Python pickle, which may run code",
    b"\x80\x05": "a Python pickle, which may run code",
    b"\x80\x02": "a Python pickle, which may run code",
    b"PK\x03\x04": "a zip archive, such as a PyTorch file",
    b"SQLite": "an SQLite database",
    b"\x1f\x8b": "a gzip file of unknown content",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Which columns to read; ``text`` and ``label`` may be absent (None)."""

    id: str = "id"
    embedding: str = "embedding"
    text: str | None = None
    label: str | None = None
    keep: tuple[str, ...] = ()
    """Columns to carry along."""
    document: str | None = None
    """Of which document a row is a passage."""
    keep_flag: str = "--keep-columns"
    """The option that names the columns to carry along."""

    def names(self) -> list[str]:
        """The columns that are there, each once."""
        wanted = [self.id, self.embedding, self.text, self.label, *self.keep, self.document]
        return list(dict.fromkeys(name for name in wanted if name is not None))

    def flag(self, name: str) -> str:
        """The option that names a column."""
        flags: dict[str | None, str] = dict.fromkeys(self.keep, self.keep_flag)
        flags |= {self.label: "--label-column", self.text: "--text-column"}
        return (flags | {self.id: "--id-column", self.embedding: "--embedding-column"})[name]


@dataclass(frozen=True)
class VectorFile:
    """A file or dataset: its path on its filesystem, and its place in a table or folder."""

    path: str
    address: str
    view: TableView | None = None


@dataclass(frozen=True)
class Piece:
    """Rows of one file: a Parquet row group, a Lance fragment, or rows of any other from ``part``.

    With ``read``, rows from wherever that finds them: it is given the columns' names and the most
    rows of a batch, and must give the same rows in the same order whenever it is called.
    """

    path: str
    part: int
    rows: int
    read: Callable[[Sequence[str], int], Iterator[pa.RecordBatch]] | None = None
    version: int | None = None
    """Lance's number of the version that the fragment is read in."""
    view: TableView | None = None


@dataclass(frozen=True)
class FileSummary:
    """What a file holds, by its header; ``dimension`` is 0 where no row has a vector."""

    dimension: int
    fingerprint: str | None
    id_kind: str
    """'string', 'int64' or 'uint64': what its ids are read as."""
    schema: pa.Schema
    pieces: list[Piece]
    kept: pa.Schema = pa.schema([])  # noqa: RUF009
    """Types of the columns that are carried along; null where they hold nothing but nulls."""


def find_files(uri: str, version: str = "") -> list[VectorFile]:
    """Files and datasets of vectors at ``uri``, sorted; of tables those of one version.

    Of an embedding job's output folder only ``embeddings/`` is looked at, of a store its
    documents. JSON lines, CSV and the like are taken where there is nothing else. Raises
    :class:`InputError` where there are none.
    """
    inside = STORE_DOCUMENTS if exists(join(uri, STORE_MARK)) else EMBEDDINGS_FOLDER
    results = join(uri, inside)
    place = results if exists(results) else uri
    infos, root = match_files(place, datasets=(LANCE_SUFFIX,)), root_of(place)
    refuse_files_of_tables(uri, infos)
    require_table(version, uri, infos)
    if len(infos) == 1 and infos[0].type == pafs.FileType.File:
        check_known(open_filesystem(uri)[0], infos[0].path)
    usual: list[VectorFile] = []
    others: list[VectorFile] = []
    for info in infos:
        address = with_inner_path(uri, info.path)
        if info.type == pafs.FileType.Directory:
            for file in table_files(address, version):
                usual.append(VectorFile(open_filesystem(file.path)[1], file.path, file.view))
        elif info.path.endswith(_USUAL) or len(infos) == 1:
            usual.append(VectorFile(info.path, address, hive_view(info.path, root)))
        elif info.path.endswith(MATRIX_SUFFIXES) or (
            is_lines(info.path) and info.size and not info.path.endswith(_DESCRIPTIONS)
        ):
            others.append(VectorFile(info.path, address, hive_view(info.path, root)))
    if not usual and not others:
        known = ", ".join((*_USUAL, *MATRIX_SUFFIXES[1:], *LINE_SUFFIXES))
        arrow = any(info.path.endswith(_ARROW) for info in infos)
        other = "Arrow files, as of save_to_disk (write them as Parquet), and " if arrow else ""
        raise InputError(f"{uri} holds {other}no file that ends in {known}")
    return sorted(usual or others, key=lambda file: file.path)


def check_known(filesystem: pafs.FileSystem, path: str) -> None:
    """Raise :class:`InputError`, saying what it is, for a file of a kind that is not read."""
    if path.endswith((*_USUAL, *MATRIX_SUFFIXES)) or is_lines(path):
        return
    with filesystem.open_input_file(path) as stream:
        begin = stream.read(8)
    if begin[:4] == b"PAR1":
        return
    kind = next((k for mark, k in _KNOWN_BEGINNINGS.items() if begin.startswith(mark)), "")
    raise InputError(
        f"{path} is {kind or 'of an unknown format'}; vectors are read from Parquet, Lance, Delta, "
        f"Iceberg, {', '.join(MATRIX_SUFFIXES)}, JSON lines and CSV"
    )


def describe_file(filesystem: pafs.FileSystem, file: VectorFile, columns: Columns) -> FileSummary:
    """Dimension, fingerprint, columns and pieces of a file, from its header.

    Raises :class:`InputError` for a file that cannot be read, lacks a column, or has one of a type
    that cannot be used.
    """
    path = file.path
    if path.endswith(MATRIX_SUFFIXES):
        return _describe_matrix(filesystem, path, columns)
    if path.endswith(LANCE_SUFFIX):
        return _describe_lance(file, columns)
    if is_lines(path):
        return _describe_text(filesystem, path, columns)
    try:
        with filesystem.open_input_file(path) as stream:
            parquet = open_parquet(stream)
            about = parquet_columns(parquet, file.view)
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        id_kind = _check_columns(about, columns, path)
        dimension = vector_length(about, columns.embedding, path)
        filled = [i for i, rows in enumerate(groups) if rows]
        wanted = [columns.embedding]
        heads = (
            batch.column(0).combine_chunks()
            for i in filled
            for batch in read_parquet(
                filesystem, path, file.view, wanted, range(i, i + 1), _HEAD_ROWS
            )
        )
        dimension = first_length(heads, path) if dimension is None else dimension
    except (pa.ArrowInvalid, OSError) as error:
        check_store(file.address, error)
        raise InputError(f"{path} is not a readable Parquet file: {first_line(error)}") from error
    return FileSummary(
        dimension,
        fingerprint_of(about.own) or None,
        id_kind,
        about.schema,
        [Piece(path, i, groups[i], view=file.view) for i in filled],
        _kept_types(about, columns),
    )


def _describe_matrix(filesystem: pafs.FileSystem, path: str, columns: Columns) -> FileSummary:
    for name in (columns.text, columns.label, *columns.keep):
        if name is not None:
            raise InputError(f"{path} holds vectors only, so there is no column {name!r}")
    matrix = open_matrix(filesystem, path)
    step = max(1, matrix.rows) if matrix.sequential else ROWS_PER_SHARD
    starts = range(0, matrix.rows, step)
    pieces = [Piece(path, start, min(step, matrix.rows - start)) for start in starts]
    kinds = {"U": "string", "u": "uint64"}
    kind = "int64" if matrix.ids is None else kinds.get(matrix.ids.dtype.kind, "int64")
    return FileSummary(matrix.dimension, None, kind, pa.schema([]), pieces)


def _describe_lance(file: VectorFile, columns: Columns) -> FileSummary:
    dataset = open_lance(file.address, file.view.version if file.view else "")
    about = file_columns(dataset.schema)
    id_kind = _check_columns(about, columns, file.path)
    dimension = vector_length(about, columns.embedding, file.path)
    heads = (
        plain_column(batch.column(0))
        for batch in dataset.to_batches(columns=[columns.embedding], batch_size=_HEAD_ROWS)
    )
    return FileSummary(
        first_length(heads, file.path) if dimension is None else dimension,
        fingerprint_of(about.own) or None,
        id_kind,
        about.schema,
        [
            Piece(file.address, part.fragment_id, part.count_rows(), version=dataset.version)
            for part in dataset.get_fragments()
        ],
        _kept_types(about, columns),
    )


def _kept_types(about: FileColumns, columns: Columns) -> pa.Schema:
    nulls = replace(about, null=pa.null())
    return pa.schema([(name, nulls.type_of(name)) for name in columns.keep])


def _describe_text(filesystem: pafs.FileSystem, path: str, columns: Columns) -> FileSummary:
    """A file of JSON lines or CSV, read once to count its rows and to find its types."""
    rows, schema, kept, dimension, kind = 0, None, pa.schema([]), 0, "string"
    for batch in read_lines(filesystem, path, columns.names(), columns.embedding):
        about = file_columns(batch.schema)
        if schema is None:
            kind = _check_columns(about, columns, path)
            vector_length(about, columns.embedding, path)
            kept = _kept_types(about, columns)
        schema = about.schema
        rows += len(batch)
        if not dimension:
            vectors = vector_column(plain_column(batch.column(columns.embedding)), path)
            dimension = first_length([vectors], path)
    if schema is None:
        return FileSummary(0, None, "string", pa.schema([]), [])
    return FileSummary(dimension, None, kind, schema, [Piece(path, 0, rows)], kept)


def _check_columns(about: FileColumns, columns: Columns, path: str) -> str:
    """What kind the ids are; :class:`InputError` for a column that is missing or cannot be used."""
    schema = about.schema
    for name in columns.names():
        own = about.own.get_all_field_indices(name) if about.view.names is None else []
        if len(own) > 1 or name not in schema.names:
            found = f"{len(own)} columns {name!r}" if own else f"no column {name!r}"
            raise InputError(
                f"{path} has {found}; its columns are {', '.join(schema.names)}. Name the right "
                f"one with {columns.flag(name)}"
            )
    for shown in (columns.text, columns.label):
        if shown is not None:
            check_readable(schema, shown, path)
    return check_ids(schema, columns.id, path)


def check_ids(schema: pa.Schema, name: str, path: str) -> str:
    """What ids are read as: 'string', 'int64' or 'uint64'; :class:`InputError` for other types."""
    kind = schema.field(name).type
    if (read_as := id_kind(kind)) is not None:
        return read_as
    raise InputError(
        f"{path}: column {name!r} is {kind}; ids must be strings or integers. Name another "
        "with --id-column, or cast it"
    )


def check_readable(schema: pa.Schema, name: str, path: str) -> None:
    """Raise :class:`InputError` unless column ``name`` holds single values that can be shown."""
    kind = schema.field(name).type
    if pa.types.is_nested(kind):
        raise InputError(
            f"{path}: column {name!r} is {kind}; texts and labels must be strings or numbers. "
            "Name other columns with --text-column and --label-column"
        )


def read_batches(
    filesystem: pafs.FileSystem,
    piece: Piece,
    columns: Columns,
    block_rows: int,
    *,
    vectors: bool = True,
) -> Iterator[pa.RecordBatch]:
    """The rows of ``piece`` in order, ``block_rows`` at a time or, where texts are long, fewer.

    Columns have plain types; ids are strings or integers and, unless ``vectors`` says that the
    column is none of vectors, vectors lists of numbers.
    """
    for batch in _raw_batches(filesystem, piece, columns, block_rows, vectors):
        arrays = {name: plain_column(batch.column(name)) for name in columns.names()}
        arrays[columns.id] = id_column(arrays[columns.id])
        if vectors:
            arrays[columns.embedding] = vector_column(arrays[columns.embedding], piece.path)
        yield pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def _raw_batches(
    filesystem: pafs.FileSystem, piece: Piece, columns: Columns, block_rows: int, vectors: bool
) -> Iterator[pa.RecordBatch]:
    path = piece.path
    if piece.read is not None:
        yield from piece.read(columns.names(), block_rows)
    elif path.endswith(MATRIX_SUFFIXES):
        yield from _matrix_batches(filesystem, piece, columns, block_rows)
    elif split_options(path)[0].endswith(LANCE_SUFFIX):
        fragment = open_lance(path, piece.version or "").get_fragment(piece.part)
        rows = min(block_rows, _LANCE_TEXT_ROWS) if columns.text else block_rows
        yield from fragment.to_batches(columns=columns.names(), batch_size=rows)
    elif is_lines(path):
        embedding = columns.embedding if vectors else ""
        for batch in read_lines(filesystem, path, columns.names(), embedding):
            for start in range(0, len(batch), block_rows):
                yield batch.slice(start, block_rows)
    else:
        with pq.ParquetFile(path, filesystem=filesystem) as parquet:
            group = parquet.metadata.row_group(piece.part)
        rows = min(block_rows, _rows_that_fit(group, columns))
        part = range(piece.part, piece.part + 1)
        for table in read_parquet(filesystem, path, piece.view, columns.names(), part, rows):
            yield from table.combine_chunks().to_batches()


def _matrix_batches(
    filesystem: pafs.FileSystem, piece: Piece, columns: Columns, block_rows: int
) -> Iterator[pa.RecordBatch]:
    matrix = open_matrix(filesystem, piece.path)
    for ids, vectors in matrix.read(piece.part, piece.part + piece.rows, block_rows):
        yield pa.RecordBatch.from_arrays(
            [pa.array(ids), vectors_to_column(vectors)], names=[columns.id, columns.embedding]
        )


def _rows_that_fit(group: Any, columns: Columns) -> int:
    """Rows of a Parquet row group whose texts fill about 64 MiB, by its own sizes."""
    parts = [group.column(i) for i in range(group.num_columns)]
    shown = {columns.text, *columns.keep}
    text_bytes = sum(p.total_uncompressed_size for p in parts if p.path_in_schema in shown)
    return max(1, int(_TEXT_BYTES * group.num_rows / max(1, text_bytes)))
