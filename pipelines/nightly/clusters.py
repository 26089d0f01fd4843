"""A candidate's documents clustered again, from yesterday's centroids, under yesterday's ids.

Vectors are read where the store keeps them, a part at a time, three times: to check them and draw
a sample, to count every document under the new centroids, and to write its cluster down.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.assign import NearestCentroids
from cluster.census import (
    Census,
    CensusPlan,
    census_from_tables,
    count_block,
    empty_census,
    merge_censuses,
)
from cluster.clustering import (
    KEPT_DOCUMENTS,
    choose_levels,
    fit_level,
    pool_of,
    scan_corpus,
)
from cluster.config import ClusterConfig, ClusterOptions
from cluster.identity import Identity, NewClusters, OldClusters, identify_clusters
from cluster.kmeans import Fit, start_from
from cluster.on_ray import run_on_shards
from cluster.outcome import Outcome, describe_outcome
from cluster.sample import Scan
from cluster.vector_files import Columns, Piece
from cluster.vectors import Shard, VectorSource, hash_ids, read_blocks
from pipelines.nightly.config import TEXT, NightConfig
from pipelines.store.candidate import Candidate
from pipelines.store.documents import FragmentRef, assign_fragment, read_fragment
from pipelines.store.version import Version

SHARD_ROWS = 200_000
CENTROIDS = "centroids.parquet"
CLUSTERS = "clusters.parquet"
MOST_WARM_ITERATIONS = 25
_MERGED_AT_A_TIME = 8


@dataclass(frozen=True)
class NightClusters:
    """The new clustering, identified, not yet written."""

    outcome: Outcome
    """Clusters are called by their ids."""
    new: NewClusters
    identity: Identity
    shared: np.ndarray | None
    """int64 (k, m), untouched documents by old and new cluster; None without old clusters."""
    fit: Fit
    unit_norm: bool


def cluster_candidate(
    config: NightConfig,
    candidate: Candidate,
    old: OldClusters | None,
    *,
    changed: float,
    when: datetime,
    next_id: int,
) -> NightClusters:
    """Cluster the documents of ``candidate`` and find out which cluster is which old one.

    Args:
        config: the night's options.
        candidate: its documents are as they are to be published.
        old: the clusters of the version before.
        changed: share of the documents that are not as they were; 1 where other settings than
            those of the version before ask for another clustering.
        when: documents that changed last before are those that this night left untouched.
        next_id: the first cluster id that was never given.
    """
    settings = cluster_config(config, old, changed)
    source = open_candidate(candidate, config)
    scan = scan_corpus(source, settings)
    choice = choose_levels(scan, settings)
    k = choice.k if choice is not None else settings.levels()[0]
    fit = fit_level(source, scan, k, settings, _start(config, old, k, scan))
    old_ids = np.empty(0, dtype=np.int64) if old is None else old.ids
    census, shared = count_documents(source, scan, fit, settings, old_ids, when)
    outcome = describe_outcome(
        scan,
        {k: fit},
        choice,
        census,
        documents=settings.sample_documents,
        has_labels=config.label_column is not None,
        similarity=settings.duplicate_similarity or None,
    )
    keywords = [description.keywords for description in outcome.clusters]
    new = NewClusters(fit.centroids, census.sizes, keywords)
    known = None if old is None else shared
    identity = identify_clusters(old, new, known, next_id=next_id)
    return NightClusters(
        outcome.with_ids(identity.ids), new, identity, known, fit, source.unit_norm
    )


def write_assignments(candidate: Candidate, clusters: NightClusters) -> None:
    """Write every document's cluster id and distance."""
    assign = _AssignIds(clusters.fit.centroids, clusters.identity.ids, clusters.unit_norm)
    work = functools.partial(_assign, assign=assign)
    candidate.set_assignments(map_on_ray(work, candidate.fragments()))


