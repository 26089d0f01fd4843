"""Vectors of known texts: copied from where they are instead of being computed again.

In: the chunks of known texts, whose segments in ``texts/`` say where each vector is. Out:
``vectors/CHUNK.arrow``, as the encoder actors write it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.files import CorpusFile, listing_of
from pipelines.embedding.encode import find_done_chunks, read_vectors, write_vectors
from pipelines.embedding.job import MAY_CHANGE, EmbedConfig
from pipelines.embedding.keys import Chunk
from pipelines.embedding.plan import WORK_FOLDER, WorkPlan
from pipelines.runtime.files import join, list_files, make_folder, remove_folder
from pipelines.runtime.segments import read_segment
from pipelines.runtime.units import Receipt, run_stage
from pipelines.store.store import Store

_NAME_DIGITS = 20


@dataclass(frozen=True)
class Leftover:
    """Vectors that another night computed: its work folder and chunks, by partition of texts."""

    work: str
    chunks: dict[str, list[int]]


def night_folder(
    root: str,
    config: EmbedConfig,
    files: Sequence[CorpusFile],
    fingerprint: str,
    versions: Sequence[int],
) -> str:
    """The folder of this night under ``root``; ``versions`` are those it is compared with."""
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    settings.pop("output")
    deciding = [settings, listing_of(files), fingerprint, list(versions)]
    text = json.dumps(deciding, sort_keys=True, default=str)
    return join(root, hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS])


def find_leftovers(root: str, mine: str, fingerprint: str) -> list[Leftover]:
    """Vectors of the same encoder in the folders of other nights."""
    found = []
    for folder in other_folders(root, mine):
        work = join(folder, WORK_FOLDER)
        plan = WorkPlan.load(work)
        if plan is None or plan.fingerprint != fingerprint:
            continue
        chunks: dict[str, list[int]] = {}
        for name in sorted(find_done_chunks(work)):
            partition, number = name.rsplit("-", 1)
            chunks.setdefault(partition, []).append(int(number))
        if chunks:
            found.append(Leftover(work, chunks))
    return found


def other_folders(root: str, mine: str) -> list[str]:
    """Folders under ``root`` that are not this night's."""
    names = {name.split("/")[0] for name in list_files(root) if "/" in name}
    return [join(root, name) for name in sorted(names) if join(root, name) != mine]


def remove_work(folders: Sequence[Any]) -> None:
    """Delete folders of work."""
    for folder in folders:
        remove_folder(folder)


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
