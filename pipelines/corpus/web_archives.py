"""WET files of Common Crawl: the text of web pages, a record a document.

In: a WET file. Out: of each ``conversion`` record its ``text``, its address (``id``), ``language``
(the languages that the crawl found, comma-separated) and ``date``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from pipelines.corpus.files import CorpusFile
from pipelines.corpus.streams import BLOCK_BYTES, LONGEST_LINE_BYTES, open_stream

COLUMNS = ("id", "text", "language", "date")
_LONGEST_HEADER_BYTES = 1 << 16


def read_archive(file: CorpusFile) -> Iterator[dict[str, Any]]:
    """The documents of a file in order, each a value of every one of :data:`COLUMNS`.

    ``text`` is bytes, None where it is too long. Raises ``OSError`` where the file is cut off or
    is no archive.
    """
    # A library for it would be better, but fastwarc 2.0.1 panics on streams that cannot seek.
    with open_stream(file.path, file.compression) as raw:
        stream = io.BufferedReader(raw, BLOCK_BYTES)
        while headers := _read_headers(stream):
            said = headers.get("content-length", "")
            if not said.isdigit():
                raise OSError(f"a record's Content-Length is {said[:40]!r}, not a number of bytes")
            length = int(said)
            too_long = length > LONGEST_LINE_BYTES
            text = None if too_long else stream.read(length)
            size = _skip(stream, length) if text is None else len(text)
            if size < length:
                raise OSError(f"its last record is cut off: {size} of {length} bytes")
            if headers.get("warc-type") == "conversion":
                yield {
                    "id": headers.get("warc-target-uri"),
                    "text": text,
                    "language": headers.get("warc-identified-content-language"),
                    "date": headers.get("warc-date"),
                }


def _read_headers(stream: io.BufferedReader) -> dict[str, str]:
    """The next record's headers by their names in lower case; none at the end of the file."""
    line = b"\n"
    while line in (b"\n", b"\r\n"):
        line = stream.readline(_LONGEST_HEADER_BYTES)
    if not line:
        return {}
    if not line.startswith(b"WARC/"):
        raise OSError(f"it is no WET file: a record begins with {line[:40]!r}")
    headers = {"version": line.decode("utf-8", "replace").strip()}
    while (line := stream.readline(_LONGEST_HEADER_BYTES)).strip():
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers[name.strip().lower()] = value.strip().strip("<>")
    if not line:
        raise OSError("the headers of its last record are cut off")
    return headers


def _skip(stream: io.BufferedReader, size: int) -> int:
    done = 0
    while done < size and (block := stream.read(min(BLOCK_BYTES, size - done))):
        done += len(block)
    return done
