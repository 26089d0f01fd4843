"""A file of CSV or TSV: block by block where that is sure to give the same rows, else row by row.

In: a file whose dialect is known. Out: its rows after the header, in order, as tables of bytes or
one by one. A block is sound where every quotation mark opens or closes a field or is doubled, each
row has as many fields as the header, and no quoted field looks like rows that a mark has glued
together: pyarrow then reads it as Python's csv does, several times as fast.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from pipelines.corpus.delimited import BadRow, Row, check_row, parse_rows
from pipelines.corpus.files import CorpusFile, Dialect
from pipelines.corpus.streams import BLOCK_BYTES, open_stream

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MOST_BYTES = 8 << 20
"""Of a block; a row that is longer is read alone."""
_CACHED_BYTES = 1 << 18
"""pyarrow reads as much at a time: it takes 28 ms for what takes 44 ms by the MiB. Not where there
are carriage returns: parting a quoted "\\r\\n" it loses the newline (26.0.1)."""
_ANY_LINE_END = re.compile(rb"\r\n?|\n")
_LINE_ENDS = (ord("\n"), ord("\r"))


def read_blocks(file: CorpusFile, wanted: Sequence[str]) -> Iterator[pa.Table | Row]:
    """The rows of a file after its header: tables of the columns ``wanted``, or single rows.

    A table's values are bytes, none of them null. A single row has all columns of the header.
    """
    dialect, width = file.dialect, len(file.columns)
    assert dialect is not None
    places = {name: place for place, name in enumerate(file.columns)}  # of two the last
    with open_stream(file.path, file.compression, file.encoding) as stream:
        source = _Source(stream, dialect, file.newline)
        if not dialect.header:
            next(source.rows(1), None)
        parser = _Parser(dialect, width, [places[name] for name in wanted])
        while (block := source.next_block()) is not None:
            table = parser.parse(block)
            if table is not None:
                source.skip(block)
                yield table.rename_columns(list(wanted))
                continue
            for row in source.rows(max(1, len(block))):
                yield check_row(row, width, dialect.delimiter)


@dataclass(frozen=True)
class _Block:
    """The bytes [start, stop) of ``data``, which are not copied."""

    data: bytes
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def count(self, some: bytes) -> int:
        """How often ``some`` stands in it."""
        return self.data.count(some, self.start, self.stop)

    def has(self, some: bytes) -> bool:
        """Whether ``some`` stands in it."""
        return self.data.find(some, self.start, self.stop) >= 0

    def begins(self, *some: bytes) -> bool:
        """Whether it begins with one of these."""
        return self.data.startswith(some, self.start, self.stop)

    @property
    def numbers(self) -> np.ndarray:
        """Its bytes, uint8 (n,)."""
        return np.frombuffer(self.data, np.uint8, len(self), self.start)

    @functools.cached_property
    def newlines(self) -> np.ndarray:
        """Where newlines stand, as :meth:`places`."""
        return self.places("\n")

    def places(self, mark: str) -> np.ndarray:
        """Where an ASCII mark stands, counted from the beginning, int64 (n,)."""
        if not mark or not self.has(mark.encode()):
            return np.empty(0, np.int64)
        return np.flatnonzero(self.numbers == ord(mark))


class _Source:
    """A file's bytes as far as they are read, of which those before ``_place`` are done."""

    def __init__(self, stream: Any, dialect: Dialect, newline: str) -> None:
        self._read = getattr(stream, "read1", stream.read)  # as much as comes in one go
        self._dialect = dialect
        self._newline = b"\n" if dialect.quote else newline.encode()
        self._line_end = _ANY_LINE_END if dialect.quote else re.compile(self._newline)
        self._data = b""
        self._place = 0
        self._done = 0
        """Bytes that are done and gone from ``_data``."""
        self._lines_done = 0
        self._ended: bool | OSError = False

    def next_block(self) -> _Block | None:
        """All whole rows that are at hand, one at least; empty where none is; None at the end.

        Raises ``OSError`` where the file cannot be read any further.
        """
        while not (stop := self._whole_rows()):
            if self._ended or len(self._data) - self._place > _MOST_BYTES:
                break
            self._read_block()
        if not stop and isinstance(self._ended, OSError):
            raise self._ended
        if self._place == len(self._data):
            return None
        return _Block(self._data, self._place, stop or self._place)

    def skip(self, block: _Block) -> None:
        """Go on behind a block that was read."""
        self._place = block.stop
        self._lines_done += len(block.newlines)

    def rows(self, size: int) -> Iterator[Row]:
        """Rows one by one until ``size`` bytes are done, and the row in which they end."""
        before, stop = self._lines_done, self._done + self._place + size
        for row in parse_rows(self._lines(), self._dialect):
            if isinstance(row, BadRow) and row.line:
                row = replace(row, line=row.line + before)
            yield row
            if self._done + self._place >= stop:
                return

    def _whole_rows(self) -> int:
        """Where the last whole row ends, if every quotation mark is sound; 0 without one."""
        data, place, stop = self._data, self._place, len(self._data)
        marks = _Block(data, place, stop).places(self._dialect.quote) + place
        if self._ended is True and len(marks) % 2 == 0:
            return stop
        while (found := data.rfind(self._newline, place, stop)) >= 0:
            before = int(np.searchsorted(marks, found))
            if before % 2 == 0:
                return found + 1
            stop = int(marks[before - 1])  # where the field begins that it is in
        return 0

    def _read_block(self) -> None:
        try:
            block = bytes(self._read(BLOCK_BYTES))
            self._ended = not block
        except OSError as error:
            block, self._ended = b"", error
        rest = self._data[self._place :]
        self._done += self._place
        if not self._done and not rest:
            block = block.removeprefix(_BYTE_ORDER_MARK)
        self._data, self._place = rest + block, 0

    def _lines(self) -> Iterator[str]:
        while line := self._next_line():
            self._lines_done += 1
            yield line.decode("utf-8", "surrogateescape")

    def _next_line(self) -> bytes:
        found = self._line_end.search(self._data, self._place)
        while not self._ended and (found is None or found.end() == len(self._data)):
            size = len(self._data) - self._place
            self._read_block()
            found = self._line_end.search(self._data, max(0, size - 1))
        if found is None and isinstance(self._ended, OSError):
            raise self._ended
        start, self._place = self._place, found.end() if found else len(self._data)
        return self._data[start : self._place]


