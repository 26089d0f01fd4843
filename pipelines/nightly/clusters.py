"""A candidate's documents clustered again, from yesterday's centroids, under yesterday's ids.

Vectors are read where the store keeps them, a part at a time, three times: to check them and draw
a sample, to count every document under the new centroids, and to write its cluster down.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
    fit_levels,
    pool_of,
    scan_corpus,
)
from cluster.config import ClusterConfig, ClusterOptions
from cluster.identity import NewClusters, OldClusters, identify_clusters, keep_clusters
from cluster.kmeans import Fit, start_from
from cluster.known import KnownClusters, reach_of
from cluster.on_ray import run_on_shards
from cluster.outcome import Outcome, describe_outcome
from cluster.sample import Scan
from cluster.vector_files import Columns, Piece
from cluster.vectors import Shard, VectorSource, group_into_shards, hash_ids, read_blocks
from pipelines.nightly.config import TEXT, NightConfig
from pipelines.nightly.edits import (
    AssignIds,
    Pins,
    describe_published,
    names_given,
    pinned_before,
    pinned_documents,
    place_pins,
    released_clusters,
    split_starts,
)
from pipelines.nightly.novelty import Joined, Novelty, find_novelty, split_joined
from pipelines.nightly.parts import (
    CLUSTERS,
    Parts,
    Published,
    publish_parts,
    published_clusters,
    read_parts,
)
from pipelines.nightly.titles import read_titles, write_titles
from pipelines.runtime.files import exists, join
from pipelines.runtime.run_record import settings_of
from pipelines.runtime.tables import STORE_MARK
from pipelines.runtime.units import map_on_ray
from pipelines.store.candidate import Candidate
from pipelines.store.documents import FragmentRef, assign_fragment, read_fragment
from pipelines.store.edits import Edit, splits_done
from pipelines.store.store import Store
from pipelines.store.version import Version

MOST_WARM_ITERATIONS = 25
ACCEPTED_GROUPS = "accepted_novel_groups"
"""In a record's details: what :func:`accepted_groups` counts."""
_MERGED_AT_A_TIME = 8
"""Tasks that are submitted before their turn."""


@dataclass(frozen=True)
class Earlier:
    """The clusters of the version before."""

    version: Version
    clusters: OldClusters
    """As they were published."""
    parts: Parts
    """As they were fitted."""
    titles: dict[int, str]
    """By cluster id, what a model called it."""

    @classmethod
    def read(cls, version: Version, *, same_encoder: bool) -> Earlier:
        """Those of a version; without centroids where they are another encoder's."""
        parts = read_parts(version, same_encoder=same_encoder)
        titles = {i: title for i, (title, _) in read_titles(version).items()}
        return cls(version, published_clusters(version, parts), parts, titles)


@dataclass(frozen=True)
class NightClusters:
    """The new clustering, identified, people's edits applied, not yet written."""

    outcome: Outcome
    """Clusters are called by their ids."""
    published: Published
    names: list[str]
    """Of the published clusters: a person's, else a model's, else by the keywords."""
    titles: dict[int, str]
    """By cluster id, what a model called it."""
    pins: Pins
    split: dict[int, int]
    """By cluster that people wanted split: the new one that came out of it."""
    fit: Fit
    unit_norm: bool
    novelty: Novelty | None
    """What does not fit; None where the clusters were fitted anew."""
    old_ids: np.ndarray
    """int64 (k,), the clusters of the version before."""


@dataclass(frozen=True)
class _Counted:
    """All documents under a fit's centroids."""

    census: Census
    shared: np.ndarray
    """int64 (k, m), untouched documents by old cluster and new part."""
    joined: list[Joined]


