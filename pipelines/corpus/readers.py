"""Rows of one shard, in bounded batches, one problem a row; and what a file holds before that.

In: a :class:`~pipelines.corpus.files.CorpusFile`, or a shard of one. Out: the file with its
columns and shards (:func:`inspect_files`), or :class:`RowBatch` after :class:`RowBatch`, with what
stood where a text and an id were expected (:func:`read_shard`). A row that cannot be parsed keeps
its place, with a problem; only a file that cannot be read any further raises.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson
import pyarrow as pa

from pipelines.corpus.columnar import (
    BATCH_BYTES,
    BATCH_ROWS,
    TYPED_FORMATS,
    inspect_columnar,
    read_columnar,
)
from pipelines.corpus.delimited import BadRow, parse_rows
from pipelines.corpus.delimited_blocks import read_blocks
from pipelines.corpus.dialects import Sniffed, describe_dialect, shows_another_delimiter, sniff
from pipelines.corpus.files import (
    JSON_ARRAY,
    WHOLE_SCHEMA,
    Columns,
    CorpusFile,
    CorpusOptions,
    Dialect,
    Shard,
    describe_problem,
)
from pipelines.corpus.streams import (
    HEAD_BYTES,
    LONGEST_LINE_BYTES,
    UTF_8,
    encoding_by_mark,
    encoding_problem,
    line_end,
    open_stream,
    packing_problem,
    read_head,
    split_lines,
)
from pipelines.corpus.web_archives import COLUMNS as WET_COLUMNS
from pipelines.corpus.web_archives import read_archive
from pipelines.runtime.arrow import id_column
from pipelines.runtime.errors import InputError, StorageError
from pipelines.runtime.files import in_threads, with_retries

_COMPRESSED_GROWTH = 4
_LARGEST_INTEGER = 2.0**63
_LONG_NUMBER = re.compile(rb"\d{19}")
_DELIMITED = ("csv", "tsv")
_EMPTY = "the file is empty"

log = logging.getLogger(__name__)


class Absent:
    """Stands where a row has no id of its own, so that the hash of its text becomes its id."""


ABSENT = Absent()


@dataclass
class RowBatch:
    """Some consecutive rows as they were found, not yet checked.

    ``problems`` says of a row why it could not be parsed; its text is then the raw line. ``ids``
    is None where the file has no id column, and holds :data:`ABSENT` for a row without an id.
    ``kept`` holds the kept columns, as an Arrow table or as one list of values a column.
    """

    texts: list[Any] = field(default_factory=list)
    problems: list[str | None] = field(default_factory=list)
    ids: list[Any] | None = None
    kept: pa.Table | list[list[Any]] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, text: Any, row_id: Any, kept: list[Any], size: int) -> None:
        """Append a row that was parsed."""
        self.texts.append(text)
        self.problems.append(None)
        if self.ids is not None:
            self.ids.append(row_id)
        if kept:
            for column, value in zip(self.kept, kept, strict=True):
                column.append(value)
        self.size_bytes += size

    def add_problem(self, raw: str, problem: str) -> None:
        """Append a row that could not be parsed."""
        self.add(raw[:1000], None, [None] * len(self.kept), len(raw))
        self.problems[-1] = problem

    @property
    def full(self) -> bool:
        """Whether the batch has reached its size."""
        return len(self.texts) >= BATCH_ROWS or self.size_bytes >= BATCH_BYTES


def read_shard(shard: Shard, columns: Columns) -> Iterator[RowBatch]:
    """The rows of a shard in their order.

    Raises ``OSError`` or ``pyarrow.ArrowException`` where the file cannot be read any further;
    what came before has been yielded.
    """
    file = shard.file
    id_name = columns.id_of(file)
    if file.format in TYPED_FORMATS:
        for table in read_columnar(shard, columns):
            yield _columnar_batch(table, columns, id_name)
        return

    def new_batch() -> RowBatch:
        return RowBatch(ids=None if id_name is None else [], kept=[[] for _ in columns.keep])

    batch = new_batch()
    try:
        for row in _ROW_READERS[file.format](shard, columns, id_name):
            if isinstance(row, RowBatch):
                if batch.texts:
                    yield batch
                    batch = new_batch()
                yield row
            elif isinstance(row, _Problem):
                for _ in range(row.lines):
                    batch.add_problem(row.raw, row.problem)
            else:
                batch.add(*row)
            if batch.full:
                yield batch
                batch = new_batch()
    except (OSError, pa.ArrowException, UnicodeError) as error:
        yield batch
        if isinstance(error, UnicodeError):
            raise OSError(str(error)) from error
        raise
    if batch.texts:
        yield batch


@dataclass(frozen=True)
class _Problem:
    raw: str
    problem: str
    lines: int = 1
    """How many rows it stands for."""


_Row = tuple[Any, Any, list[Any], int] | _Problem


def _columnar_batch(table: pa.Table, columns: Columns, id_name: str | None) -> RowBatch:
    ids = None
    if id_name is not None:
        ids = [v for chunk in table.column(id_name).chunks for v in _values(id_column(chunk))]
    return RowBatch(
        texts=[v for chunk in table.column(columns.text).chunks for v in _values(chunk)],
        problems=[None] * len(table),
        ids=ids,
        kept=table.select(list(columns.keep)),
        size_bytes=table.nbytes,
    )


def _values(column: pa.Array) -> list[Any]:
    """Python values; strings as bytes, since Parquet files do not always hold valid UTF-8."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def _lines(shard: Shard) -> Iterator[bytes | None]:
    file = shard.file
    return split_lines(
        file.path,
        file.compression,
        encoding=file.encoding,
        newline=file.newline,
        start=shard.start,
        stop=shard.stop,
    )


