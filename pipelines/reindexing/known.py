"""What is known already: keys of the documents of a version, and where there are vectors of texts.

One task reads one part of a store's version, or the finished chunks of an unfinished night, and
writes ``known/NAME.keys`` with a segment for each partition of texts: a document of the corpus
and the same document in the store meet in one partition. Only ids and digests travel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.embedding.scan import digest_matrix, partition_of, split_by
from pipelines.embedding.segments import read_segment, write_segments
from pipelines.embedding.stages import Receipt, run_stage
from pipelines.embedding.vectors import read_vectors
from pipelines.reindexing.night_work import Leftover
from pipelines.storage import in_threads, join
from pipelines.store import FragmentRef, Version, read_fragment

STAGE = "known"
KEYS = pa.schema(
    [
        ("text_sha256", pa.binary(32)),
        ("id", pa.large_string()),
        ("kept", pa.binary(16)),
        ("base", pa.bool_()),
        ("version", pa.int64()),
        ("work", pa.large_string()),
        ("chunk", pa.large_string()),
        ("row", pa.int64()),
    ]
)
"""A document of the version before (``base``), or the place of a text's vector, or both.

``version`` and ``id`` are where the vector is in the store, null where it must not be used;
``work``, ``chunk`` and ``row`` where it is in the work of another night. ``kept`` is a digest of
the kept columns.
"""


@dataclass(frozen=True)
class KnownSettings:
    """What every task has to know beside its part."""

    work: str
    partitions: int
    kept: tuple[str, ...]

    def path(self, name: str) -> str:
        """The file of one task."""
        return join(self.work, STAGE, f"{name}.keys")


def collect_known(
    settings: KnownSettings,
    base: Version | None,
    others: Sequence[Version],
    leftovers: Sequence[Leftover],
    *,
    same_encoder: bool,
) -> list[str]:
    """Write the keys of all that is known; names of the files.

    Args:
        settings: as every task needs them.
        base: the version that the corpus is compared with, if any.
        others: versions that only vectors are taken from.
        leftovers: unfinished nights of the same encoder.
        same_encoder: whether vectors of ``base`` may be used.
    """
    units: dict[str, Any] = {}
    compared = [] if base is None else [(base, same_encoder)]
    for version, usable in [*compared, *((other, True) for other in others)]:
        for ref in version.fragments():
            units[f"version-{version.number}-{ref.fragment:06d}"] = {
                "ref": asdict(ref),
                "version": version.number if usable else None,
                "base": version is base,
            }
    for number, leftover in enumerate(leftovers):
        for partition, chunks in leftover.chunks.items():
            units[f"work-{number}-{partition}"] = {"work": leftover.work, "chunks": chunks}
    run_stage(settings.work, STAGE, units, _WriteKeys(settings))
    return list(units)


def read_known(settings: KnownSettings, names: Sequence[str], partition: int) -> pa.Table:
    """All keys of one partition, those of the base first."""
    tables = in_threads(lambda name: read_segment(settings.path(name), partition), list(names))
    return pa.concat_tables([KEYS.empty_table(), *(t for t in tables if t is not None)])


def digest_rows(columns: Sequence[pa.ChunkedArray], rows: int) -> pa.Array:
    """A digest of each row of some columns."""
    if not columns:
        return pa.array([b"\0" * 16] * rows, pa.binary(16))
    values = zip(*(column.to_pylist() for column in columns), strict=True)
    return pa.array(
        [
            hashlib.blake2b(json.dumps(row, default=str).encode(), digest_size=16).digest()
            for row in values
        ],
        pa.binary(16),
    )


@dataclass(frozen=True)
class _WriteKeys:
    settings: KnownSettings

    def __call__(self, name: str, unit: dict[str, Any]) -> Receipt:
        found = _keys_of_work(name, unit) if "work" in unit else self._keys_of_store(unit)
        table = pa.concat_tables([KEYS.empty_table(), *found]).combine_chunks()
        partition = partition_of(digest_matrix(table["text_sha256"]), self.settings.partitions)
        write_segments(
            self.settings.path(name), split_by(table, partition, self.settings.partitions)
        )
        return {"rows": len(table)}

    def _keys_of_store(self, unit: dict[str, Any]) -> Iterator[pa.Table]:
        kept = self.settings.kept if unit["base"] else ()
        for batch in read_fragment(FragmentRef(**unit["ref"]), ["id", "text_sha256", *kept]):
            rows = batch.num_rows
            digests = [bytes.fromhex(value) for value in batch.column("text_sha256").to_pylist()]
            columns = [pa.chunked_array([batch.column(column)]) for column in kept]
            yield pa.table(
                {
                    "text_sha256": pa.array(digests, pa.binary(32)),
                    "id": batch.column("id").cast(pa.large_string()),
                    "kept": digest_rows(columns, rows) if kept else _nulls(rows, pa.binary(16)),
                    "base": pa.array([unit["base"]] * rows),
                    "version": pa.array([unit["version"]] * rows, pa.int64()),
                    "work": _nulls(rows, pa.large_string()),
                    "chunk": _nulls(rows, pa.large_string()),
                    "row": _nulls(rows, pa.int64()),
                },
                schema=KEYS,
            )


def _keys_of_work(name: str, unit: dict[str, Any]) -> Iterator[pa.Table]:
    partition = name.rsplit("-", 1)[1]
    for number in unit["chunks"]:
        chunk = f"{partition}-{number:05d}"
        texts = read_segment(join(unit["work"], "texts", f"{partition}.texts"), number)
        vectors, _ = read_vectors(unit["work"], chunk)
        if texts is None:
            continue
        rows = np.flatnonzero(vectors.is_valid().to_numpy(zero_copy_only=False))
        count = len(rows)
        yield pa.table(
            {
                "text_sha256": texts["text_sha256"].take(pa.array(rows)),
                "id": _nulls(count, pa.large_string()),
                "kept": _nulls(count, pa.binary(16)),
                "base": pa.array([False] * count, pa.bool_()),
                "version": _nulls(count, pa.int64()),
                "work": pa.array([unit["work"]] * count, pa.large_string()),
                "chunk": pa.array([chunk] * count, pa.large_string()),
                "row": pa.array(rows, pa.int64()),
            },
            schema=KEYS,
        )


def _nulls(count: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(count, kind)