class _Parser:
    """Reads blocks of whole rows of ``width`` fields; ``wanted`` are the places of columns."""

    def __init__(self, dialect: Dialect, width: int, wanted: Sequence[int]) -> None:
        marks = (dialect.delimiter, dialect.quote or dialect.delimiter)
        self._does = width > 1 and all(mark.isascii() for mark in marks)
        self._dialect = dialect
        names = [str(place) for place in range(width)]
        self._wanted = [names[place] for place in wanted]
        self._in_parts, self._in_one = (
            pa.csv.ReadOptions(use_threads=False, block_size=size, column_names=names)
            for size in (_CACHED_BYTES, 2 * _MOST_BYTES)
        )
        self._parsing = pa.csv.ParseOptions(
            delimiter=dialect.delimiter if self._does else ",",
            quote_char=(self._does and dialect.quote) or False,
            newlines_in_values=bool(dialect.quote),
            ignore_empty_lines=False,
        )
        self._some, self._all = (
            pa.csv.ConvertOptions(
                check_utf8=False,
                column_types=dict.fromkeys(names, pa.binary()),
                include_columns=some,
            )
            for some in (self._wanted, names)
        )

    def parse(self, block: _Block) -> pa.Table | None:
        """The columns wanted, as bytes; None where it is not sure to be as row by row."""
        dialect = self._dialect
        if not self._does or not len(block) or block.has(b"\0") or block.begins(_BYTE_ORDER_MARK):
            return None
        returns = block.has(b"\r") and block.count(b"\r")
        if returns and returns != block.count(b"\r\n"):
            return None
        if dialect.escape and block.has(dialect.escape.encode()):
            return None
        quotes, newlines = block.places(dialect.quote), block.newlines
        ends = newlines[np.searchsorted(quotes, newlines) % 2 == 0] if len(quotes) else newlines
        if not _are_sound(block, quotes, dialect) or _has_blank_line(block, ends):
            return None
        inner = len(ends) < len(newlines)
        source = pa.py_buffer(block.data).slice(block.start, len(block))
        reading, convert = self._in_one if returns else self._in_parts, self._some
        try:
            table = pa.csv.read_csv(source, reading, self._parsing, self._all if inner else convert)
        except pa.ArrowInvalid:  # such as a row of another width
            return None
        if len(table) != len(ends) + (block.data[block.stop - 1] != ord("\n")):
            return None
        if inner:
            rows = zip(*table.to_pydict().values(), strict=True)
            if any(_is_glued(row, dialect.delimiter) for row in rows):
                return None
        return table.select(self._wanted)


def _are_sound(block: _Block, quotes: np.ndarray, dialect: Dialect) -> bool:
    """Whether each quotation mark opens or closes a field, or is one of two within one."""
    if not len(quotes):
        return True
    opening, closing = quotes[::2], quotes[1::2]
    if len(opening) != len(closing):
        return False
    data = block.numbers
    ends = np.array([ord(dialect.delimiter), *_LINE_ENDS], np.uint8)
    doubled = np.append(False, opening[1:] == closing[:-1] + 1)
    if dialect.escape and doubled.any():
        return False
    begins = (opening == 0) | np.isin(data[opening - 1], ends)
    finishes = (closing == len(data) - 1) | np.isin(data[(closing + 1) % len(data)], ends)
    return bool(np.all(begins | doubled) and np.all(finishes | np.append(doubled[1:], False)))


def _has_blank_line(block: _Block, ends: np.ndarray) -> bool:
    """Whether a line that ends at one of ``ends`` holds nothing; pyarrow takes it for a row."""
    sizes = np.diff(ends, prepend=-1)
    before = block.numbers[ends - 1]
    return bool(np.any((sizes == 1) | ((sizes == 2) & (before == ord("\r")))))


def _is_glued(row: tuple[bytes, ...], delimiter: str) -> bool:
    if not any(b"\n" in field for field in row):
        return False
    fields: list[str | None] = [field.decode("utf-8", "replace") for field in row]
    return isinstance(check_row(fields, len(fields), delimiter), BadRow)
