r"""CSV and TSV, whoever wrote them: which dialect a file is in, and its rows.

Four dialects are told apart, of any delimiter: quoted with doubled marks (RFC 4180; pandas, Polars,
DuckDB, Excel), quoted with ``\"`` (Spark, MySQL), not quoted (most tab-separated dumps), and not
quoted with backslash escapes (PostgreSQL's COPY, MySQL's OUTFILE).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.corpus.files import CorpusFile, CorpusOptions, Dialect
from pipelines.corpus.streams import HEAD_BYTES, LONGEST_LINE_BYTES, open_stream

DELIMITERS = {"csv": ",", "tsv": "\t"}
QUOTE = '"'
BACKSLASH = "\\"
NOT_CLOSED = "a quotation mark is not closed"
_OTHER_DELIMITERS = ("\t", ";", "|")
_FEWEST_GLUED = {2: 8}
_COPY_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}
_COPY_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_QUOTED_ESCAPE = re.compile(r'\\(["\\]|\r?\n)')
_UP_TO_QUOTE = re.compile(r'(?:[^"\\]|\\.)*"', re.DOTALL)
_ONLY_COPY = re.compile(r"(?:[^\\]|\\[\\Ntnrbfv.])*", re.DOTALL)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be parsed, and how many lines it may have swallowed."""

    line: int
    problem: str
    lines: int = 1


Fields = list[str | None]
Row = Fields | BadRow


def read_rows(file: CorpusFile) -> Iterator[Row]:
    """The rows of a file after its header, each of as many fields as the header has."""
    dialect = file.dialect
    assert dialect is not None
    newline = "" if dialect.quote else file.newline
    with (
        open_stream(file.path, file.compression, file.encoding) as binary,
        io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline=newline) as stream,
    ):
        rows = parse_rows(stream, dialect)
        if not dialect.header:
            next(rows, None)
        width = len(file.columns)
        for row in rows:
            yield check_row(row, width, dialect.delimiter)


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
    r"""Rows whose quoted fields hold ``\"`` and ``\\``; elsewhere a backslash is itself."""
    quote, delimiter = dialect.quote, dialect.delimiter
    numbered = enumerate(lines, 1)
    for first, line in numbered:
        number, row, problem = first, [], None
        if quote not in line:
            yield [_or_null(field) for field in _bare(line).split(delimiter)]
            continue
        place = 0
        while problem is None and place <= len(line):
            if not line.startswith(quote, place):
                stop = line.find(delimiter, place)
                field = line[place:stop] if stop >= 0 else _bare(line[place:])
                row.append(_or_null(field))
                place = stop + 1 if stop >= 0 else len(line) + 1
                continue
            parts, size, place = [], 0, place + 1
            while not (closed := _UP_TO_QUOTE.match(line, place)):
                parts.append(line[place:])
                size += len(parts[-1])
                number, line = next(numbered, (number, ""))
                place = 0
                if not line or size > LONGEST_LINE_BYTES:
                    problem = NOT_CLOSED if not line else "a field is longer than 64 MiB"
                    break
            else:
                parts.append(line[place : closed.end() - 1])
                row.append(_QUOTED_ESCAPE.sub(r"\1", "".join(parts)))
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
    delimiter = dialect.delimiter
    split = re.compile(rf"((?:[^{re.escape(delimiter)}\\]|\\.)*){re.escape(delimiter)}?", re.DOTALL)
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        if len(line) > LONGEST_LINE_BYTES:
            yield BadRow(number, f"line longer than {LONGEST_LINE_BYTES >> 20} MiB")
        elif not dialect.escape or BACKSLASH not in line:
            yield [*_bare(line).split(delimiter)]
        else:
            while _ends_escaped(_bare(line)) and (more := next(numbered, None)):
                line = f"{_bare(line)}\n{more[1]}"
            text = _bare(line)
            if text != "\\.":  # PostgreSQL's end of data
                yield [_copied(field) for field in _split_escaped(split, text)]


def _split_escaped(split: re.Pattern[str], text: str) -> Iterator[str]:
    place = 0
    while place <= len(text):
        field = split.match(text, place)
        if field is None or (field.end() == place and place < len(text)):  # a last lone backslash
            yield text[place:]
            return
        yield field[1]
        if field.end() == len(text):
            if field.end() > field.end(1):
                yield ""
            return
        place = field.end()


def _ends_escaped(text: str) -> bool:
    return (len(text) - len(text.rstrip(BACKSLASH))) % 2 == 1


def _copied(field: str) -> str | None:
    if field == "\\N":
        return None
    return _COPY_ESCAPE.sub(lambda found: _COPY_ESCAPES.get(found[1], found[1]), field)


def _or_null(field: str) -> str | None:
    return None if field == "\\N" else field


def _bare(line: str) -> str:
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


# ---- which dialect


@dataclass(frozen=True)
class Sniffed:
    """The dialect of one file, and whether the file shows that it is another than usual."""

    dialect: Dialect
    sure: bool


