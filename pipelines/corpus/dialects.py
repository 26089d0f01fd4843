r"""Which dialect a file of CSV or TSV is in, told from its first MiB.

Four are told apart, of any delimiter: quoted with doubled marks (RFC 4180; pandas, Polars,
DuckDB, Excel), quoted with ``\"`` (Spark, MySQL), not quoted (most tab-separated dumps), and not
quoted with backslash escapes (PostgreSQL's COPY, MySQL's OUTFILE).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.corpus.delimited import (
    BACKSLASH,
    QUOTE,
    BadRow,
    check_row,
    parse_rows,
    without_line_end,
)
from pipelines.corpus.files import CorpusOptions, Dialect
from pipelines.corpus.streams import HEAD_BYTES

DELIMITERS = {"csv": ",", "tsv": "\t"}
_OTHER_DELIMITERS = ("\t", ";", "|")
_ONLY_COPY = re.compile(r"(?:[^\\]|\\[\\Ntnrbfv.])*", re.DOTALL)
_LIKELY_LINES = 200


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


def shows_another_delimiter(head: bytes, own: Dialect | None, other: Dialect) -> bool:
    """Whether the first line holds the delimiter found for the file, and not the others'."""
    first = head.decode("utf-8-sig", "replace").split("\n", 1)[0]
    return own is not None and own.delimiter in first and other.delimiter not in first


def describe_dialect(dialect: Dialect) -> str:
    """A dialect in words, for people."""
    quote = f"quoted with {dialect.quote}" if dialect.quote else "not quoted"
    escape = f", escaped with {dialect.escape}" if dialect.escape else ""
    return f"fields parted by {dialect.delimiter!r}, {quote}{escape}"


def _delimiter_of(text: str, usual: str) -> str:
    lines = [without_line_end(line) for line in io.StringIO(text[: 1 << 16]).readlines()[:50]]
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
    written = [
        part for line in io.StringIO(text) for part in without_line_end(line).split(delimiter)
    ]
    inside = sum(QUOTE in part.strip(QUOTE) and not part.startswith(QUOTE) for part in written)
    opened = sum(part.startswith(QUOTE) for part in written)
    if needed:
        return opened > 0 and (inside == 0 or opened >= inside)
    if all(part == 2 * QUOTE for part in written if QUOTE in part):
        return True
    lines = [without_line_end(line).split(delimiter) for line in io.StringIO(text)]
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
