"""A corpus as files: find them, look into each, check their columns, cut them into scan shards.

In: a path (file, folder or glob, local or remote) and the columns wanted. Out: a list of
:class:`CorpusFile`, each with the shards in which :mod:`pipelines.corpus.readers` reads it. A
file that cannot be looked into is kept with its ``problem``, so that one bad file hides no other.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    in_threads,
    match_files,
    open_filesystem,
    with_inner_path,
    with_retries,
)

Format = Literal["parquet", "jsonl", "csv", "tsv", "text"]

FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
DEFAULT_ID_COLUMN = "id"
_HEAD_BYTES = 1 << 20
_COMPRESSED_GROWTH = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Which columns of a corpus are wanted; ``id`` None takes ``id`` where a file has it."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()

    def id_of(self, file: CorpusFile) -> str | None:
        """The id column of one file, or None where its ids are content hashes."""
        if self.id is None:
            return DEFAULT_ID_COLUMN if DEFAULT_ID_COLUMN in file.columns else None
        return self.id


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus: where it is, which state of it, and what is in it.

    ``text_bytes`` estimates the uncompressed size; ``rows`` is None where only reading tells;
    ``bounds`` cut the file into shards: row groups of Parquet, bytes of lines, else (0, 1).
    """

    path: str
    size_bytes: int
    modified_ns: int
    format: Format
    compression: str | None
    columns: tuple[str, ...] = ()
    text_bytes: int = 0
    rows: int | None = None
    bounds: tuple[int, ...] = (0, 1)
    problem: str | None = None

    def shards(self) -> list[Shard]:
        """The file's pieces, in order."""
        cuts = zip(self.bounds, self.bounds[1:], strict=False)
        return [] if self.problem else [Shard(self, start, stop) for start, stop in cuts]


@dataclass(frozen=True)
class Shard:
    """A piece of one file that one task reads: [start, stop) in the unit of its ``bounds``."""

    file: CorpusFile
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Names the piece and the state of its file, so that a changed file is read anew."""
        file = self.file
        key = json.dumps([file.path, file.size_bytes, file.modified_ns, self.start, self.stop])
        return hashlib.sha256(key.encode()).hexdigest()[:20]


def find_files(corpus: str) -> list[CorpusFile]:
    """Every file of a corpus in the order of their paths, not yet looked into.

    Raises :class:`InputError` where there is no such path or no file of a known format.
    """
    files = match_files(corpus)
    known = [info for info in files if known_format(info.path)]
    if not known:
        raise InputError(f"no file of a known format at {corpus}. {_formats_known()}")
    if len(known) < len(files):
        other = next(i.path for i in files if known_format(i.path) is None)
        log.warning("not read: %d files of unknown format, %s", len(files) - len(known), other)
    return [_corpus_file(corpus, i) for i in known]


def known_format(path: str) -> tuple[Format, str | None] | None:
    """Format and compression that a file's name tells, or None."""
    name = path.rpartition("/")[2].lower()
    stem, dot, suffix = name.rpartition(".")
    compression = COMPRESSIONS.get(dot + suffix)
    if compression:
        stem, dot, suffix = stem.rpartition(".")
    found = FORMATS.get(dot + suffix)
    return None if found is None or (compression and found == "parquet") else (found, compression)


def inspect_files(
    files: Sequence[CorpusFile], columns: Columns, *, shard_bytes: int
) -> list[CorpusFile]:
    """Look into every file: its columns, size and shards of about ``shard_bytes``.

    Raises :class:`InputError` where a readable file lacks a wanted column.
    """
    seen = in_threads(lambda file: inspect_file(file, columns, shard_bytes), list(files))
    for file in seen:
        if not file.problem:
            check_columns(file, columns)
    return seen


