"""The second read: shards to chunks of documents that are to be encoded.

In: a group of neighbouring shards and what :mod:`pipelines.embedding.keys` settled about their
documents. Out: rows of the pipeline, each a chunk: a run of documents of about equal work with
their ids, kept columns and texts. Documents that get no vector of their own go to files below the
work folder: ``repeats/`` and ``known/`` (they take another's), ``retouched/`` and ``rejected/``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.documents import EXCERPT_CHARACTERS, rejected_table
from pipelines.corpus.files import CorpusFile, Shard
from pipelines.corpus.kept_columns import json_to_values
from pipelines.corpus.passages import Cutter
from pipelines.embedding.keys import (
    ENCODE,
    FLUSH_BYTES,
    KNOWN,
    LEAVE_OUT,
    REJECT,
    REPEAT,
    RETOUCH,
    ScanSettings,
    Settled,
    add_to_checksum,
    check_shard,
    estimate_tokens,
    fill_ids,
)
from pipelines.embedding.plan import ScanResult
from pipelines.runtime.column_types import cast_column
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import in_threads, join, make_folder, read_bytes, write_bytes
from pipelines.runtime.segments import (
    bytes_to_table,
    digest_matrix,
    partition_of,
    read_segment,
    split_by,
    table_to_bytes,
    write_segments,
)
from pipelines.runtime.units import read_receipts, take_unit

CHUNK_BYTES = 64 << 20
# Of a chunk: the first of a group, so that vectors, and with them a mistake, are seen at once.
FIRST_SHARE = 1 / 32
MOST_BUCKETS = 1024
FOLDERS = {REPEAT: "repeats", KNOWN: "known", RETOUCH: "retouched"}
STAGE = "read"


@dataclass(frozen=True)
class ReadSettings:
    """What every task of the second read has to know beside its group of shards.

    ``usual`` becomes of a document that nothing was settled about. ``json_types`` are the settled
    types of kept columns that come as JSON text, ``kept_types`` those that the result has.
    ``buckets`` gives the bucket of each shard (see :class:`Groups`), ``row_bytes`` is the size of a
    vector.
    """

    scan: ScanSettings
    usual: int
    chunk_tokens: int
    json_types: Mapping[str, pa.DataType]
    kept_types: Mapping[str, pa.DataType]
    buckets: tuple[int, ...]
    row_bytes: int


@dataclass(frozen=True)
class Groups:
    """Groups of neighbouring shards, each of which one task reads, as units by their names.

    Groups are counted off into buckets; a document that takes another's vector waits in the
    bucket of that other's group.
    """

    units: dict[str, dict[str, Any]]
    buckets: tuple[int, ...]

    def of_bucket(self, bucket: int) -> list[str]:
        """Names of the groups in a bucket."""
        numbers = {shard[0]: name for name, unit in self.units.items() for shard in unit["shards"]}
        found = (name for shard, name in numbers.items() if self.buckets[shard] == bucket)
        return list(dict.fromkeys(found))


def plan_groups(
    files: Sequence[CorpusFile], scanned: ScanResult, settled: Settled, group_bytes: int
) -> Groups:
    """Shards of which something is to be written, in groups of about ``group_bytes``."""
    shards = [shard for file in files for shard in file.shards()]
    groups: list[list[int]] = []
    size = float(group_bytes)
    for number, shard in enumerate(shards):
        if settled.busy is not None and number not in settled.busy:
            continue
        share = shard.file.text_bytes / max(1, len(shard.file.bounds) - 1)
        if size + share > group_bytes:
            groups.append([])
            size = 0.0
        groups[-1].append(number)
        size += share
    flushes: dict[int, list[str]] = {}
    for number, flush in scanned.flushes:
        flushes.setdefault(number, []).append(flush)
    buckets = [-1] * len(shards)
    count = min(MOST_BUCKETS, len(groups))
    units = {}
    for place, group in enumerate(groups):
        names = json.dumps([shards[number].name for number in group])
        name = f"{place:05d}-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
        found = [
            [n, shards[n].to_unit(), scanned.shards[n][0], scanned.shards[n][2], flushes.get(n, [])]
            for n in group
        ]
        units[name] = {"shards": found}
        for number in group:
            buckets[number] = place * count // len(groups)
    return Groups(units, tuple(buckets))


def left_to_read(work: str, groups: Groups, done: set[str]) -> dict[str, dict[str, Any]]:
    """The units of those groups that have chunks which are not ``done``."""
    for folder in (STAGE, *FOLDERS.values()):
        make_folder(join(work, folder))
    receipts = read_receipts(join(work, STAGE), groups.units)
    left = {}
    for name, unit in groups.units.items():
        chunks = receipts[name]["chunks"] if name in receipts else None
        if chunks is None or not all(chunk_name(name, number) in done for number in range(chunks)):
            mine = [int(c.rpartition("-")[2]) for c in done if c.startswith(f"{name}-")]
            left[name] = {**unit, "done": sorted(mine)}
    return left


def chunk_name(group: str, number: int) -> str:
    """The name of a group's chunk."""
    return f"{group}-{number:04d}"


