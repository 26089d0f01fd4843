"""Files and datasets that store columns: Parquet, Arrow (files and streams) and Lance.

In: a :class:`~pipelines.corpus.files.CorpusFile` or a shard of one. Out: the same file with its
columns and shards, or the shard's rows as Arrow tables of the columns wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from pipelines.corpus.files import DEFAULT_ID_COLUMN, Columns, CorpusFile, Shard
from pipelines.runtime.arrow import (
    FileColumns,
    file_columns,
    id_kind,
    open_parquet,
    parquet_columns,
    read_parquet,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import open_filesystem
from pipelines.runtime.machines import require_memory
from pipelines.runtime.table_view import unpack_rows
from pipelines.runtime.tables import open_lance

TYPED_FORMATS = ("parquet", "arrow", "lance")
BATCH_ROWS = 4096
BATCH_BYTES = 8 << 20
_IPC_MAGIC = b"ARROW1"
_STRING = pa.string()
_IN_MORE_BATCHES = "write it in more record batches (Polars: record_batch_size), or as Parquet"


def columns_of(file: CorpusFile, null: pa.DataType = _STRING) -> FileColumns:
    """The columns of a file with their plain types, from its header; ``null`` is that of nulls."""
    filesystem, inner = open_filesystem(file.path)
    if file.format == "parquet":
        with open_parquet(inner, filesystem=filesystem) as parquet:
            return parquet_columns(parquet, file.view, null)
    if file.format == "lance":
        return file_columns(open_lance(file.path, file.view.version).schema, file.view, null)
    with _open_arrow(file) as reader:
        return file_columns(reader.schema, file.view, null)


def inspect_columnar(file: CorpusFile, columns: Columns, shard_bytes: int) -> CorpusFile:
    """A file looked into: its columns, its size and its shards."""
    inspect = {"parquet": _inspect_parquet, "arrow": _inspect_arrow, "lance": _inspect_lance}
    return inspect[file.format](file, columns, shard_bytes)


def read_columnar(shard: Shard, columns: Columns) -> Iterator[pa.Table]:
    """The rows of a shard in order: columns of :meth:`Columns.wanted`, nulls where one is not."""
    file = shard.file
    wanted = columns.wanted(file)
    batch_rows = BATCH_ROWS  # at most; batches of Arrow are cut by their own size
    if file.rows:
        batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * file.rows // max(1, file.text_bytes)))
    filesystem, inner = open_filesystem(file.path)
    if file.format == "parquet":
        groups = range(shard.start, shard.stop)
        yield from read_parquet(filesystem, inner, file.view, wanted, groups, batch_rows)
        return
    batches = _lance_batches(shard, wanted, batch_rows)
    if file.format == "arrow":
        batches = _arrow_batches(shard, wanted, batch_rows)
    about: FileColumns | None = None
    for batch in batches:
        about = about or file_columns(batch.schema, file.view)
        yield about.select(pa.Table.from_batches([batch]), wanted, 0)


def _names_of(file: CorpusFile, about: FileColumns, columns: Columns) -> tuple[str, ...]:
    """Names of the columns, and of those fields of structs that are wanted.

    Raises :class:`InputError` where no value of text or id can be one, by the column's type.
    """
    row_id = columns.id or DEFAULT_ID_COLUMN
    text, found_id = about.type_of(columns.text), about.type_of(row_id)
    if text is not None and not (pa.types.is_null(text) or _is_text(text)):
        raise InputError(
            f"{file.path}: column {columns.text!r} is {text}; texts must be strings. Name another "
            "with --text-column, or cast it"
        )
    if found_id is not None and not (pa.types.is_null(found_id) or id_kind(found_id)):
        raise InputError(
            f"{file.path}: column {row_id!r} is {found_id}; ids must be strings or integers. Name "
            "another with --id-column, or cast it"
        )
    wanted = [columns.text, *([columns.id] if columns.id else []), *columns.keep]
    fields = [name for name in wanted if about.type_of(name) is not None]
    own = about.own.names if about.view.names is None else []  # where a name can be there twice
    return (*own, *dict.fromkeys(n for n in [*about.schema.names, *fields] if n not in own))


def _is_text(kind: pa.DataType) -> bool:
    return id_kind(kind) == "string" and not pa.types.is_decimal(kind)


def _inspect_parquet(file: CorpusFile, columns: Columns, shard_bytes: int) -> CorpusFile:
    filesystem, inner = open_filesystem(file.path)
    with open_parquet(inner, filesystem=filesystem) as parquet:
        metadata, about = parquet.metadata, parquet_columns(parquet, file.view)
    seen = replace(file, columns=_names_of(file, about, columns))
    read = set(about.paths(columns.wanted(seen)).values())
    read_parts = tuple(f"{source}." for source in read)
    bounds = [0]
    total = pending = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = (group.column(c) for c in range(group.num_columns))
        size = sum(
            c.total_uncompressed_size
            for c in chunks
            if c.path_in_schema in read or c.path_in_schema.startswith(read_parts)
        )
        if pending and pending + size > shard_bytes:
            bounds.append(index)
            pending = 0
        pending += size
        total += size
    bounds.append(metadata.num_row_groups)
    gone = len(unpack_rows(file.view.deleted)) if file.view.deleted else 0
    rows = metadata.num_rows - gone
    return replace(seen, text_bytes=total, rows=rows, bounds=tuple(bounds))


def _inspect_lance(file: CorpusFile, columns: Columns, shard_bytes: int) -> CorpusFile:
    dataset = open_lance(file.path, file.view.version)
    about = file_columns(dataset.schema, file.view)
    counts = [fragment.count_rows() for fragment in dataset.get_fragments()]
    row_bytes = max(1, file.size_bytes // max(1, sum(counts)))
    bounds, pending = [0], 0
    for index, count in enumerate(counts):
        if pending and (pending + count) * row_bytes > shard_bytes:
            bounds.append(index)
            pending = 0
        pending += count
    return replace(
        file,
        columns=_names_of(file, about, columns),
        text_bytes=file.size_bytes,
        rows=sum(counts),
        bounds=(*bounds, len(counts)),
    )


def _lance_batches(shard: Shard, wanted: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    dataset = open_lance(shard.file.path, shard.file.view.version)
    about = file_columns(dataset.schema, shard.file.view)
    names = list(dict.fromkeys(about.paths(wanted).values()))
    for fragment in dataset.get_fragments()[shard.start : shard.stop]:
        yield from fragment.to_batches(columns=names, batch_size=rows)


@contextmanager
def _open_arrow(file: CorpusFile, fields: Sequence[int] = ()) -> Iterator[Any]:
    """A reader of an Arrow file or of an Arrow stream; of some fields only, by their places."""
    filesystem, inner = open_filesystem(file.path)
    with filesystem.open_input_file(inner) as source:
        magic = source.read(len(_IPC_MAGIC))
        source.seek(0)
        if magic.startswith(b"FEA1"):
            raise pa.ArrowInvalid("it is Feather version 1; write it as Parquet")
        is_file = magic == _IPC_MAGIC
        if is_file and not _ends_with_magic(source):
            raise pa.ArrowInvalid("it is cut off: its end, which says what it holds, is not there")
        open_reader = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        options = pyarrow.ipc.IpcReadOptions(included_fields=list(fields) or None)
        with open_reader(source, options=options) as reader:
            yield reader


def _ends_with_magic(source: Any) -> bool:
    size = source.size()
    return bool(source.read_at(len(_IPC_MAGIC), max(0, size - len(_IPC_MAGIC))) == _IPC_MAGIC)


def _inspect_arrow(file: CorpusFile, columns: Columns, shard_bytes: int) -> CorpusFile:
    with _open_arrow(file) as reader:
        names = _names_of(file, file_columns(reader.schema, file.view), columns)
        count = getattr(reader, "num_record_batches", None)
    seen = replace(file, columns=names, text_bytes=file.size_bytes)
    if count is None:
        return seen  # a stream is read in one go
    if not count:
        return replace(seen, rows=0, bounds=(0, 0))
    require_memory(file.path, file.size_bytes // count, _IN_MORE_BATCHES)
    step = max(1, round(shard_bytes * count / file.size_bytes))
    return replace(seen, bounds=(*range(0, count, step), count))


def _arrow_batches(shard: Shard, wanted: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of the columns wanted: of a record batch, which is held whole, no others are read."""
    about = columns_of(shard.file)
    names = set(about.paths(wanted).values())
    fields = [place for place, name in enumerate(about.own.names) if name in names]
    with _open_arrow(shard.file, fields) as reader:
        if hasattr(reader, "num_record_batches"):
            batches = (reader.get_batch(i) for i in range(shard.start, shard.stop))
        else:
            batches = iter(reader)
        for batch in batches:
            size = max(1, min(rows, BATCH_BYTES * len(batch) // max(1, batch.nbytes)))
            for start in itertools.count(0, size):
                if start >= len(batch):
                    break
                yield batch.slice(start, size)
