"""Rows of CSV and TSV in any of the dialects of :mod:`pipelines.corpus.dialects`, one by one.

In: lines and their dialect. Out: each row's fields, or why it has none and how many lines it took.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.corpus.files import Dialect
from pipelines.corpus.streams import LONGEST_LINE_BYTES

QUOTE = '"'
BACKSLASH = "\\"
NOT_CLOSED = "a quotation mark is not closed"
_FEWEST_GLUED = {2: 8}
_COPY_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}


class _Patterns(NamedTuple):
    """What fields of one dialect consist of, where it has an escape."""

    up_to_quote: re.Pattern[str]
    """The rest of a quoted field."""
    in_quotes: re.Pattern[str]
    """What the escape stands before there; elsewhere it is itself."""
    field: re.Pattern[str]
    """A field that is not quoted, with the delimiter behind it."""
    escaped: re.Pattern[str]
    """What the escape stands before in such a field."""


@functools.cache
def _patterns_of(delimiter: str, quote: str, escape: str) -> _Patterns:
    delimiter, quote, escape = map(re.escape, (delimiter, quote, escape))
    return _Patterns(
        re.compile(f"(?:[^{quote}{escape}]|{escape}.)*{quote}", re.DOTALL),
        re.compile(rf"{escape}([{quote}{escape}]|\r?\n)"),
        re.compile(f"((?:[^{delimiter}{escape}]|{escape}.)*){delimiter}?", re.DOTALL),
        re.compile(f"{escape}(.)", re.DOTALL),
    )


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be parsed, and how many lines it may have swallowed."""

    line: int
    problem: str
    lines: int = 1


Fields = list[str | None]
Row = Fields | BadRow


def check_row(row: Row, width: int, delimiter: str) -> Row:
    """The row, or what is wrong with it where the header has ``width`` columns."""
    if isinstance(row, BadRow):
        return row
    if glued := _glued_lines(row, width, delimiter):
        return BadRow(
            0,
            f"a quoted field over {glued} lines that look like rows: is {QUOTE} no quotation mark "
            "here? --csv-quote none reads it as text",
            glued,
        )
    if len(row) != width:
        lines = 1 + sum(field.count("\n") for field in row if field)
        over = f" over {lines} lines" if lines > 1 else ""
        problem = f"row{over} has {len(row)} fields, the header has {width}"
        return BadRow(0, problem if row and row != [""] else "blank line", lines)
    return row


def parse_rows(lines: Iterable[str], dialect: Dialect) -> Iterator[Row]:
    """Rows of text, the header's among them."""
    csv.field_size_limit(LONGEST_LINE_BYTES)
    if not dialect.quote:
        return _unquoted_rows(lines, dialect)
    if dialect.escape:
        return _escaped_rows(lines, dialect)
    return _doubled_rows(lines, dialect)


def _doubled_rows(lines: Iterable[str], dialect: Dialect) -> Iterator[Row]:
    rows = csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote, strict=True)
    while True:
        line = rows.line_num
        try:
            row = next(rows, None)
        except csv.Error as error:
            swallowed = rows.line_num - line
            over = f" over {swallowed} lines" if swallowed > 1 else ""
            yield BadRow(line + 1, f"malformed CSV row{over}: {error}", max(1, swallowed))
            continue
        if row is None:
            return
        yield row  # type: ignore[misc]


def _escaped_rows(lines: Iterable[str], dialect: Dialect) -> Iterator[Row]:
    r"""Rows whose quoted fields hold ``\"`` and ``\\``; elsewhere the escape is itself."""
    quote, delimiter, null = dialect.quote, dialect.delimiter, f"{dialect.escape}N"
    patterns = _patterns_of(*dialect[:3])
    numbered = enumerate(lines, 1)
    for first, line in numbered:
        number, row, problem = first, [], None
        if quote not in line:
            fields = without_line_end(line).split(delimiter)
            yield [None if field == null else field for field in fields]
            continue
        place = 0
        while problem is None and place <= len(line):
            if not line.startswith(quote, place):
                stop = line.find(delimiter, place)
                field = line[place:stop] if stop >= 0 else without_line_end(line[place:])
                row.append(None if field == null else field)
                place = stop + 1 if stop >= 0 else len(line) + 1
                continue
            parts, size, place = [], 0, place + 1
            while not (closed := patterns.up_to_quote.match(line, place)):
                parts.append(line[place:])
                size += len(parts[-1])
                number, line = next(numbered, (number, ""))
                place = 0
                if not line or size > LONGEST_LINE_BYTES:
                    problem = NOT_CLOSED if not line else "a field is longer than 64 MiB"
                    break
            else:
                parts.append(line[place : closed.end() - 1])
                row.append(patterns.in_quotes.sub(r"\1", "".join(parts)))
                rest = line[closed.end() : closed.end() + 1]
                place = closed.end() + 1
                if rest in ("", "\r", "\n"):
                    break
                if rest != delimiter:
                    problem = f"{rest!r} after a closing quotation mark"
        lines_read = number - first + 1
        over = f" over {lines_read} lines" if lines_read > 1 else ""
        yield BadRow(first, f"malformed CSV row{over}: {problem}", lines_read) if problem else row


def _unquoted_rows(lines: Iterable[str], dialect: Dialect) -> Iterator[Row]:
    delimiter, escape = dialect.delimiter, dialect.escape
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        if len(line) > LONGEST_LINE_BYTES:
            yield BadRow(number, f"line longer than {LONGEST_LINE_BYTES >> 20} MiB")
        elif not escape or escape not in line:
            yield [*without_line_end(line).split(delimiter)]
        else:
            while _ends_escaped(without_line_end(line), escape) and (more := next(numbered, None)):
                line = f"{without_line_end(line)}\n{more[1]}"
            text = without_line_end(line)
            if text != "\\.":  # PostgreSQL's end of data
                yield [_copied(field, dialect) for field in _split_escaped(text, dialect)]


def _split_escaped(text: str, dialect: Dialect) -> Iterator[str]:
    split, place = _patterns_of(*dialect[:3]).field, 0
    while place <= len(text):
        field = split.match(text, place)
        if field is None or (field.end() == place and place < len(text)):  # a last lone escape
            yield text[place:]
            return
        yield field[1]
        if field.end() == len(text):
            if field.end() > field.end(1):
                yield ""
            return
        place = field.end()


def _ends_escaped(text: str, escape: str) -> bool:
    return (len(text) - len(text.rstrip(escape))) % 2 == 1


def _copied(field: str, dialect: Dialect) -> str | None:
    if field == f"{dialect.escape}N":
        return None
    meant = _COPY_ESCAPES if dialect.escape == BACKSLASH else {}
    return _patterns_of(*dialect[:3]).escaped.sub(
        lambda found: meant.get(found[1], found[1]), field
    )


def without_line_end(line: str) -> str:
    """A line without what ends it."""
    return line.removesuffix("\n").removesuffix("\r")


def _glued_lines(row: Fields, width: int, delimiter: str) -> int:
    """Over how many lines a field runs, where those within look like rows of their own."""
    for field in row:
        if field is None or "\n" not in field or width < 2:
            continue
        inner = field.split("\n")[1:-1]
        if len(inner) < _FEWEST_GLUED.get(width, 3):
            continue
        cells = [line.split(delimiter) for line in inner]
        numbered = (row[0] or "").isdigit()
        if all(len(some) == width and some[0].isdigit() == numbered for some in cells):
            return len(inner) + 2
    return 0
