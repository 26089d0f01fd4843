"""Unfinished nights: what they embedded is kept, and copied instead of being computed again.

In: documents of known texts, which the second read has left in ``known/``, and where each vector
is. Out: files in ``vectors/``, as the encoder actors write them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pipelines.corpus.files import CorpusFile, listing_of
from pipelines.embedding.chunks import FOLDERS, STAGE, Groups
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.keys import KNOWN
from pipelines.embedding.plan import WORK_FOLDER, WorkPlan, short_digest
from pipelines.embedding.write import (
    ROW_GROUP_BYTES,
    ResultSettings,
    chunk_names,
    read_rows,
    result_rows,
    write_in_files,
)
from pipelines.runtime.arrow import column_to_vectors
from pipelines.runtime.files import (
    join,
    list_files,
    open_filesystem,
    read_bytes,
    remove_folder,
)
from pipelines.runtime.run_record import deciding_settings
from pipelines.runtime.segments import bytes_to_table, digest_column, digest_matrix, read_segment
from pipelines.runtime.units import Receipt, read_receipts, run_stage
from pipelines.store.backfill import Backfill, end_backfill, open_backfills
from pipelines.store.store import Store


@dataclass(frozen=True)
class Leftover:
    """Vectors that another night computed: its work folder and files."""

    work: str
    chunks: list[str]


def night_folder(
    root: str,
    config: EmbedConfig,
    files: Sequence[CorpusFile],
    fingerprint: str,
    versions: Sequence[int],
) -> str:
    """The folder of this night under ``root``; ``versions`` are those it is compared with."""
    settings = deciding_settings(config)
    settings.pop("output")
    deciding = [settings, listing_of(files), fingerprint, list(versions)]
    return join(root, short_digest(deciding))


def find_leftovers(root: str, mine: str, fingerprint: str, *, float16: bool) -> list[Leftover]:
    """Vectors of the same encoder and precision in the folders of other nights."""
    leftovers = []
    for folder in other_folders(root, mine):
        work = join(folder, WORK_FOLDER)
        plan = WorkPlan.load(work)
        if plan is None or (plan.fingerprint, plan.float16) != (fingerprint, float16):
            continue
        chunks = chunk_names(work)
        if chunks:
            leftovers.append(Leftover(work, chunks))
    return leftovers


def other_folders(root: str, mine: str) -> list[str]:
    """Folders under ``root`` that are not this night's."""
    names = {name.split("/")[0] for name in list_files(root) if "/" in name}
    return [join(root, name) for name in sorted(names) if join(root, name) != mine]


def clean_up(store: Store, fingerprint: str) -> None:
    """Remove the unfinished work of all nights, but for backfills of other encoders.

    The one of the encoder ``fingerprint`` is over.
    """
    end_backfill(store, fingerprint)
    root = store.work_folder()
    kept = {join(root, name) for backfill in open_backfills(store) for name in backfill.folders}
    for folder in other_folders(root, ""):
        if folder not in kept:
            remove_folder(folder)


def begin_backfill(
    store: Store, fingerprint: str, mine: str, leftovers: Sequence[Leftover], *, texts: int,
    known: int,
) -> Backfill:  # fmt: skip
    """Note that work of this night and of those it goes on from is to be kept."""
    open_now = {backfill.fingerprint: backfill for backfill in open_backfills(store)}
    backfill = open_now.get(fingerprint) or Backfill.begin(fingerprint)
    works = [mine, *(leftover.work.removesuffix(f"/{WORK_FOLDER}") for leftover in leftovers)]
    names = [work.rpartition("/")[2] for work in works]
    backfill = backfill.extended(names, texts=texts, embedded=known, nights=1)
    backfill.save(store)
    return backfill


def disk_needed(store: str, documents: int, document_bytes: float) -> str:
    """What embedding all documents beside the published version takes on disk, for people."""
    size = documents * document_bytes
    needed = (
        f"about {_gib(size)} until it is published, up to {_gib(3 * size)} while it is, "
        f"of which {_gib(size)} stay"
    )
    filesystem, inner = open_filesystem(store)
    place = Path(inner)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return needed
    while not place.exists():
        place = place.parent
    return f"{needed}; {_gib(shutil.disk_usage(place).free)} are free"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def copy_known_vectors(results: ResultSettings, store: str, groups: Groups) -> None:
    """Write the rows of all documents whose texts are known, by partition of texts."""
    work = results.work
    reads = read_receipts(join(work, STAGE), groups.units)
    folder = FOLDERS[KNOWN]
    waiting = [name for receipt in reads.values() for name in receipt["aside"].get(folder, [])]
    if waiting:
        names = [n.removesuffix(".arrow") for n in list_files(join(work, "places"))]
        units = {f"known-{name}": {"partition": name, "waiting": waiting} for name in names}
        run_stage(work, "reuse", units, _CopyVectors(results, store))