def sniff(head: bytes, kind: str, options: CorpusOptions) -> Sniffed:
    """The dialect of a file by its first MiB, what the user says before all."""
    text = head.decode("utf-8-sig", "replace")
    whole = len(head) < HEAD_BYTES
    if not whole:
        text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1]
    delimiter = options.csv_delimiter.replace("\\t", "\t") or _delimiter_of(text, DELIMITERS[kind])
    header = tuple(options.csv_header)

    def dialect(quote: str, escape: str) -> Dialect:
        return Dialect(delimiter, quote, escape, header)

    if options.csv_quote or options.csv_escape:
        quote = "" if options.csv_quote == "none" else options.csv_quote or QUOTE
        if options.csv_escape and not options.csv_quote and delimiter == "\t":
            quote = ""
        escape = "" if options.csv_escape in ("none", quote) else options.csv_escape
        return Sniffed(dialect(quote, escape), True)
    if _is_copy(text, delimiter):
        return Sniffed(dialect("", BACKSLASH), True)
    if QUOTE not in text:
        return Sniffed(dialect("" if delimiter == "\t" else QUOTE, ""), False)
    quoted = [dialect(QUOTE, ""), *([dialect(QUOTE, BACKSLASH)] if '\\"' in text else [])]
    if delimiter == "\t" and not any(_needs_quotes(text, each, whole) for each in quoted):
        return Sniffed(dialect("", ""), True)
    usual = dialect(QUOTE, "")
    bad = _bad_lines(text, usual, whole)
    if not bad:
        return Sniffed(usual, True)
    for other in [*quoted[1:], *([dialect("", "")] if delimiter in text else [])]:
        if not _bad_lines(text, other, whole):
            return Sniffed(other, True)
    return Sniffed(usual, False)


def _delimiter_of(text: str, usual: str) -> str:
    lines = [_bare(line) for line in io.StringIO(text[: 1 << 16]).readlines()[:50]]
    if not lines or usual in lines[0]:
        return usual
    for other in _OTHER_DELIMITERS:
        count = lines[0].count(other)
        if count and all(
            line.count(other) >= count for line in lines if QUOTE not in line and line
        ):
            return other
    return usual


def _is_copy(text: str, delimiter: str) -> bool:
    r"""Whether some field is ``\N`` and every backslash is one that COPY writes."""
    if delimiter != "\t" or "\\N" not in text or not _ONLY_COPY.fullmatch(text):
        return False
    return re.search(r"(?:^|\t)\\N(?:\t|\r?$)", text, re.MULTILINE) is not None


def _needs_quotes(text: str, dialect: Dialect, whole: bool) -> bool:
    """Whether quotation marks at both ends of fields are the writer's and not the text's.

    They are where each is closed, inner ones are doubled or escaped, none stands in a field without
    them, and either some field needs them, or every field of a column has them, or only empty ones.
    Of a text that is not the ``whole`` file the last row does not count.
    """
    delimiter = dialect.delimiter
    rows = list(parse_rows(io.StringIO(text, newline=""), dialect))
    if not whole:
        rows = rows[:-1]
    if any(isinstance(row, BadRow) for row in rows) or not rows:
        return False
    width = len(rows[0]) if not isinstance(rows[0], BadRow) else 0
    if any(isinstance(check_row(row, width, delimiter), BadRow) for row in rows):
        return False
    marks = (delimiter, QUOTE, "\n", "\r")
    fields = [field for row in rows if not isinstance(row, BadRow) for field in row]
    needed = sum(any(mark in (field or "") for mark in marks) for field in fields)
    written = [part for line in io.StringIO(text) for part in _bare(line).split(delimiter)]
    inside = sum(QUOTE in part.strip(QUOTE) and not part.startswith(QUOTE) for part in written)
    opened = sum(part.startswith(QUOTE) for part in written)
    if needed:
        return opened > 0 and (inside == 0 or opened >= inside)
    if all(part == 2 * QUOTE for part in written if QUOTE in part):
        return True
    lines = [_bare(line).split(delimiter) for line in io.StringIO(text)]
    columns = zip(*(line for line in lines[1:] if len(line) == width), strict=False)
    return any(all(part.startswith(QUOTE) and len(part) > 1 for part in some) for some in columns)


def _bad_lines(text: str, dialect: Dialect, whole: bool) -> int:
    """How many lines of a sample make no row of the header's width."""
    newline = "" if dialect.quote else None
    rows: Iterator[Any] = parse_rows(io.StringIO(text, newline=newline), dialect)
    header: Any = next(rows, [])
    if isinstance(header, BadRow):
        return header.lines
    width = len(dialect.header or header)
    bad, last = 0, 0
    for row in rows:
        checked = check_row(row, width, dialect.delimiter)
        last = checked.lines if isinstance(checked, BadRow) and row != [] else 0
        bad += last
    # Where the sample is cut, its last row may be; not if it took much of the sample with it.
    return bad - last if not whole and last < _LIKELY_LINES else bad


_LIKELY_LINES = 200
