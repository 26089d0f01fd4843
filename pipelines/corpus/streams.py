"""The bytes of text files: uncompressed, as UTF-8, and line by line.

In: an address of a text file, how it is compressed and encoded. Out: a stream or its lines. What
cannot be decompressed any further raises ``OSError``.
"""

from __future__ import annotations

import bisect
import bz2
import codecs
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import zstandard

from pipelines.runtime.files import open_filesystem

LONGEST_LINE_BYTES = 64 << 20
HEAD_BYTES = 1 << 20
BLOCK_BYTES = 1 << 20
UTF_8 = "utf-8"
_PACKED_BYTES = 1 << 16  # little, since it may unpack to a thousand times as much
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes
_BYTE_ORDER_MARKS = {  # the longer first: that of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PACKINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
_FEWEST_BAD_LINES = 5
_BAD_SHARE = 0.05
"""Of lines: where fewer are not UTF-8, each is rejected alone."""
_NOT_ASCII = re.compile(rb"[\x80-\xff]")


@contextmanager
def open_stream(
    path: str, compression: str | None, encoding: str = UTF_8, start: int = 0
) -> Iterator[Any]:
    """A text file's bytes as UTF-8; of an uncompressed UTF-8 file from the byte ``start`` on."""
    filesystem, inner = open_filesystem(path)
    codec = "lz4" if compression == "lz4" else None
    if not compression and encoding == UTF_8:
        stream = filesystem.open_input_file(inner)
        stream.seek(start)
    else:
        stream = filesystem.open_input_stream(inner, compression=codec)
    with stream:
        unpacked: Any = stream
        if compression in _UNPACKED:
            unpacked = io.BufferedReader(_UNPACKED[compression](stream), BLOCK_BYTES)
        if encoding != UTF_8:
            source = unpacked if codec or unpacked is stream else pa.PythonFile(unpacked, "r")
            unpacked = pa.transcoding_input_stream(source, encoding, UTF_8)
        yield unpacked


class _Unpacked(io.RawIOBase):
    """Uncompressed content of a stream of one or more compressed pieces, one behind the other.

    pyarrow's own streams lose what they have just unpacked where the next bytes are cut off.
    """

    errors: tuple[type[Exception], ...] = ()

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._piece: Any = None
        self._rest = b""
        self._content = memoryview(b"")
        self._more = False
        """Whether the last step may have more to give without more to read."""
        self._at_a_time = min(self.begins_with, _PACKED_BYTES)

    def _unpack(self, data: bytes) -> bytes:
        """A step: at most a block of what ``data`` and all before it unpack to."""
        return bytes(self._piece.decompress(data, BLOCK_BYTES))

    def _new_piece(self) -> Any:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as one step gives; ``OSError`` where the content is cut off."""
        while not self._content:
            data = self._rest or (b"" if self._more else self._packed.read(self._at_a_time))
            if not data and not self._more:
                if self._piece is not None:
                    raise OSError("Truncated compressed stream")
                return 0
            self._rest = b""
            try:
                self._piece = self._piece or self._new_piece()
                content = self._unpack(data)
            except self.errors as error:
                raise OSError(str(error)) from error
            self._content, self._more = memoryview(content), len(content) == BLOCK_BYTES
            if self._piece.eof:
                self._rest = self._piece.unused_data.lstrip(b"\0" if self.pads else b"")
                self._piece, self._more = None, False
        size = min(len(self._content), len(buffer))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    pads = False
    """Whether zero bytes may stand behind a piece."""
    begins_with = _PACKED_BYTES
    """Bytes of the first step."""


class _Gzip(_Unpacked):
    errors = (zlib.error,)
    pads = True

    def _new_piece(self) -> Any:
        return zlib.decompressobj(zlib.MAX_WBITS | 16)

    def _unpack(self, data: bytes) -> bytes:
        content = super()._unpack(data)
        self._rest = self._piece.unconsumed_tail
        return content


class _Bz2(_Unpacked):
    def _new_piece(self) -> Any:
        return bz2.BZ2Decompressor()


class _Xz(_Unpacked):
    errors = (lzma.LZMAError,)
    pads = True

    def _new_piece(self) -> Any:
        return lzma.LZMADecompressor()


class _Zstd(_Unpacked):
    """pyarrow's own refuses the windows that ``zstd --long`` writes."""

    errors = (zstandard.ZstdError,)
    begins_with = 256

    def _new_piece(self) -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

    def _unpack(self, data: bytes) -> bytes:
        """All of it, as nothing limits it; so less is read next where it was much."""
        content = bytes(self._piece.decompress(data))
        size = self._at_a_time // 4 if len(content) > BLOCK_BYTES else 4 * self._at_a_time
        self._at_a_time = min(max(size, 64), _PACKED_BYTES)
        return content


_UNPACKED: dict[str | None, type[_Unpacked]] = {
    "gzip": _Gzip,
    "bz2": _Bz2,
    "xz": _Xz,
    "zstd": _Zstd,
}


def read_head(path: str, compression: str | None, encoding: str = UTF_8) -> bytes:
    """The first MiB of a text file as UTF-8, uncompressed, or more to hold one whole line."""
    with open_stream(path, compression, encoding) as stream:
        head = b""
        while len(head) < LONGEST_LINE_BYTES:
            block = _read_fully(stream, HEAD_BYTES)
            head += block
            if len(block) < HEAD_BYTES or b"\n" in head or b"\r" in head:
                return head
        return head


def _read_fully(stream: Any, size: int) -> bytes:
    parts = []
    while size and (block := stream.read(size)):
        parts.append(bytes(block))
        size -= len(block)
    return b"".join(parts)


def encoding_by_mark(head: bytes) -> str:
    """The encoding that a byte order mark tells; UTF-8 without one."""
    return next((n for mark, n in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), UTF_8)


def packing_problem(path: str, compression: str) -> str | None:
    """How a file that cannot be unpacked is not packed as its name says; None where it is."""
    try:
        with open_stream(path, None) as stream:
            begin = stream.read(8)
    except OSError:  # which is why it could not be unpacked
        return None
    found = _packing_of(begin)
    if found == compression or (compression == "zstd" and not found):  # may begin with any frame
        return None
    how = f"packed with {found}" if found else "not packed"
    return f"it is {how}, and its name says {compression}: rename it"


def _packing_of(begin: bytes) -> str | None:
    return next((name for mark, name in _PACKINGS.items() if begin.startswith(mark)), None)


def encoding_problem(head: bytes) -> str | None:
    """Why the beginning of a file is not UTF-8 text, where it is plainly something else."""
    if packing := _packing_of(head):
        return f"what it holds is packed with {packing}: unpack it, or let its name say so"
    even, odd = head[:4096:2].count(0), head[1:4096:2].count(0)
    if bool(even) != bool(odd) and even + odd > max(8, len(head[:4096]) // 3):
        return (
            "every other byte is zero: it is UTF-16 without a byte order mark; convert it: "
            "iconv -f UTF-16LE -t UTF-8"
        )
    bad = good = 0
    lines = head.split(b"\n")[:-1] or [head]
    for line in lines:
        if not _NOT_ASCII.search(line):
            continue
        try:
            line.decode()
            good += 1
        except UnicodeDecodeError:
            bad += 1
    if bad > max(_FEWEST_BAD_LINES, 2 * good, _BAD_SHARE * len(lines)):
        return (
            f"{bad} of its first lines are not UTF-8: it is in another encoding, such as "
            "Windows-1252; convert it: iconv -f WINDOWS-1252 -t UTF-8"
        )
    return None


def line_end(head: bytes) -> str:
    """What ends the lines: a carriage return alone where there is no newline, else a newline."""
    return "\r" if b"\r" in head.rstrip(b"\r\n") and b"\n" not in head else "\n"


def split_lines(
    path: str,
    compression: str | None,
    *,
    encoding: str = UTF_8,
    newline: str = "\n",
    start: int = 0,
    stop: int | None = None,
) -> Iterator[bytes | None]:
    """Lines without their ends, None for one that is too long.

    Of an uncompressed UTF-8 file only those that begin in the bytes [start, stop).
    """
    ranged = not compression and encoding == UTF_8
    begin = max(0, start - 1) if ranged else 0
    with open_stream(path, compression, encoding, begin) as stream:
        position, is_within = begin, bool(ranged and start)  # a line that another shard has
        for lines, size in _lines_of(stream, newline.encode()):
            if position == 0 and lines[0] is not None:
                lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
            if ranged:
                sizes = [size, *(len(line or b"") + 1 for line in lines[1:])]
                begins = list(itertools.accumulate(sizes, initial=position))
                position = begins.pop()
                if stop is not None and begins[-1] >= stop:
                    lines = lines[: bisect.bisect_left(begins, stop)]
            else:
                position += size
            if is_within:
                lines, is_within = lines[1:], False
            yield from [line and line.removesuffix(b"\r") for line in lines]
            if ranged and stop is not None and position >= stop:
                return


def _lines_of(stream: Any, end: bytes) -> Iterator[tuple[list[bytes | None], int]]:
    """Lines without their newlines, those that end in one block, and the size of the first with it.

    The first can be None, too long; no other can, since a block is no longer than a line may be.
    """
    parts: list[bytes] = []
    size = 0
    read = getattr(stream, "read1", stream.read)  # as much as comes in one go
    while block := read(BLOCK_BYTES):
        lines: list[bytes | None] = block.split(end)
        size += len(lines[0] or b"")
        if size <= LONGEST_LINE_BYTES:
            parts.append(lines[0] or b"")
        else:
            parts = []
        if len(lines) > 1:
            last = lines.pop() or b""
            lines[0] = None if size >= LONGEST_LINE_BYTES else b"".join(parts)
            yield lines, size + 1
            parts, size = [last], len(last)
    if size:
        yield [None if size > LONGEST_LINE_BYTES else b"".join(parts)], size