@dataclass(frozen=True)
class _CopyVectors:
    results: ResultSettings
    store: str

    def __call__(self, name: str, unit: dict[str, Any]) -> Receipt:
        results, partition = self.results, unit["partition"]
        path = join(results.work, "places", f"{partition}.arrow")
        places = bytes_to_table(read_bytes(path))
        step = max(1, ROW_GROUP_BYTES // results.row_bytes)

        def rows() -> Iterator[pa.Table]:
            for file in unit["waiting"]:
                path = join(results.work, FOLDERS[KNOWN], f"{file}.arrow")
                documents = read_segment(path, int(partition))
                if documents is None:
                    continue
                for start in range(0, len(documents), step):
                    some = documents.slice(start, step).combine_chunks()
                    yield result_rows(results, some, self._vectors(places, some["text_sha256"]))

        return {"rows": write_in_files(results, name, rows())}

    def _vectors(self, places: pa.Table, hashes: pa.ChunkedArray) -> np.ndarray:
        """Vectors (n, d) of the texts with these hashes, each looked up once."""
        texts = hashes.unique()
        place = pc.index_in(digest_column(digest_matrix(texts)), value_set=places["text"])
        if place.null_count:
            raise RuntimeError(f"{place.null_count} known texts have no place")
        wanted = places.take(place).append_column("hash", texts)
        kind = self.results.value_type.to_pandas_dtype()
        vectors = np.zeros((len(texts), self.results.dimension), dtype=kind)
        is_filled = np.zeros(len(texts), dtype=bool)
        for rows, part in (*self._from_store(wanted), *_from_work(wanted)):
            vectors[rows] = part
            is_filled[rows] = True
        if not is_filled.all():
            raise RuntimeError(f"{int((~is_filled).sum())} known vectors are no longer there")
        return vectors[pc.index_in(hashes, value_set=texts).to_numpy()]

    def _from_store(self, places: pa.Table) -> list[tuple[np.ndarray, np.ndarray]]:
        results = []
        for number in pc.unique(places["version"]).drop_null().to_pylist():
            rows = np.flatnonzero(pc.fill_null(pc.equal(places["version"], number), False))
            wanted = places.take(pa.array(rows))
            version = Store.open(self.store).version(number)
            ids = wanted["id"].cast(version.schema.field("id").type)
            stored = version.take(ids.to_pylist(), ["id", "text_sha256", "embedding"])
            order = pc.index_in(ids, value_set=stored["id"].combine_chunks())
            stored = stored.take(order.combine_chunks())
            _check_texts(f"version {number}", stored, wanted)
            results.append((rows, column_to_vectors(stored["embedding"])))
        return results


def _from_work(places: pa.Table) -> list[tuple[np.ndarray, np.ndarray]]:
    results = []
    pairs = places.select(["work", "chunk"]).group_by(["work", "chunk"]).aggregate([])
    for work, chunk in zip(pairs["work"].to_pylist(), pairs["chunk"].to_pylist(), strict=True):
        if work is None:
            continue
        same = pc.and_(pc.equal(places["work"], work), pc.equal(places["chunk"], chunk))
        rows = np.flatnonzero(pc.fill_null(same, False))
        wanted = places.take(pa.array(rows))
        stored = read_rows(work, chunk, ("text_sha256", "embedding")).take(wanted["row"])
        _check_texts(f"{chunk} of {work}", stored, wanted)
        results.append((rows, column_to_vectors(stored["embedding"])))
    return results


def _check_texts(what: str, stored: pa.Table, wanted: pa.Table) -> None:
    hashes = [digest.hex() for digest in wanted["hash"].to_pylist()]
    if stored["text_sha256"].to_pylist() != hashes:
        raise RuntimeError(f"{what} has other texts than its keys said")
