"""Vectors of known texts: copied from where they are instead of being computed again.

In: the chunks of known texts, whose segments in ``texts/`` say where each vector is. Out:
``vectors/CHUNK.arrow``, as the encoder actors write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.embedding.dedup import Chunk
from pipelines.embedding.segments import read_segment
from pipelines.embedding.stages import Receipt, run_stage
from pipelines.embedding.vectors import read_vectors, write_vectors
from pipelines.storage import join, make_folder
from pipelines.store import Store

_NO_WORK = {"tokens": 0, "padded_tokens": 0, "failed": 0}


@dataclass(frozen=True)
class ReuseSettings:
    """What every task has to know beside its chunk."""

    work: str
    store: str
    dimension: int
    float16: bool


def copy_known_vectors(settings: ReuseSettings, chunks: Sequence[Chunk]) -> int:
    """Write the vectors of all chunks of known texts; the number of texts."""
    known = [chunk for chunk in chunks if chunk.known]
    make_folder(join(settings.work, "vectors"))
    units = {chunk.name: [chunk.partition, chunk.number] for chunk in known}
    if units:
        run_stage(settings.work, "reuse", units, _CopyVectors(settings))
    return sum(chunk.texts for chunk in known)


@dataclass(frozen=True)
class _CopyVectors:
    settings: ReuseSettings

    def __call__(self, name: str, unit: list[Any]) -> Receipt:
        partition, number = unit
        places = read_segment(join(self.settings.work, "texts", f"{partition}.texts"), number)
        if places is None:
            raise RuntimeError(f"there is no chunk {name}")
        kind = np.float16 if self.settings.float16 else np.float32
        vectors = np.zeros((len(places), self.settings.dimension), dtype=kind)
        found = np.zeros(len(places), dtype=bool)
        for rows, some in (*self._from_store(places), *_from_work(places)):
            vectors[rows] = some
            found[rows] = True
        if not found.all():
            raise RuntimeError(f"{int((~found).sum())} vectors of {name} are no longer there")
        write_vectors(self.settings.work, name, vectors, found, _NO_WORK)
        return {"texts": len(places)}

    def _from_store(self, places: pa.Table) -> list[tuple[np.ndarray, np.ndarray]]:
        results = []
        for number in pc.unique(places["version"]).drop_null().to_pylist():
            rows = np.flatnonzero(pc.fill_null(pc.equal(places["version"], number), False))
            wanted = places.take(pa.array(rows))
            version = Store.open(self.settings.store).version(number)
            ids = wanted["id"].cast(version.schema.field("id").type)
            there = version.take(ids.to_pylist(), ["id", "text_sha256", "embedding"])
            order = pc.index_in(ids, value_set=there["id"].combine_chunks())
            there = there.take(order.combine_chunks())
            hashes = [digest.hex() for digest in wanted["text_sha256"].to_pylist()]
            if there["text_sha256"].to_pylist() != hashes:
                raise RuntimeError(f"version {number} has other texts than its keys said")
            results.append((rows, _matrix(there["embedding"].combine_chunks())))
        return results


def _from_work(places: pa.Table) -> list[tuple[np.ndarray, np.ndarray]]:
    results = []
    pairs = places.select(["work", "chunk"]).group_by(["work", "chunk"]).aggregate([])
    for work, chunk in zip(pairs["work"].to_pylist(), pairs["chunk"].to_pylist(), strict=True):
        if work is None:
            continue
        same = pc.and_(pc.equal(places["work"], work), pc.equal(places["chunk"], chunk))
        rows = np.flatnonzero(pc.fill_null(same, False))
        vectors, _ = read_vectors(work, chunk)
        results.append((rows, _matrix(vectors.take(places["row"].take(pa.array(rows))))))
    return results


def _matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
