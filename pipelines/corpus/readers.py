"""Rows of one shard, in bounded batches, one problem a row.

In: a :class:`~pipelines.corpus.files.Shard`. Out: :class:`RowBatch` after :class:`RowBatch`,
with what stood where a text and an id were expected. A row that cannot be parsed keeps its place,
with a problem; only a file that cannot be read any further raises.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.files import DELIMITERS, Columns, Shard
from pipelines.runtime.files import open_filesystem

BATCH_ROWS = 4096
BATCH_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass
class RowBatch:
    """Some consecutive rows as they were found, not yet checked.

    ``problems`` says of a row why it could not be parsed; its text is then the raw line. ``ids``
    is None where the file has no id column. ``kept`` holds the kept columns, as an Arrow table or
    as one list of values a column.
    """

    texts: list[Any] = field(default_factory=list)
    problems: list[str | None] = field(default_factory=list)
    ids: list[Any] | None = None
    kept: pa.Table | list[list[Any]] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, text: Any, row_id: Any, kept: list[Any], size: int) -> None:
        """Append a row that was parsed."""
        self._append(text, row_id, kept, None, size)

    def add_problem(self, raw: str, problem: str) -> None:
        """Append a row that could not be parsed."""
        self._append(raw[:1000], None, [None] * len(self.kept), problem, len(raw))

    @property
    def full(self) -> bool:
        """Whether the batch has reached its size."""
        return len(self.texts) >= BATCH_ROWS or self.size_bytes >= BATCH_BYTES

    def _append(
        self, text: Any, row_id: Any, kept: list[Any], problem: str | None, size: int
    ) -> None:
        self.texts.append(text)
        self.problems.append(problem)
        if self.ids is not None:
            self.ids.append(row_id)
        for column, value in zip(self.kept, kept, strict=True):
            column.append(value)
        self.size_bytes += size


def read_shard(shard: Shard, columns: Columns) -> Iterator[RowBatch]:
    """The rows of a shard in their order.

    Raises ``OSError`` or ``pyarrow.ArrowException`` where the file cannot be read any further;
    what came before has been yielded.
    """
    if shard.file.format == "parquet":
        yield from _read_parquet(shard, columns)
        return
    rows = _read_csv if shard.file.format in DELIMITERS else _read_lines
    id_column = columns.id_of(shard.file)

    def new_batch() -> RowBatch:
        return RowBatch(ids=None if id_column is None else [], kept=[[] for _ in columns.keep])

    batch = new_batch()
    try:
        for row in rows(shard, columns, id_column):
            if isinstance(row, _Problem):
                batch.add_problem(row.raw, row.problem)
            else:
                batch.add(*row)
            if batch.full:
                yield batch
                batch = new_batch()
    except (OSError, pa.ArrowException):
        yield batch
        raise
    if batch.texts:
        yield batch


@dataclass(frozen=True)
class _Problem:
    raw: str
    problem: str


_Row = tuple[Any, Any, list[Any], int] | _Problem


def _read_parquet(shard: Shard, columns: Columns) -> Iterator[RowBatch]:
    filesystem, inner = open_filesystem(shard.file.path)
    id_column = columns.id_of(shard.file)
    names = list(dict.fromkeys([columns.text, *([id_column] if id_column else []), *columns.keep]))
    with pq.ParquetFile(inner, filesystem=filesystem, buffer_size=_BLOCK_BYTES) as parquet:
        rows = max(1, shard.file.rows or 1)
        batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, shard.file.text_bytes)))
        groups = list(range(shard.start, shard.stop))
        for found in parquet.iter_batches(batch_rows, row_groups=groups, columns=names):
            table = pa.Table.from_batches([found])
            yield RowBatch(
                texts=_plain_values(table.column(columns.text)),
                problems=[None] * len(table),
                ids=None if id_column is None else _plain_values(table.column(id_column)),
                kept=table.select(list(columns.keep)),
                size_bytes=table.nbytes,
            )


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    """Python values; strings as bytes, since Parquet files do not always hold valid UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def _read_lines(shard: Shard, columns: Columns, id_column: str | None) -> Iterator[_Row]:
    is_text = shard.file.format == "text"
    for line in split_lines(shard):
        if line is None:
            yield _Problem("", f"line longer than {LONGEST_LINE_BYTES >> 20} MiB")
        elif is_text:
            yield line, None, [line] * len(columns.keep), len(line)
        else:
            yield _parse_json(line, columns, id_column)