def read_chunks(batch: pa.Table, *, settings: ReadSettings) -> Iterator[pa.Table]:
    """A group's name and shards to its chunks, each one row, but for those that are done.

    Raises :class:`InputError` for a file that is not what it was when its keys were read.
    """
    name, unit = take_unit(batch)
    done = set(unit["done"])
    for number, (expected, documents) in enumerate(_cut(settings, name, unit)):
        if number not in done:
            yield chunk_row(chunk_name(name, number), expected, documents)


def chunk_row(name: str, expected: int, documents: pa.Table) -> pa.Table:
    """A chunk as one row: ``name``, ``expected`` tokens, ``documents`` (a list of structs)."""
    structs = documents.combine_chunks().to_struct_array()
    structs = structs.combine_chunks() if isinstance(structs, pa.ChunkedArray) else structs
    column = pa.ListArray.from_arrays(pa.array([0, len(structs)], pa.int32()), structs)
    return pa.table({"name": [name], "expected": [expected], "documents": column})


def documents_of(chunk: pa.Table) -> pa.Table:
    """Undo :func:`chunk_row`."""
    return pa.Table.from_struct_array(chunk["documents"].combine_chunks().flatten())


def _cut(
    settings: ReadSettings, name: str, unit: Mapping[str, Any]
) -> Iterator[tuple[int, pa.Table]]:
    """Chunks of a group: estimated tokens and documents; leaves the receipt at the end."""
    aside = _Aside(settings, name)
    pending: list[pa.Table] = []
    share, current, chunks = 1 - FIRST_SHARE, 0, 0
    for documents in _documents(settings, unit, aside):
        tokens = estimate_tokens(documents["text"], settings.scan)
        size = len(documents) * settings.row_bytes + documents.nbytes
        shares = np.maximum(tokens / settings.chunk_tokens, size / len(documents) / CHUNK_BYTES)
        begins = share + np.cumsum(shares) - shares
        share += float(shares.sum())
        wanted = np.floor(begins).astype(np.int64)
        for number in np.unique(wanted):
            if pending and number != current:
                yield _joined(settings, pending)
                pending, chunks = [], chunks + 1
            current = number
            start, stop = np.searchsorted(wanted, [number, number + 1])
            pending.append(documents.slice(start, stop - start))
    if pending:
        yield _joined(settings, pending)
        chunks += 1
    aside.flush()
    receipt = json.dumps({"chunks": chunks, "aside": aside.written}).encode()
    write_bytes(settings.scan.path(STAGE, f"{name}.json"), receipt, create_folder=False)


def _joined(settings: ReadSettings, pending: list[pa.Table]) -> tuple[int, pa.Table]:
    documents = pa.concat_tables(pending).combine_chunks()
    return int(estimate_tokens(documents["text"], settings.scan).sum()), documents


def _documents(
    settings: ReadSettings, unit: Mapping[str, Any], aside: _Aside
) -> Iterator[pa.Table]:
    """The documents of a group that are to be encoded, in batches; the others go ``aside``."""
    scan = settings.scan
    for number, packed, rows, expected, flushes in unit["shards"]:
        shard = Shard.from_unit(packed)
        checker, checksum = scan.checker(known_cuts(scan, flushes) if scan.cut else None), 0
        settled = _Fates.read(settings, number)
        for _, documents, _ in check_shard(scan, shard, checker, []):
            checksum = add_to_checksum(checksum, documents)
            fates, owners = settled.of(documents["row"].to_numpy())
            for fate in np.unique(fates[(fates != ENCODE) & (fates != LEAVE_OUT)]).tolist():
                chosen = fates == fate
                some = documents.filter(pa.array(chosen))
                aside.add(fate, _finish(settings, some), some["text"], owners[chosen])
            some = documents.filter(pa.array(fates == ENCODE))
            if len(some):
                yield _finish(settings, some).append_column("text", some["text"])
        if (checker.rows, checksum) != (rows, expected):
            raise InputError(
                f"{shard.file.path} is not what it was when this run read it first: it has "
                "changed since. Leave the corpus alone while it is embedded, and choose another "
                "--output for the new one"
            )


