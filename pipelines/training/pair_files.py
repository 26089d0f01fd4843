"""Pairs as files: our own output, or anyone's Parquet, CSV or JSON lines, in bounded memory.

Out: a table ``anchor``, ``positive``, ``id`` and, where the files have them, ``label``, all
strings; ``negative``, the hard negatives of each pair as a list that may be empty; and ``sketch``,
the keys that near-duplicates share.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from pipelines.corpus.files import known_format
from pipelines.corpus.streams import split_lines
from pipelines.runtime.arrow import id_column, open_csv, plain_column, plain_type
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    check_store,
    exists,
    first_line,
    join,
    open_filesystem,
    state_mark,
    with_inner_path,
)
from pipelines.runtime.listing import match_files
from pipelines.runtime.table_folders import refuse_files_of_tables
from pipelines.training.batches import sketch

REQUIRED = ("anchor", "positive")
PAIRS_FOLDER = "pairs"
_FORMATS = {"parquet": "Parquet", "csv": "CSV", "jsonl": "JSON lines"}
_ROWS_A_BATCH = 4096
_STRING = pa.large_string()
_SKETCH = pa.list_(pa.int64())

log = logging.getLogger(__name__)


def read_pairs(path: str, most: int, seed: int, label_column: str | None = None) -> pa.Table:
    """At most ``most`` pairs of a file or folder, chosen by a hash so that order does not matter.

    Rows without an anchor or a positive are left out, with a warning. Where there is no ``id``,
    an anchor is its own document. Files may differ in their types, and in the columns that are
    not required.

    Args:
        path: a file of Parquet, CSV or JSON lines, a folder of them, or the output of
            ``generate_pairs``.
        most: memory grows with this, not with the files.
        seed: decides which are chosen.
        label_column: column to take as ``label``. Where at most half of the pairs have one, none
            of these is left out.

    Raises:
        InputError: no such file, no pair in it, or a missing column.
    """
    files = {file: open_file(file) for file in find_pair_files(path)}
    names = columns_of(files, path, label_column)
    lowest_by_label = {True: _Lowest(most, seed), False: _Lowest(most, seed)}
    dropped = 0
    for file, data in files.items():
        for batch in _batches(file, data, names):
            table = plain_pairs(batch, file, names)
            dropped += len(batch) - len(table)
            has_label = (
                pc.is_valid(table["label"])
                if label_column
                else pa.array([False] * len(table), pa.bool_())
            )
            for labelled, best in lowest_by_label.items():
                best.add(table.filter(has_label if labelled else pc.invert(has_label)))
    if dropped:
        log.warning("%s: %d rows without an anchor or a positive are left out", path, dropped)
    with_label, without = lowest_by_label[True], lowest_by_label[False]
    if not with_label.seen + without.seen:
        raise InputError(f"{path} holds no pair: rows with an anchor and a positive are required")
    if with_label.seen <= without.seen:  # few labels: each is worth its while
        chosen = pa.concat_tables([with_label.table(), without.table()])
    else:
        chosen = lowest(pa.concat_tables([with_label.table(), without.table()]), most, seed)
    return _with_sketches(chosen)


class _Lowest:
    """Those of the rows added whose hashes are lowest."""

    def __init__(self, most: int, seed: int) -> None:
        self._most, self._seed = most, seed
        self._kept: list[pa.Table] = []
        self.seen = 0

    def add(self, table: pa.Table) -> None:
        self._kept.append(table)
        self.seen += len(table)
        if sum(map(len, self._kept)) > 4 * self._most:
            self._kept = [self.table()]

    def table(self) -> pa.Table:
        """The rows, lowest first."""
        return lowest(pa.concat_tables(self._kept), self._most, self._seed)


def find_pair_files(path: str) -> list[str]:
    """The files of pairs at ``path``, as globs and folders name them anywhere.

    Raises :class:`InputError` where there is none, and for tables, of which pairs are not read.
    """
    return [str(entry[0]) for entry in list_pair_files(path)]


def list_pair_files(path: str) -> list[list[Any]]:
    """Path, size and time of change, or mark, of every file that :func:`find_pair_files` finds."""
    folder = join(path, PAIRS_FOLDER)
    source = folder if _format_of(path) is None and exists(folder) else path
    infos = match_files(source)
    refuse_files_of_tables(source, infos)
    for info in infos:
        if info.type == pafs.FileType.Directory:
            raise InputError(
                f"{info.path} is a table, whose folder also holds rows that were deleted or "
                "replaced: of pairs write its current rows to Parquet first"
            )
    found = [info for info in infos if _format_of(info.path)]
    if not found:
        raise InputError(
            f"no pairs at {path}: give a .parquet, .csv or .jsonl file, or a folder of them"
        )
    kinds = {_format_of(info.path) for info in found}
    if len(kinds) > 1:
        both = " and ".join(sorted(name for kind, name in _FORMATS.items() if kind in kinds))
        raise InputError(f"{path} holds both {both} files: give one kind of pairs")
    filesystem = open_filesystem(source)[0]
    return [
        [with_inner_path(source, info.path), info.size, state_mark(filesystem, info)]
        for info in found
    ]


def _format_of(path: str) -> str | None:
    """What holds pairs by its name, JSON lines also where they are compressed."""
    kind, compression = known_format(path) or (None, None)
    return kind if kind in _FORMATS and (kind == "jsonl" or not compression) else None


class CsvPairs:
    """A CSV of pairs, as much like a dataset as is needed; everything in it is a string."""

    def __init__(self, path: str) -> None:
        self._path = path
        with self._open() as reader:
            self.schema = reader.schema

    @contextlib.contextmanager
    def _open(self, columns: Iterable[str] = ()) -> Iterator[Any]:
        filesystem, inner = open_filesystem(self._path)
        strings = pacsv.ConvertOptions(column_types=dict.fromkeys(columns, _STRING))
        with filesystem.open_input_stream(inner) as stream:
            yield open_csv(stream, convert=strings)

    def to_batches(self, columns: Iterable[str]) -> Iterator[pa.RecordBatch]:
        """The columns, in parts."""
        with self._open(self.schema.names) as reader:
            for batch in reader:
                yield batch.select(list(columns))


class JsonPairs:
    """JSON lines of pairs, as much like a dataset as is needed; keys may differ by line."""

    def __init__(self, path: str) -> None:
        self._path = path
        keys = dict.fromkeys(key for row in self._rows() for key in row)
        self.schema = pa.schema([(key, pa.null()) for key in keys])

    def _rows(self) -> Iterator[dict[str, Any]]:
        _, compression = known_format(self._path) or (None, None)
        for number, line in enumerate(split_lines(self._path, compression), 1):
            try:
                row = json.loads(line or b"")
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            elif line is None or line.strip():
                raise InputError(
                    f"pairs at {self._path} cannot be read: line {number} is no JSON object; "
                    'each line must be one, {"anchor": …, "positive": …}'
                )

    def to_batches(self, columns: Iterable[str]) -> Iterator[pa.RecordBatch]:
        """The columns, in parts: strings, numbers as JSON writes them, ``negative`` a list."""
        names, rows = list(columns), self._rows()
        while some := list(itertools.islice(rows, _ROWS_A_BATCH)):
            yield pa.record_batch([self._column(some, name) for name in names], names=names)

    def _column(self, rows: list[dict[str, Any]], name: str) -> pa.Array:
        values = [row.get(name) for row in rows]
        if name == "sketch":  # of our own files alone
            return pa.nulls(len(values), _SKETCH)
        if name != "negative":
            return pa.array([self._text(value, name) for value in values], _STRING)
        lists = [value if isinstance(value, list) else [value] for value in values]
        texts = [[self._text(text, name) for text in texts] for texts in lists]
        return pa.array(texts, pa.large_list(_STRING))

    def _text(self, value: Any, name: str) -> str | None:
        if isinstance(value, list | dict):
            raise InputError(
                f"{self._path}: column {name!r} holds a {type(value).__name__}; a string is "
                "required"
            )
        if isinstance(value, str):  # JSON may hold halves of characters, which no file takes
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return None if value is None else json.dumps(value)


Pairs: TypeAlias = "pads.Dataset | CsvPairs | JsonPairs"


def open_file(path: str) -> Pairs:
    """One file of pairs. Everything in a CSV is a string, which may hold line breaks."""
    kind = _format_of(path)
    try:
        if kind != "parquet":
            return CsvPairs(path) if kind == "csv" else JsonPairs(path)
        filesystem, inner = open_filesystem(path)
        return pads.dataset([inner], filesystem=filesystem, format="parquet")
    except (OSError, pa.ArrowException) as error:
        check_store(path, error)
        raise _unreadable(path, error) from error


def columns_of(files: dict[str, Pairs], path: str, label_column: str | None) -> dict[str, str]:
    """Which columns to read, by the names they get; an optional one needs to be in one file."""
    known = list(dict.fromkeys(name for data in files.values() for name in data.schema.names))
    for file, data in files.items():
        for name in REQUIRED:
            if name not in data.schema.names:
                raise InputError(
                    f"{file} has no column {name!r}; its columns are "
                    f"{', '.join(data.schema.names) or 'none'}, and {' and '.join(REQUIRED)} are "
                    "required"
                )
    if label_column and label_column not in known:
        raise InputError(
            f"{path} has no column {label_column!r}; its columns are {', '.join(known)}"
        )
    names = {name: name for name in (*REQUIRED, "id", "negative", "sketch") if name in known}
    return names | ({"label": label_column} if label_column else {})


def _batches(file: str, data: Pairs, names: dict[str, str]) -> Iterator[pa.Table]:
    present = {new: old for new, old in names.items() if old in data.schema.names}
    batches = data.to_batches(columns=list(dict.fromkeys(present.values())))
    while True:
        try:
            batch = next(batches)
            yield pa.table({new: batch.column(old) for new, old in present.items()})
        except StopIteration:
            return
        except (OSError, pa.ArrowException) as error:
            check_store(file, error)
            raise _unreadable(file, error) from error


def plain_pairs(table: pa.Table, file: str, names: Iterable[str]) -> pa.Table:
    """The columns of ``names`` as strings, and negatives as lists of them.

    Rows without an anchor or a positive are left out; ``file`` is named in errors.
    """
    columns: dict[str, pa.Array] = {}
    for name in names:
        if name == "negative":
            columns[name] = _lists(table, file)
        elif name == "sketch":
            columns[name] = _sketches(table)
        elif name in table.column_names:
            columns[name] = _strings(table[name], name, file)
        else:
            columns[name] = pa.nulls(len(table), _STRING)
    for name in {"id", "label"} & columns.keys():  # a CSV has "" where there is none
        blank = pc.equal(pc.utf8_trim_whitespace(columns[name]), "")
        columns[name] = pc.if_else(blank, pa.scalar(None, _STRING), columns[name])
    document = columns.get("id", pa.nulls(len(table), _STRING))
    columns["id"] = pc.coalesce(document, columns["anchor"])
    plain = pa.table(columns)
    for name in REQUIRED:
        length = pc.utf8_length(pc.utf8_trim_whitespace(plain[name]))
        plain = plain.filter(pc.fill_null(pc.greater(length, 0), False))
    return plain


def _strings(column: pa.ChunkedArray, name: str, file: str) -> pa.Array:
    kind = plain_type(column.type)
    if pa.types.is_nested(kind):
        raise InputError(f"{file}: column {name!r} holds {kind}; a string is required")
    plain = id_column if name == "id" else plain_column
    try:
        chunks = [plain(chunk).cast(_STRING) for chunk in column.chunks]
        return pa.chunked_array(chunks, _STRING).combine_chunks()
    except pa.ArrowInvalid as error:
        raise InputError(f"{file}: column {name!r} is not valid UTF-8 text") from error


def _lists(table: pa.Table, file: str) -> pa.Array:
    """Each row's hard negatives, blank ones left out."""
    values = table["negative"].to_pylist() if "negative" in table.column_names else []
    rows = [_negatives(value, file) for value in values or [None] * len(table)]
    return pa.array(rows, pa.large_list(_STRING))