def cluster_config(config: NightConfig, old: OldClusters | None, changed: float) -> ClusterConfig:
    """The settings of the clustering package; ``auto`` keeps the number of clusters there are."""
    number = config.num_clusters
    there = len(old.ids) if config.warm and old is not None else 0
    if number == "auto" and there:
        number = str(there)
    iterations = config.max_iterations
    if old is not None and old.centroids is not None and number == str(there) and changed < 1:
        needed = min(MOST_WARM_ITERATIONS, max(1, round(100 * changed)))
        iterations = config.warm_iterations or needed
    shared = {f.name: getattr(config, f.name) for f in fields(ClusterOptions)}
    shared |= {"num_clusters": number, "max_iterations": iterations}
    return ClusterConfig(embeddings=config.store, output="", **shared)


def open_candidate(candidate: Candidate, config: NightConfig) -> VectorSource:
    """The candidate's vectors as the clustering package reads them."""
    shards: list[list[Piece]] = []
    room = 0
    for ref in candidate.fragments():
        if not ref.rows:
            continue
        if ref.rows > room:
            shards.append([])
            room = max(SHARD_ROWS, ref.rows)
        read = functools.partial(_rows_of, ref)
        shards[-1].append(Piece(config.store, ref.fragment, ref.rows, read))
        room -= ref.rows
    kind = candidate.schema.field("embedding").type
    return VectorSource(
        config.store,
        Columns(text=TEXT, label=config.label_column),
        kind.list_size,
        "int64" if pa.types.is_int64(candidate.schema.field("id").type) else "string",
        tuple(Shard(f"part-{n:05d}", tuple(pieces)) for n, pieces in enumerate(shards)),
        unit_norm=config.metric == "cosine",
    )


def count_documents(
    source: VectorSource,
    scan: Scan,
    fit: Fit,
    settings: ClusterConfig,
    old_ids: np.ndarray,
    when: datetime,
) -> tuple[Census, np.ndarray]:
    """The census under new centroids, and int64 (k, m) untouched documents by old and new."""
    largest = max(scan.largest, float(np.abs(fit.centroids).max()))
    longest = 2 * largest * float(np.sqrt(source.dimension))
    plan = CensusPlan((len(fit.centroids),), KEPT_DOCUMENTS, scan.rows, longest)
    count = functools.partial(
        _count_shard, source, fit.centroids, plan, settings.seed, old_ids, when
    )
    censuses = []
    shared = np.zeros((len(old_ids), plan.k), dtype=np.int64)
    for tables in run_on_shards(count, source.shards, **pool_of(settings)):
        censuses.append(census_from_tables(tables, plan))
        pairs = tables["untouched"]
        places = pairs["old"].to_numpy(), pairs["new"].to_numpy()
        np.add.at(shared, places, pairs["documents"].to_numpy())
    return merge_censuses(censuses), shared


def read_old_clusters(version: Version, *, same_encoder: bool) -> OldClusters:
    """The clusters of a version, by rising id."""
    found = _table(version, CENTROIDS).sort_by("cluster_id")
    names = dict(zip(*(_table(version, CLUSTERS)[n].to_pylist() for n in ("cluster_id", "name")),
                     strict=True))  # fmt: skip
    ids = found["cluster_id"].to_numpy()
    column = found["centroid"].combine_chunks()
    return OldClusters(
        ids.astype(np.int64),
        column.flatten().to_numpy().reshape(len(ids), -1) if same_encoder else None,
        found["size"].to_numpy().astype(np.int64),
        [names[int(cluster_id)] for cluster_id in ids],
    )


def vanished_texts(version: Version, ids: Iterable[int]) -> dict[int, str]:
    """The text of a document that stood for each of these clusters of a version."""
    wanted = set(ids)
    rows = [row for row in _table(version, CLUSTERS).to_pylist() if row["cluster_id"] in wanted]
    firsts = {row["representative_ids"][0]: row["cluster_id"] for row in rows
              if row["representative_ids"]}  # fmt: skip
    if not firsts:
        return {}
    found = version.take(list(firsts), ["id", TEXT])
    pairs = zip(found["id"].to_pylist(), found[TEXT].to_pylist(), strict=True)
    return {firsts[row_id]: text for row_id, text in pairs}