def _read_text(shard: Shard, columns: Columns, id_name: str | None) -> Iterator[_Row]:
    constants = shard.file.view.constants
    for line in _lines(shard):
        if line is None:
            yield _too_long()
        else:
            yield line, None, _kept_beside(line, columns, constants), len(line)


def _kept_beside(text: bytes, columns: Columns, constants: Mapping[str, Any]) -> list[Any]:
    """The kept columns of a row that is nothing but its text."""
    return [text if name == columns.text else constants.get(name) for name in columns.keep]


def _read_json(shard: Shard, columns: Columns, id_name: str | None) -> Iterator[_Row]:
    constants = shard.file.view.constants
    text_name, absent = columns.text, None if columns.id else ABSENT
    absent, of_folder = constants.get(id_name or "", absent), constants.get(text_name)
    wanted = [(name, constants.get(name)) for name in columns.keep]
    is_plain = not any("." in name for name in (text_name, id_name or "", *columns.keep))

    def values_of(value: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
        get = value.get if is_plain else partial(_value_of, value)
        row_id = None if id_name is None else get(id_name, absent)
        return get(text_name, of_folder), row_id, [get(name, other) for name, other in wanted]

    for line in _lines(shard):
        if line is None:
            yield _too_long()
            continue
        value, problem = _parse_object(line)
        if problem:
            yield _Problem(line[:1000].decode("utf-8", "replace"), problem)
            continue
        text, row_id, kept = values_of(value)
        rounded = _may_be_rounded(row_id, line)
        if rounded or (kept and any(_may_be_rounded(other, line) for other in kept)):
            text, row_id, kept = values_of(json.loads(line))
        yield text, row_id, kept, len(line)


def _parse_object(line: bytes) -> tuple[dict[str, Any], str | None]:
    """The object of a line, or why there is none; integers beyond 64 bits are rounded."""
    try:
        value = orjson.loads(line)  # ten times as fast as json
    except orjson.JSONDecodeError:
        if not line.strip():
            return {}, "blank line"
        try:
            value = json.loads(line.decode())  # which accepts NaN and lone surrogates
        except UnicodeDecodeError:
            return {}, "line is not valid UTF-8"
        except (ValueError, RecursionError):
            return {}, "malformed JSON line"
    return (value, None) if isinstance(value, dict) else ({}, "JSON line is not an object")


def _may_be_rounded(value: Any, line: bytes) -> bool:
    """Whether a value that orjson parsed may be an integer beyond 64 bits, made a float."""
    if isinstance(value, float):
        return abs(value) >= _LARGEST_INTEGER
    return isinstance(value, list | dict) and _LONG_NUMBER.search(line) is not None


def _value_of(value: dict[str, Any], name: str, absent: Any) -> Any:
    """What an object has under a key, or under ``key.key``."""
    if name in value or "." not in name:
        return value.get(name, absent)
    first, _, rest = name.partition(".")
    inner = value.get(first)
    return _value_of(inner, rest, absent) if isinstance(inner, dict) else absent


def _too_long() -> _Problem:
    return _Problem("", f"line longer than {LONGEST_LINE_BYTES >> 20} MiB")


def _read_delimited(
    shard: Shard, columns: Columns, id_name: str | None
) -> Iterator[_Row | RowBatch]:
    file = shard.file
    places = {name: place for place, name in enumerate(file.columns)}
    constants = file.view.constants
    wanted = [name for name in columns.wanted(file) if name in places]
    for rows in read_blocks(file, wanted):
        if isinstance(rows, pa.Table):
            values = {name: rows.column(name).to_pylist() for name in rows.column_names}

            def of(name: str, count: int = len(rows), found: Any = values) -> list[Any]:
                return found[name] if name in found else [constants.get(name)] * count

            ids = None if id_name is None else of(id_name)
            kept_columns = [of(name) for name in columns.keep]
            problems: list[str | None] = [None] * len(rows)
            yield RowBatch(of(columns.text), problems, ids, kept_columns, rows.nbytes)
            continue
        row = rows
        if isinstance(row, BadRow):
            yield _Problem(f"line {row.line}" if row.line else "", row.problem, row.lines)
            continue
        text, row_id, *kept = (
            row[places[name]] if name in places else constants.get(name)
            for name in (columns.text, id_name or "", *columns.keep)
        )
        yield text, row_id, list(map(_readable, kept)), sum(len(field or "") for field in row)


def _readable(text: str | None) -> str | None:
    """Undecodable bytes, which the reader has kept as lone surrogates, as U+FFFD."""
    if text is None or text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_document(shard: Shard, columns: Columns, id_name: str | None) -> Iterator[_Row]:
    file = shard.file
    constants = file.view.constants
    with open_stream(file.path, file.compression) as stream:
        text = stream.read(LONGEST_LINE_BYTES + 1)
    if (encoding := encoding_by_mark(text[:4])) != UTF_8:
        with contextlib.suppress(UnicodeDecodeError):  # its check will say that it is no text
            text = text.decode(encoding).encode()
    text = text.removeprefix(b"\xef\xbb\xbf")
    kept = _kept_beside(text, columns, constants)
    if len(text) > LONGEST_LINE_BYTES:
        yield _Problem(file.path, f"file longer than {LONGEST_LINE_BYTES >> 20} MiB")
    else:
        yield text, constants.get(id_name or ""), kept, len(text)


def _read_wet(shard: Shard, columns: Columns, id_name: str | None) -> Iterator[_Row]:
    constants = shard.file.view.constants
    for record in read_archive(shard.file):
        text = record["text"]
        if text is None:
            yield _Problem(str(record["id"]), f"record longer than {LONGEST_LINE_BYTES >> 20} MiB")
            continue
        kept = [record.get(name, constants.get(name)) for name in columns.keep]
        yield record.get(columns.text), record.get(id_name or ""), kept, len(text)


_ROW_READERS: dict[str, Callable[[Shard, Columns, str | None], Iterator[_Row | RowBatch]]] = {
    "jsonl": _read_json,
    "text": _read_text,
    "csv": _read_delimited,
    "tsv": _read_delimited,
    "document": _read_document,
    "wet": _read_wet,
}


# ---- looking into files


def inspect_files(
    files: Sequence[CorpusFile],
    columns: Columns,
    *,
    shard_bytes: int,
    options: CorpusOptions | None = None,
) -> list[CorpusFile]:
    """Look into every file: its columns, size and shards of about ``shard_bytes``.

    Raises :class:`InputError` where the files lack a wanted column.
    """
    options = options or CorpusOptions()
    sniffed: dict[str, Sniffed] = {}
    inspection = Inspection(columns, shard_bytes, options, sniffed)
    seen = _with_dialects(in_threads(inspection.inspect, list(files)), sniffed)
    blank = [file.path for file in seen if len(file.bounds) == 1]
    if any(file.readable for file in seen):
        if blank:
            log.warning("not read: %d files of not one line, %s", len(blank), blank[0])
    else:
        seen = [replace(f, problem=_EMPTY) if f.path in blank else f for f in seen]
    check_columns(seen, columns)
    return seen


@dataclass(frozen=True)
class Inspection:
    """Looks into files one by one; ``sniffed`` gets the dialects of those of CSV and TSV."""

    columns: Columns
    shard_bytes: int
    options: CorpusOptions
    sniffed: dict[str, Sniffed]

    def inspect(self, file: CorpusFile) -> CorpusFile:
        """One file looked into; where that fails its ``problem`` says why."""
        if not file.size_bytes and file.format != "document":
            return replace(file, problem=_EMPTY)
        if file.format in ("document", "wet"):
            names = (self.columns.text,) if file.format == "document" else WET_COLUMNS
            growth = _COMPRESSED_GROWTH if file.compression else 1
            return replace(file, columns=names, text_bytes=file.size_bytes * growth)
        try:
            return with_retries(lambda: self._look_into(file), file.path, decodes=True)
        except StorageError:
            raise
        except (OSError, pa.ArrowException, UnicodeError) as error:
            other = file.compression and packing_problem(file.path, file.compression)
            return replace(file, problem=other or describe_problem(error))

    def _look_into(self, file: CorpusFile) -> CorpusFile:
        if file.format in TYPED_FORMATS:
            return inspect_columnar(file, self.columns, self.shard_bytes)
        head = read_head(file.path, file.compression)
        encoding = encoding_by_mark(head)
        if encoding != file.encoding:
            head = read_head(file.path, file.compression, encoding)
        if problem := encoding_problem(head):
            return replace(file, problem=problem)
        seen = replace(
            file,
            text_bytes=file.size_bytes * (_COMPRESSED_GROWTH if file.compression else 1),
            encoding=encoding,
            newline=line_end(head),
            head_is_all=len(head) < HEAD_BYTES,
        )
        if file.format in _DELIMITED and not head.removeprefix(codecs.BOM_UTF8).strip(b"\r\n"):
            return replace(seen, text_bytes=0, rows=0, bounds=(0,))  # as empty as one of 0 bytes
        if file.format in _DELIMITED:
            self.sniffed[file.path] = sniff(head, file.format, self.options)
            return _with_header(seen, head, self.sniffed[file.path].dialect)
        names = (self.columns.text,) if file.format == "text" else tuple(_json_keys(head))
        if file.format == "jsonl" and not names and head.lstrip().startswith(b"["):
            return replace(file, problem=f"it holds {JSON_ARRAY}")
        seen = replace(seen, columns=names)
        if file.compression or encoding != UTF_8:
            return seen
        starts = range(0, max(1, file.size_bytes - self.shard_bytes // 2), self.shard_bytes)
        return replace(seen, bounds=(*starts, file.size_bytes))


def _with_header(file: CorpusFile, head: bytes, dialect: Dialect) -> CorpusFile:
    """The file with its dialect and the names that its header or the user gives its columns."""
    text = io.StringIO(head.decode("utf-8-sig", "replace"), newline="")
    header = next(parse_rows(text, dialect), [])
    if isinstance(header, BadRow):
        return replace(file, problem=f"its header: {header.problem}")
    names = dialect.header or tuple(name or "" for name in header)
    if dialect.header and len(header) != len(dialect.header):
        raise InputError(
            f"{file.path}: --csv-header names {len(dialect.header)} columns, its first row has "
            f"{len(header)}"
        )
    return replace(file, columns=names, dialect=dialect, head_is_all=True)


def _with_dialects(files: list[CorpusFile], sniffed: Mapping[str, Sniffed]) -> list[CorpusFile]:
    """The files with the one dialect that some of them show and none contradicts; a log line."""
    for form in _DELIMITED:
        mine = [file for file in files if file.format == form and file.dialect]
        shown = {s.dialect for f in mine if (s := sniffed[f.path]).sure}
        for place, file in enumerate(files):
            if len(shown) != 1 or file not in mine or sniffed[file.path].sure:
                continue
            (dialect,) = shown
            if dialect != file.dialect:
                head = read_head(file.path, file.compression, file.encoding)
                if not shows_another_delimiter(head, file.dialect, dialect):
                    files[place] = _with_header(file, head, dialect)
    counts = Counter((f.format, f.dialect) for f in files if f.dialect and not f.problem)
    for (form, dialect), count in counts.items():
        log.info("%s, %d files: %s", form, count, describe_dialect(dialect))
    return files


def _json_keys(head: bytes) -> dict[str, None]:
    """Keys of the objects in the first lines, in their order; lines that are none are left."""
    lines = head.removeprefix(b"\xef\xbb\xbf").splitlines()
    keys: dict[str, None] = {}
    for line in lines[:-1] if len(head) >= HEAD_BYTES and len(lines) > 1 else lines:
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError):
            continue
        keys.update(dict.fromkeys(value if isinstance(value, dict) else ()))
    return keys


def check_columns(files: Sequence[CorpusFile], columns: Columns) -> None:
    """Raise :class:`InputError` for a wanted column that is nowhere, naming those there are.

    Each file must have the text, and the id where one is named, if its header says all its
    columns. Kept columns, and keys of JSON lines, are null where a file or a line has none.
    """
    files = [file for file in files if file.readable]
    for file in files:
        counts = Counter(file.columns)
        if twice := [name for name in columns.wanted(file) if counts[name] > 1]:
            raise InputError(
                f"{file.path} has {counts[twice[0]]} columns {twice[0]!r}, and which one is meant "
                "cannot be told: rename the others"
            )
    wanted = [("text", columns.text), *(("kept", name) for name in columns.keep)]
    if columns.id is not None:
        wanted.insert(1, ("id", columns.id))
    for role, name in wanted:
        lacking = [file for file in files if not file.has(name)]
        everywhere = len(lacking) == len(files)
        for file in lacking:
            must = file.format in WHOLE_SCHEMA and role != "kept"
            may_come = file.format == "jsonl" and not (file.head_is_all and file.columns)
            if must or (everywhere and not ((may_come and role != "text") or not file.columns)):
                raise InputError(
                    f"{file.path} has no {role} column {name!r}; its columns are "
                    f"{', '.join(file.all_columns)}"
                )
        if lacking and everywhere:
            log.warning("no line looked at has %s column %r", role, name)