def _negatives(value: Any, file: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str | None):
            raise InputError(
                f"{file}: column 'negative' holds a {type(text).__name__}; a string or a list of "
                "strings is required"
            )
    return [text for text in texts if text and text.strip()]


def _sketches(table: pa.Table) -> pa.Array:
    """The keys that a file of ours has; nulls where it is anyone's."""
    if "sketch" in table.column_names and table["sketch"].type == _SKETCH:
        return table["sketch"].combine_chunks()
    return pa.nulls(len(table), _SKETCH)


def _with_sketches(table: pa.Table) -> pa.Table:
    """Sketches of both sides together where a file has none of the whole document."""
    known = table["sketch"].to_pylist() if "sketch" in table.column_names else [None] * len(table)
    missing = [place for place, keys in enumerate(known) if keys is None]
    pairs = table.select(REQUIRED).take(pa.array(missing, pa.int64())).to_pylist()
    made = sketch([f"{pair['anchor']} {pair['positive']}" for pair in pairs])
    for place, keys in zip(missing, made.tolist(), strict=True):
        known[place] = keys
    bare = table.drop_columns(["sketch"]) if "sketch" in table.column_names else table
    return bare.append_column("sketch", pa.array(known, _SKETCH))


def _unreadable(path: str, error: Exception) -> InputError:
    return InputError(f"pairs at {path} cannot be read: {first_line(error)}")


def lowest(table: pa.Table, most: int, seed: int) -> pa.Table:
    """The ``most`` rows whose texts and seed hash lowest, in that order."""
    salt = str(seed).encode()
    rows = zip(table["anchor"].to_pylist(), table["positive"].to_pylist(), strict=True)
    digests = [
        hashlib.sha256(b"\0".join((salt, a.encode(), p.encode()))).digest()[:8] for a, p in rows
    ]
    order = np.argsort(np.frombuffer(b"".join(digests), ">u8"), kind="stable")[:most]
    return table.take(order)