def known_cuts(settings: ScanSettings, names: Sequence[str]) -> Cutter:
    """Cuts texts as the first read did, in its order; ``names`` are the shard's files of keys."""

    def documents() -> Iterator[np.ndarray]:
        for name in names:
            cuts = bytes_to_table(read_bytes(join(*settings.keys_place(), f"{name}.cuts")))
            places = np.stack([cuts["start"].to_numpy(), cuts["stop"].to_numpy()], axis=1)
            if len(places):
                yield from np.split(places, np.flatnonzero(cuts["first"].to_numpy())[1:])

    known = documents()
    none = np.empty((0, 2), np.int64)  # more documents than before: the checksum will tell
    return lambda texts: [next(known, none) for _ in texts]


def _finish(settings: ReadSettings, documents: pa.Table) -> pa.Table:
    """Id, text hash, and kept columns in their types, of checked documents."""
    columns: dict[str, Any] = {
        "id": fill_ids(documents),
        "text_sha256": documents["text_sha256"],
    }
    for name, kind in settings.kept_types.items():
        column = documents[f"kept.{name}"]
        if name in settings.json_types:
            column = json_to_values(column, settings.json_types[name])
        columns[f"kept.{name}"] = cast_column(column, kind)
    return pa.table(columns)


@dataclass(frozen=True)
class _Fates:
    """What was settled about a shard: int64 (n,) rows in order, int8 fates, int32 owners."""

    usual: int
    rows: np.ndarray
    fates: np.ndarray
    owners: np.ndarray

    @classmethod
    def read(cls, settings: ReadSettings, shard: int) -> _Fates:
        names = (f"{number:05d}.fates" for number in range(settings.scan.partitions))
        paths = [settings.scan.path("settled", name) for name in names]
        tables = [t for t in in_threads(lambda path: read_segment(path, shard), paths) if t]
        if not tables:
            none = np.empty(0, dtype=np.int64)
            return cls(settings.usual, none, none, none)
        table = pa.concat_tables(tables).sort_by("row")
        return cls(settings.usual, *(table[n].to_numpy() for n in ("row", "fate", "owner")))

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fates, and shards of owners, of some rows."""
        if not len(self.rows):
            return np.full(len(rows), self.usual), np.full(len(rows), -1)
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        told = self.rows[place] == rows
        return (
            np.where(told, self.fates[place], self.usual),
            np.where(told, self.owners[place], -1),
        )


@dataclass
class _Aside:
    """Documents of one group that are not encoded, written when they are many and at the end."""

    settings: ReadSettings
    name: str
    written: dict[str, list[str]] = field(default_factory=dict)
    _pending: dict[int, list[pa.Table]] = field(default_factory=dict)
    _size_bytes: int = 0
    _flushes: int = 0

    def add(
        self, fate: int, documents: pa.Table, texts: pa.ChunkedArray, owners: np.ndarray
    ) -> None:
        """Take documents with one fate; ``owners`` int32 (n,) are the shards of their owners."""
        if fate == REJECT:
            excerpts = pc.utf8_slice_codeunits(texts, 0, EXCERPT_CHARACTERS).to_pylist()
            is_cut = self.settings.scan.cut is not None
            ids = documents["kept.document_id" if is_cut else "id"].cast(pa.string()).to_pylist()
            rows = [(i, "duplicate id", e) for i, e in zip(ids, excerpts, strict=True)]
            documents = rejected_table(rows)
        elif fate == REPEAT:
            documents = documents.append_column("owner", pa.array(owners))
        self._pending.setdefault(fate, []).append(documents)
        self._size_bytes += documents.nbytes
        if self._size_bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is there."""
        name = f"{self.name}-{self._flushes:04d}"
        for fate, tables in self._pending.items():
            documents = pa.concat_tables(tables).combine_chunks()
            self._write(fate, name, documents)
        self._pending, self._size_bytes = {}, 0
        self._flushes += 1

    def _write(self, fate: int, name: str, documents: pa.Table) -> None:
        scan = self.settings.scan
        if fate == REJECT:
            path = scan.path("rejected", f"ids-{name}.arrow")
            write_bytes(path, table_to_bytes(documents), create_folder=False)
            return
        folder = FOLDERS[fate]
        self.written.setdefault(folder, []).append(name)
        path = scan.path(folder, f"{name}.arrow")
        if fate == RETOUCH:
            write_bytes(path, table_to_bytes(documents), create_folder=False)
        elif fate == REPEAT:
            bucket = np.array(self.settings.buckets)[documents["owner"].to_numpy()]
            count = max(self.settings.buckets) + 1
            write_segments(path, split_by(documents.drop_columns("owner"), bucket, count))
        else:
            partition = partition_of(digest_matrix(documents["text_sha256"]), scan.partitions)
            write_segments(path, split_by(documents, partition, scan.partitions))