def cluster_candidate(
    config: NightConfig,
    candidate: Candidate,
    earlier: Earlier | None,
    edits: Sequence[Edit],
    *,
    changed: float,
    when: datetime,
    fitted_at: datetime | None,
    next_id: int,
) -> NightClusters:
    """Cluster the documents of ``candidate`` and find out which cluster is which old one.

    Args:
        config: the night's options.
        candidate: its documents are as they are to be published.
        earlier: the clusters of the version before.
        edits: people's, those that hold.
        changed: share of the documents that are not as they were when clusters were fitted; 1
            where other settings than those of the version before ask for another clustering.
        when: documents that changed last before are those that this night left untouched.
        fitted_at: when the clusters were fitted that documents join now; None to fit them anew.
        next_id: the first cluster id that was never given.
    """
    settings = cluster_config(config, earlier, changed, added_clusters(earlier))
    source = open_candidate(candidate, config)
    scan = scan_corpus(source, settings)
    sample = scan.sample.head(config.sample_documents)
    starts = {}
    if earlier is not None and config.warm:
        starts = split_starts(
            edits, earlier.version, earlier.parts, candidate, sample, when, source.unit_norm
        )
    choice = None if fitted_at is not None else choose_levels(scan, settings)
    if fitted_at is not None:
        assert earlier is not None
        fit = Fit.standing(_with_splits(earlier.parts, starts)[0])
    else:
        k = (settings.levels()[0] if choice is None else choice.k) + len(starts)
        begun = _start(config, earlier, starts, k, sample.vectors)
        fit, _ = fit_levels(source, scan, [k], settings, begun)
    pinned, placed = [], []
    if earlier is not None:
        pinned = [*pinned_documents(edits, candidate, earlier.parts)[0]]
        placed = [*pinned, *pinned_before(earlier.version, candidate.documents)]
    count = functools.partial(
        count_documents, source, scan, settings=settings, earlier=earlier, when=when,
        fitted_at=fitted_at, pinned=pa.array(placed, candidate.schema.field("id").type),
    )  # fmt: skip
    counted, novelty = count(fit), None
    if fitted_at is not None:
        novelty = find_novelty(config, candidate, counted.joined, len(fit.centroids), pinned)
        if len(novelty.centroids) and "novel" in config.accept:
            fit = Fit.standing(np.vstack([fit.centroids, novelty.centroids]))
            counted = count(fit)
            novelty = novelty.placed(counted.joined)
    outcome = describe_outcome(
        scan,
        {len(fit.centroids): fit},
        choice,
        counted.census,
        documents=settings.sample_documents,
        has_labels=config.label_column is not None,
        similarity=settings.duplicate_similarity or None,
        most_searched=settings.sample_documents,  # pairs of all would be the night's largest part
    )
    asked = [] if earlier is None else [int(earlier.parts.ids[place]) for place in starts]
    return _identify(
        config, candidate, earlier, edits, counted, outcome, next_id, asked, source, novelty
    )


def _identify(
    config: NightConfig,
    candidate: Candidate,
    earlier: Earlier | None,
    edits: Sequence[Edit],
    counted: _Counted,
    outcome: Outcome,
    next_id: int,
    asked: Sequence[int],
    source: VectorSource,
    novelty: Novelty | None,
) -> NightClusters:
    """Who is who, and what people want of it."""
    fit = outcome.fit
    keywords = [description.keywords for description in outcome.clusters]
    new = NewClusters(fit.centroids, counted.census.sizes, keywords)
    old = None if earlier is None else earlier.clusters
    shared = None if earlier is None else counted.shared
    standing = novelty is not None
    if standing:
        assert earlier is not None
        ids = earlier.parts.part_ids
        identity = keep_clusters(earlier.clusters, new, counted.shared, ids, next_id=next_id)
    else:
        identity = identify_clusters(old, new, shared, next_id=next_id)
    split = {
        e.related_cluster_id: e.cluster_id
        for e in identity.events
        if e.event == "split" and e.related_cluster_id is not None and e.related_cluster_id in asked
    }
    before = None if earlier is None else earlier.parts
    released = set() if earlier is None else released_clusters(edits, earlier.version)
    published = publish_parts(
        edits, old, before, new, shared, identity,
        released=released, split=split.values(), standing=standing,
    )  # fmt: skip
    places = AssignIds(fit.centroids, np.arange(len(fit.centroids)), source.unit_norm)
    pins, published = place_pins(edits, candidate, published, places)
    ids, by_keywords = published.identity.ids.tolist(), published.identity.names
    outcome = describe_published(outcome, published, by_keywords)
    given = names_given(edits)
    titles = write_titles(
        config, outcome.levels[-1].clusters, {} if earlier is None else earlier.titles, given
    )  # fmt: skip
    called = titles | given
    names = [called.get(i, name) for i, name in zip(ids, by_keywords, strict=True)]
    outcome = outcome.with_names(dict(zip(ids, names, strict=True)))
    old_ids = np.empty(0, np.int64) if old is None else old.ids
    return NightClusters(
        outcome, published, names, titles, pins, split, fit, source.unit_norm, novelty, old_ids
    )


def added_clusters(earlier: Earlier | None) -> int:
    """How many clusters people made beside the number that is asked for: splits, novel groups."""
    if earlier is None:
        return 0
    return len(splits_done(earlier.version)) + accepted_groups(earlier.version)


def accepted_groups(version: Version | None) -> int:
    """How many groups of novel documents were made clusters since the first night."""
    return 0 if version is None else int(version.record.details.get(ACCEPTED_GROUPS, 0))