def inspect_file(file: CorpusFile, columns: Columns, shard_bytes: int) -> CorpusFile:
    """One file looked into; where that fails its ``problem`` says why."""
    if not file.size_bytes:
        return replace(file, problem="the file is empty")
    try:
        if file.format == "parquet":
            return with_retries(lambda: _inspect_parquet(file, columns, shard_bytes), file.path)
        head = with_retries(lambda: _read_head(file), file.path)
    except (OSError, pa.ArrowException) as error:
        return replace(file, problem=describe_problem(error))
    growth = _COMPRESSED_GROWTH if file.compression else 1
    seen = replace(file, text_bytes=file.size_bytes * growth)
    if file.format in DELIMITERS:
        text = io.StringIO(head.decode("utf-8-sig", errors="replace"), newline="")
        header = next(csv.reader(text, delimiter=DELIMITERS[file.format]), [])
        return replace(seen, columns=tuple(header))
    names = (columns.text,) if file.format == "text" else tuple(_json_keys(head))
    if file.compression:
        return replace(seen, columns=names)
    starts = range(0, max(1, file.size_bytes - shard_bytes // 2), shard_bytes)
    return replace(seen, columns=names, bounds=(*starts, file.size_bytes))


def check_columns(file: CorpusFile, columns: Columns) -> None:
    """Raise :class:`InputError` where ``file`` lacks a wanted column, naming those it has."""
    if not file.columns and file.format == "jsonl":
        return
    wanted = [("text", columns.text), *(("kept", name) for name in columns.keep)]
    if columns.id is not None:
        wanted.insert(1, ("id", columns.id))
    for role, name in wanted:
        if name not in file.columns:
            raise InputError(
                f"{file.path} has no {role} column {name!r}; its columns are "
                f"{', '.join(file.columns)}"
            )


def describe_problem(error: BaseException) -> str:
    """An error from reading a file as the end of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"it cannot be read: {lines[0][:300]}"


def _inspect_parquet(file: CorpusFile, columns: Columns, shard_bytes: int) -> CorpusFile:
    filesystem, inner = open_filesystem(file.path)
    with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
    wanted = {columns.text, *columns.keep}
    bounds, pending, total = [0], 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = (group.column(c) for c in range(group.num_columns))
        size = sum(
            c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted
        )
        if pending and pending + size > shard_bytes:
            bounds.append(index)
            pending = 0
        pending += size
        total += size
    bounds.append(metadata.num_row_groups)
    return replace(
        file,
        columns=tuple(schema.names),
        text_bytes=total,
        rows=metadata.num_rows,
        bounds=tuple(bounds),
    )


def _read_head(file: CorpusFile) -> bytes:
    filesystem, inner = open_filesystem(file.path)
    with filesystem.open_input_stream(inner, compression=file.compression) as stream:
        return stream.read(_HEAD_BYTES)


def _json_keys(head: bytes) -> dict[str, None]:
    """Keys of the objects in the first lines, in their order; lines that are none are left."""
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    keys: dict[str, None] = {}
    for line in lines[:-1] if len(head) == _HEAD_BYTES and len(lines) > 1 else lines:
        keys.update(dict.fromkeys(_object_keys(line)))
    return keys


def _object_keys(line: bytes) -> Iterator[str]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return iter(())
    return iter(value if isinstance(value, dict) else ())


def _corpus_file(corpus: str, info: pafs.FileInfo) -> CorpusFile:
    known = known_format(info.path)
    assert known is not None
    path = with_inner_path(corpus, info.path)
    return CorpusFile(path, info.size or 0, info.mtime_ns or 0, *known)


def _formats_known() -> str:
    packed = ", ".join(COMPRESSIONS)
    return f"Known are {', '.join(FORMATS)}; all but Parquet also with {packed}"


def listing_of(files: Sequence[CorpusFile]) -> list[list[Any]]:
    """Path, size and time of change of every file: the state of a corpus."""
    return [[file.path, file.size_bytes, file.modified_ns] for file in files]


def listing_digest(listing: Sequence[Sequence[Any]]) -> str:
    """SHA-256 of a listing."""
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