def _parse_json(line: bytes, columns: Columns, id_column: str | None) -> _Row:
    raw = line[:1000].decode("utf-8", "replace")
    if not line.strip():
        return _Problem(raw, "blank line")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return _Problem(raw, "line is not valid UTF-8")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _Problem(raw, "malformed JSON line")
    if not isinstance(value, dict):
        return _Problem(raw, "JSON line is not an object")
    kept = [value.get(name) for name in columns.keep]
    row_id = None if id_column is None else value.get(id_column)
    return value.get(columns.text), row_id, kept, len(line)


def split_lines(shard: Shard) -> Iterator[bytes | None]:
    """Lines that begin within the shard, without their ends; None for one that is too long."""
    file = shard.file
    filesystem, inner = open_filesystem(file.path)
    ranged = not file.compression
    if ranged:
        stream = filesystem.open_input_file(inner)
        stream.seek(max(0, shard.start - 1))
    else:
        stream = filesystem.open_input_stream(inner, compression=file.compression)
    with stream:
        lines = _lines_of(stream)
        position = max(0, shard.start - 1) if ranged else 0
        if ranged and shard.start:
            position += next(lines)[1]
        first = position == 0
        for line, size in lines:
            if ranged and position >= shard.stop:
                return
            position += size
            if line is not None:
                line = line.removeprefix(_BOM) if first else line
                line = line.removesuffix(b"\r")
            first = False
            yield line


def _lines_of(stream: pa.NativeFile) -> Iterator[tuple[bytes | None, int]]:
    """Each line without its newline (None if it is too long) and its size with it."""
    parts: list[bytes] = []
    size = 0
    while block := stream.read(_BLOCK_BYTES):
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            size += end + 1 - start
            if size > LONGEST_LINE_BYTES:
                yield None, size
            else:
                yield b"".join([*parts, block[start:end]]), size
            parts, size, start = [], 0, end + 1
        size += len(block) - start
        if size <= LONGEST_LINE_BYTES:
            parts.append(block[start:])
        else:
            parts = []
    if size:
        yield (None if size > LONGEST_LINE_BYTES else b"".join(parts)), size


def _read_csv(shard: Shard, columns: Columns, id_column: str | None) -> Iterator[_Row]:
    filesystem, inner = open_filesystem(shard.file.path)
    csv.field_size_limit(LONGEST_LINE_BYTES)
    binary = filesystem.open_input_stream(inner, compression=shard.file.compression)
    with io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="") as stream:
        rows = csv.reader(stream, delimiter=DELIMITERS[shard.file.format], strict=True)
        header = next(rows)
        places = {name: header.index(name) for name in header}
        text_place = places[columns.text]
        id_place = None if id_column is None else places[id_column]
        keep_places = [places[name] for name in columns.keep]
        while True:
            line = rows.line_num
            try:
                row = next(rows, None)
            except csv.Error as error:
                swallowed = rows.line_num - line
                over = f" over {swallowed} lines" if swallowed > 1 else ""
                yield _Problem(f"line {line + 1}", f"malformed CSV row{over}: {error}")
                continue
            if row is None:
                return
            if len(row) != len(header):
                raw = ",".join(row)
                found = f"row has {len(row)} fields, the header has {len(header)}"
                yield _Problem(_readable(raw), found if row else "blank line")
                continue
            row_id = None if id_place is None else row[id_place]
            kept = [_readable(row[place]) for place in keep_places]
            yield row[text_place], row_id, kept, sum(map(len, row))


def _readable(text: str) -> str:
    """Undecodable bytes, which the reader has kept as lone surrogates, as U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