def clusters_with_names(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """``clusters.parquet`` with each cluster's name."""
    place = table.schema.get_field_index("name")
    return table.set_column(place, "name", pa.array(list(names), pa.string()))


def map_on_ray(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """``function`` of every item, each in a task of one CPU, in order."""
    task = ray.remote(num_cpus=1)(_call)  # Ray takes no functools.partial
    waiting = [task.remote(function, item) for item in items]
    return (ray.get(found) for found in waiting)


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


@dataclass(frozen=True)
class _Counted:
    census: Census
    shared: pa.Table

    def to_tables(self) -> dict[str, pa.Table]:
        return {**self.census.to_tables(), "untouched": self.shared}


def _count_shard(
    source: VectorSource,
    centroids: np.ndarray,
    plan: CensusPlan,
    seed: int,
    old_ids: np.ndarray,
    when: datetime,
    shard: Shard,
) -> _Counted:
    index = NearestCentroids(centroids)
    censuses, found = [empty_census(plan)], [np.empty(0, dtype=np.int32)]
    for block in read_blocks(source, shard):
        assignment = index.assign(block.vectors)
        orders = hash_ids(block.ids, seed)
        censuses.append(count_block(block, orders, {plan.k: assignment}, plan))
        found.append(assignment.cluster_ids)
        if len(censuses) == _MERGED_AT_A_TIME:
            censuses = [merge_censuses(censuses)]
    shared = _shared(shard, np.concatenate(found), old_ids, when)
    return _Counted(merge_censuses(censuses), shared)


def _shared(shard: Shard, places: np.ndarray, old_ids: np.ndarray, when: datetime) -> pa.Table:
    """Untouched documents of a shard by place of their old and their new cluster."""
    names = ["cluster_id", "last_changed"]
    batches = [
        batch for piece in shard.pieces if piece.read for batch in piece.read(names, 1 << 16)
    ]
    before = pa.Table.from_batches(batches)
    cluster = before["cluster_id"].fill_null(-1).to_numpy()
    changed = before["last_changed"].cast(pa.int64()).fill_null(0).to_numpy()
    old_place = np.searchsorted(old_ids, cluster)
    known = np.zeros(len(cluster), dtype=bool)
    if len(old_ids):
        at = np.minimum(old_place, len(old_ids) - 1)
        known = (old_ids[at] == cluster) & (changed < round(when.timestamp() * 1e6))
    pairs, counts = np.unique(
        np.stack([old_place[known], places[known]]), axis=1, return_counts=True
    )
    return pa.table({"old": pairs[0], "new": pairs[1], "documents": counts})


def _rows_of(ref: FragmentRef, names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    return read_fragment(ref, names, batch_rows=rows)


def _assign(ref: FragmentRef, assign: _AssignIds) -> Any:
    return assign_fragment(ref, assign)


class _AssignIds:
    """Vectors to cluster ids and distances; the index of centroids is built where it is used."""

    def __init__(self, centroids: np.ndarray, ids: np.ndarray, unit_norm: bool) -> None:
        self._centroids, self._ids, self._unit_norm = centroids, ids, unit_norm
        self._index: NearestCentroids | None = None

    def __call__(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cluster ids int32 (n,) and distances float32 (n,) of float32 (n, d)."""
        self._index = self._index or NearestCentroids(self._centroids)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if self._unit_norm:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        found = self._index.assign(vectors)
        return self._ids[found.cluster_ids], found.distances.astype(np.float32)


def _start(config: NightConfig, old: OldClusters | None, k: int, scan: Scan) -> np.ndarray | None:
    if not config.warm or old is None or old.centroids is None:
        return None
    sample = scan.sample.head(config.sample_documents).vectors
    return start_from(old.centroids, old.sizes, k, sample, seed=config.seed)


def _table(version: Version, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(version.read(name)))


def read_lineage(version: Version | None, name: str, added: pa.Table) -> pa.Table:
    """The lineage of a version and what is added to it."""
    return added if version is None else pa.concat_tables([_table(version, name), added])