def _with_splits(parts: Parts, starts: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Centroids float32 (k, d) and sizes int64 (k,) with two in place of each that is split."""
    assert parts.centroids is not None
    centroids, sizes = parts.centroids.copy(), parts.sizes.copy()
    for place, pair in starts.items():
        centroids[place] = pair[0]
        centroids = np.vstack([centroids, pair[1:]])
        sizes = np.append(sizes, sizes[place])
    return centroids, sizes


def write_assignments(candidate: Candidate, clusters: NightClusters) -> None:
    """Write every document's cluster id and distance, those of pinned documents last."""
    ids = clusters.published.parts.ids
    assign = AssignIds(clusters.fit.centroids, ids, clusters.unit_norm)
    work = functools.partial(_assign, assign=assign)
    candidate.set_assignments(map_on_ray(work, candidate.fragments()))
    if clusters.pins.table is not None:
        candidate.update_columns(clusters.pins.table)


def cluster_config(
    config: NightConfig, earlier: Earlier | None, changed: float, added: int
) -> ClusterConfig:
    """The settings of the clustering package; ``auto`` keeps the number of clusters there are.

    ``added`` are clusters that people made, beside the number that is asked for.
    """
    number = config.num_clusters
    there = len(earlier.parts.ids) if config.warm and earlier is not None else 0
    if number == "auto" and there:
        number = str(there)
    elif number != "auto":
        number = str(int(number) + added)
    iterations = config.max_iterations
    known = earlier is not None and earlier.parts.centroids is not None
    if known and number == str(there) and changed < 1:
        needed = min(MOST_WARM_ITERATIONS, max(1, round(100 * changed)))
        iterations = config.warm_iterations or needed
    given = {"num_clusters": number, "max_iterations": iterations}
    return ClusterConfig(
        embeddings=config.store, output="", **settings_of(config, ClusterOptions) | given
    )


def open_candidate(candidate: Candidate, config: NightConfig) -> VectorSource:
    """The candidate's vectors as the clustering package reads them."""
    pieces = [
        Piece(config.store, ref.fragment, ref.rows, functools.partial(_rows_of, ref))
        for ref in candidate.fragments()
        if ref.rows
    ]
    kind = candidate.schema.field("embedding").type
    return VectorSource(
        config.store,
        Columns(text=TEXT, label=config.label_column),
        kind.list_size,
        "int64" if pa.types.is_int64(candidate.schema.field("id").type) else "string",
        group_into_shards(pieces),
        unit_norm=config.metric == "cosine",
    )


def count_documents(
    source: VectorSource,
    scan: Scan,
    fit: Fit,
    *,
    settings: ClusterConfig,
    earlier: Earlier | None,
    when: datetime,
    fitted_at: datetime | None,
    pinned: pa.Array,
) -> _Counted:
    """The census under a fit's centroids, and where untouched and new documents are in it.

    Documents that people put where they are or were, by their ids, tell nothing of which new
    cluster is which old one.
    """
    old_ids = np.empty(0, dtype=np.int64) if earlier is None else earlier.clusters.ids
    largest = max(scan.largest, float(np.abs(fit.centroids).max()))
    longest = 2 * largest * float(np.sqrt(source.dimension))
    plan = CensusPlan((len(fit.centroids),), KEPT_DOCUMENTS, scan.rows, longest)
    count = functools.partial(
        _count_shard, source, fit.centroids, plan, settings.seed, old_ids, when, fitted_at, pinned
    )
    censuses, joined = [], []
    shared = np.zeros((len(old_ids), plan.k), dtype=np.int64)
    for tables in run_on_shards(count, source.shards, **pool_of(settings)):
        censuses.append(census_from_tables(tables, plan))
        pairs = tables["untouched"]
        places = pairs["old"].to_numpy(), pairs["new"].to_numpy()
        np.add.at(shared, places, pairs["documents"].to_numpy())
        if fitted_at is not None:
            joined.append(Joined(tables["fitted"], tables["since"]))
    return _Counted(merge_censuses(censuses), shared, joined)


def is_store(address: str) -> bool:
    """Whether a store lies there."""
    return exists(join(address, STORE_MARK))


def read_published_clusters(address: str, number: int | None, quantile: float) -> KnownClusters:
    """The clusters of a store's version, by default the published one, for new vectors.

    A cluster reaches as far as the ``quantile`` of the distances of its own documents, without
    those that people put there.
    """
    version = Store.open(address).version(number)
    parts = read_parts(version, same_encoder=True)
    assert parts.centroids is not None
    # A cluster that people merged has several parts, and reaches as far as they do together.
    ids, places = np.unique(parts.ids, return_inverse=True)
    return KnownClusters(
        f"{address} (version {version.number})",
        parts.centroids,
        parts.ids,
        reach_of(_unpinned(version), ids).limits(quantile)[places],
        version.read_json("run.json")["config"]["metric"] == "cosine",
        version.record.fingerprint,
        version.read_json("encoder.json"),
    )


def _unpinned(version: Version) -> Iterator[list[pa.Array]]:
    """Clusters and distances of a version's documents that stand where their vectors do."""
    names = ["cluster_id", "distance"]
    pinned = pinned_before(version, version.documents)
    for batch in version.batches([*names, "id"] if pinned else names):
        if pinned:
            ids = batch.column("id")
            batch = batch.filter(pc.invert(pc.is_in(ids, value_set=pa.array(pinned, ids.type))))
        yield [batch.column(name) for name in names]


def vanished_texts(version: Version, ids: Iterable[int]) -> dict[int, str]:
    """The text of a document that stood for each of these clusters of a version."""
    wanted = set(ids)
    rows = [row for row in version.read_table(CLUSTERS).to_pylist() if row["cluster_id"] in wanted]
    firsts = {row["representative_ids"][0]: row["cluster_id"] for row in rows
              if row["representative_ids"]}  # fmt: skip
    if not firsts:
        return {}
    found = version.take(list(firsts), ["id", TEXT])
    pairs = zip(found["id"].to_pylist(), found[TEXT].to_pylist(), strict=True)
    return {firsts[row_id]: text for row_id, text in pairs}


@dataclass(frozen=True)
class _CountedShard:
    census: Census
    shared: pa.Table
    joined: Joined | None

    def to_tables(self) -> dict[str, pa.Table]:
        tables = {**self.census.to_tables(), "untouched": self.shared}
        if self.joined is not None:
            tables |= {"fitted": self.joined.fitted, "since": self.joined.since}
        return tables


def _count_shard(
    source: VectorSource,
    centroids: np.ndarray,
    plan: CensusPlan,
    seed: int,
    old_ids: np.ndarray,
    when: datetime,
    fitted_at: datetime | None,
    pinned: pa.Array,
    shard: Shard,
) -> _CountedShard:
    index = NearestCentroids(centroids)
    censuses, assigned, ids = [empty_census(plan)], [], []
    for block in read_blocks(source, shard):
        assignment = index.assign(block.vectors)
        orders = hash_ids(block.ids, seed)
        censuses.append(count_block(block, orders, {plan.k: assignment}, plan))
        assigned.append((assignment.cluster_ids, assignment.distances))
        ids.append(block.ids)
        if len(censuses) == _MERGED_AT_A_TIME:
            censuses = [merge_censuses(censuses)]
    places = np.concatenate([np.empty(0, np.int32), *(a for a, _ in assigned)])
    cluster, changed = _before(shard)
    every = pa.chunked_array(ids, pinned.type).combine_chunks()
    untouched, joined = changed < _microseconds(when), None
    if fitted_at is not None:
        distances = np.concatenate([np.empty(0), *(d for _, d in assigned)])
        was_there = changed <= _microseconds(fitted_at)
        joined = split_joined(every, places, distances, was_there, untouched)
    free = pc.invert(pc.is_in(every, value_set=pinned)).to_numpy(zero_copy_only=False)
    shared = _shared(cluster, free & untouched, places, old_ids)
    return _CountedShard(merge_censuses(censuses), shared, joined)


def _before(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """The old cluster, -1 without one, and the last change, in microseconds, of a shard's rows."""
    names = ["cluster_id", "last_changed"]
    batches = [
        batch for piece in shard.pieces if piece.read for batch in piece.read(names, 1 << 16)
    ]
    before = pa.Table.from_batches(batches)
    cluster = before["cluster_id"].fill_null(-1).to_numpy()
    return cluster, before["last_changed"].cast(pa.int64()).fill_null(0).to_numpy()


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)


def _shared(
    cluster: np.ndarray, untouched: np.ndarray, places: np.ndarray, old_ids: np.ndarray
) -> pa.Table:
    """Untouched documents of a shard by place of their old cluster and their new part."""
    old_place = np.searchsorted(old_ids, cluster)
    known = np.zeros(len(cluster), dtype=bool)
    if len(old_ids):
        at = np.minimum(old_place, len(old_ids) - 1)
        known = (old_ids[at] == cluster) & untouched
    pairs, counts = np.unique(
        np.stack([old_place[known], places[known]]), axis=1, return_counts=True
    )
    return pa.table({"old": pairs[0], "new": pairs[1], "documents": counts})


def _rows_of(ref: FragmentRef, names: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    return read_fragment(ref, names, batch_rows=rows)


def _assign(ref: FragmentRef, assign: AssignIds) -> Any:
    return assign_fragment(ref, assign)


def _start(
    config: NightConfig,
    earlier: Earlier | None,
    starts: Mapping[int, np.ndarray],
    k: int,
    sample: np.ndarray,
) -> np.ndarray | None:
    if not config.warm or earlier is None or earlier.parts.centroids is None:
        return None
    centroids, sizes = _with_splits(earlier.parts, starts)
    return start_from(centroids, sizes, k, sample, seed=config.seed)
