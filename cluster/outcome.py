"""What a clustering found: described, scored and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cluster.assign import Assignment, NearestCentroids, assign_by_group
from cluster.census import Census
from cluster.describe import Description, describe_clusters
from cluster.duplicates import find_duplicates
from cluster.hierarchy import Nesting
from cluster.kept_columns import KeptColumn, column_tables
from cluster.kmeans import Fit
from cluster.metrics import (
    MEANINGS,
    explain_collapse,
    explain_imbalance,
    label_scores,
    score_clustering,
)
from cluster.noise import NOISE, DenseRegions, NoiseFinder, mark_noise
from cluster.num_clusters import Choice
from cluster.sample import Sample, Scan
from cluster.tables import (
    centroids_table,
    clusters_table,
    confusion_table,
    curve_table,
    duplicates_table,
    levels_table,
    outliers_table,
)
from cluster.work import remove_stale
from pipelines.runtime.files import join, json_bytes, make_folder, write_bytes, write_table

ALONE = Nesting()
"""One level, which lies in no other."""


SCORED_DOCUMENTS = 10_000
"""Documents that scores without labels are computed on; the silhouette's cost is their square."""
_SCORES_OF_A_LEVEL = (
    "num_clusters",
    "labels",
    "internal",
    "inertia",
    "imbalance",
    "empty_clusters",
    "undefined",
)


@dataclass(frozen=True)
class Level:
    """The documents in one number of clusters, described and scored."""

    fit: Fit
    census: Census
    cluster_ids: np.ndarray
    """int32 (n,), clusters of the outcome's ``documents``."""
    clusters: list[Description]
    scores: dict[str, Any]

    @property
    def k(self) -> int:
        """Its number of clusters."""
        return len(self.census.sizes)


@dataclass(frozen=True)
class Outcome:
    """One clustering, described and scored."""

    scan: Scan
    levels: Sequence[Level]
    """By rising number of clusters; ``cluster_id`` speaks of the last, the finest."""
    choice: Choice | None
    """How the number of clusters was chosen, where it was."""
    documents: Sample
    """The sample that keywords, examples, the map and scores without labels come from."""
    scores: dict[str, Any]
    """Those of the finest level, and what concerns all levels."""
    outliers: pa.Table
    duplicates: pa.Table | None
    """None where they were not looked for."""
    notices: list[str]
    """What a reader of the result must know."""
    ids: np.ndarray | None = None
    """int32 (k,), id of the cluster at each place, where ids are not places."""
    nesting: Nesting = ALONE
    """How several levels lie in each other."""
    fingerprint: str | None = None
    """The encoder's, where the vectors carry one."""
    regions: DenseRegions | None = None
    """What is not noise; None where that was not sought."""

    def with_ids(self, ids: np.ndarray) -> Outcome:
        """The same with each cluster called by its id, int32 (k,), instead of its place."""
        outliers = _renumbered(self.outliers, ids)
        duplicates = None if self.duplicates is None else _renumbered(self.duplicates, ids)
        finest = self.levels[-1]
        clusters = [replace(c, cluster_id=int(ids[c.cluster_id])) for c in finest.clusters]
        named = np.where(finest.cluster_ids < 0, NOISE, ids[finest.cluster_ids])
        finest = replace(finest, cluster_ids=named, clusters=clusters)
        return replace(
            self,
            levels=[*self.levels[:-1], finest],
            outliers=outliers,
            duplicates=duplicates,
            ids=ids,
        )

    def with_names(self, names: Mapping[int, str]) -> Outcome:
        """The same with the finest level's clusters called as said, by cluster id."""
        finest = self.levels[-1]
        clusters = [replace(c, name=names[c.cluster_id]) for c in finest.clusters]
        return replace(self, levels=[*self.levels[:-1], replace(finest, clusters=clusters)])

    @property
    def fit(self) -> Fit:
        """The finest level's fit."""
        return self.levels[-1].fit

    @property
    def census(self) -> Census:
        """The finest level's census, which knows the coarser ones."""
        return self.levels[-1].census

    @property
    def clusters(self) -> list[Description]:
        """The finest level's clusters."""
        return self.levels[-1].clusters

    def fitted_on(self) -> str:
        """Which vectors the centroids were fitted on, in words."""
        fitted, rows = self.fit.vectors, self.scan.rows
        if not fitted:
            return "vectors of an earlier time, and left as they were"
        return f"all {rows:,} vectors" if fitted == rows else f"{fitted:,} of {rows:,} vectors"

    def counts(self) -> dict[str, int]:
        """For ``run.json``."""
        noise = {} if self.census.noise is None else {"noise": int(self.census.noise.sizes[0])}
        return noise | {
            "documents": self.scan.rows + len(self.scan.rejected),
            "clustered": self.scan.rows,
            "rejected": len(self.scan.rejected),
            "zero_vectors": self.scan.zeros,
            "fitted_on": self.fit.vectors,
            "clusters": len(self.census.sizes),
            "empty_clusters": self.scores["empty_clusters"],
            "reseeded": self.fit.reseeded,
            "outliers": len(self.outliers),
            "near_duplicates": 0 if self.duplicates is None else len(self.duplicates),
        }

    def summary(self) -> dict[str, str]:
        """For people."""
        sizes, internal = self.census.sizes, self.scores["internal"]
        rows = {"documents": f"{self.scan.rows:,}"}
        if self.census.noise is not None:
            rows["noise"] = noise_in_words(self.census)
        rows |= {
            "clusters": f"{len(sizes):,} of {sizes.min():,} to {sizes.max():,} documents",
            "centroids fitted on": self.fitted_on(),
        }
        if self.choice is not None:
            rows["why so many clusters"] = self.choice.reason
        against = self.scores["labels"] or {}
        for name in ("v_measure", "ari"):
            if against.get(name) is not None:
                labelled = f"({against['labelled_documents']:,} labelled documents)"
                rows[MEANINGS[name].title] = f"{against[name]:.3f} {labelled}"
        if internal["silhouette"] is not None:
            rows["Silhouette"] = (
                f"{internal['silhouette']:.3f} ± {internal['silhouette_standard_error']:.3f} "
                f"({internal['sample_size']:,} documents)"
            )
        return rows | {f"note {i}": text for i, text in enumerate(self.notices, 1)}


def describe_outcome(
    scan: Scan,
    fits: Mapping[int, Fit],
    choice: Choice | None,
    census: Census,
    *,
    documents: int,
    has_labels: bool,
    similarity: float | None,
    nesting: Nesting = ALONE,
    fingerprint: str | None = None,
    duplicates: pa.Table | None = None,
    regions: DenseRegions | None = None,
    most_searched: int | None = None,
) -> Outcome:
    """Describe and score every level.

    ``fits`` maps numbers of clusters to fits. Keywords and scores without labels use the first
    ``documents`` rows of the scan's sample, near-duplicates (from cosine ``similarity`` on; None
    for no search) all of it or its first ``most_searched``, unless the ``duplicates`` among all
    vectors are given. ``nesting`` says how several levels lie in each other, ``regions`` what is
    noise and so described apart.
    """
    described = scan.sample.head(documents)
    finder = NoiseFinder(regions)
    noise = finder.find(described.vectors, described.orders)
    members = described.take(np.flatnonzero(~noise)) if noise.any() else described
    finest = NearestCentroids(fits[max(fits)].centroids).assign(members.vectors)
    levels = []
    for k, fit in sorted(fits.items()):
        assigned = finest
        if k in nesting.groups:
            assigned = assign_by_group(members.vectors, fit.centroids, nesting.groups[k], finest)
        level = describe_level(members, assigned, fit, census.coarser.get(k, census), has_labels)
        cluster_ids = np.full(len(described), NOISE, dtype=np.int32)
        cluster_ids[~noise] = level.cluster_ids
        levels.append(replace(level, cluster_ids=cluster_ids))
    scores = dict(levels[-1].scores)
    if census.noise is not None:
        scores["noise"] = noise_scores(census, regions, has_labels=has_labels)
    if len(levels) > 1:
        scores["levels"] = level_scores(levels)
    notices = find_notices(scan, census, described)
    if similarity is not None:
        searched = scan.rows
        if duplicates is None:
            some = scan.sample.head(len(scan.sample) if most_searched is None else most_searched)
            searched = len(some)
            duplicates = sample_duplicates(some, similarity, levels[-1].fit, finder)
        scores["near_duplicates"] = {
            "count": len(duplicates),
            "similarity": similarity,
            "searched": searched,
        }
    return Outcome(
        scan,
        levels,
        choice,
        described,
        scores,
        outliers_table(census),
        duplicates,
        notices,
        nesting=nesting,
        fingerprint=fingerprint,
        regions=regions,
    )


def sample_duplicates(sample: Sample, similarity: float, fit: Fit, finder: NoiseFinder) -> pa.Table:
    """``near_duplicates.parquet`` by a sample alone."""
    nearest = NearestCentroids(fit.centroids, count=1).nearest(sample.vectors)[:, 0]
    cluster_ids = mark_noise(nearest, finder.find(sample.vectors, sample.orders))
    return duplicates_table(find_duplicates(sample.vectors, similarity), sample.ids, cluster_ids)


def noise_in_words(census: Census) -> str:
    """How many documents are noise."""
    assert census.noise is not None
    noise = int(census.noise.sizes[0])
    share = noise / max(1, census.documents)
    return f"{noise:,} documents ({share:.1%}) in no dense region"


def noise_scores(
    census: Census, regions: DenseRegions | None, *, has_labels: bool
) -> dict[str, Any]:
    """How much noise there is, and the scores with it as a cluster of its own.

    All other scores are without it.
    """
    assert census.noise is not None and regions is not None
    scores: dict[str, Any] = {
        "documents": int(census.noise.sizes[0]),
        "share": float(census.noise.sizes[0] / max(1, census.documents)),
        "distance_of_fifth_neighbour": regions.limit if np.isfinite(regions.limit) else None,
    }
    if has_labels:
        k = len(census.sizes)
        names = sorted({*census.labels, *census.noise.labels})
        counts = np.zeros((len(names), k + 1), dtype=np.int64)
        for row, name in enumerate(names):
            counts[row, :k] = census.labels.get(name, 0)
            counts[row, k] = census.noise.labels.get(name, np.zeros(1, np.int64))[0]
        scores["labels_with_noise"] = label_scores(counts).values
    return scores


def describe_level(
    documents: Sample, assigned: Assignment, fit: Fit, census: Census, has_labels: bool
) -> Level:
    """Describe and score one level.

    Its census is of all documents; ``documents``, ``assigned`` to its clusters, are a sample.
    """
    confusion = np.array(list(census.labels.values())).reshape(-1, len(census.sizes))
    scores = score_clustering(
        census.sizes,
        census.inertia,
        confusion if has_labels else None,
        documents.vectors[:SCORED_DOCUMENTS],
        assigned.cluster_ids[:SCORED_DOCUMENTS],
    )
    clusters = describe_clusters(census, documents, assigned.cluster_ids, assigned.distances)
    return Level(fit, census, assigned.cluster_ids, clusters, scores)


def level_scores(levels: Sequence[Level]) -> list[dict[str, Any]]:
    """The scores of each level, and how it lies in the next coarser one.

    ``nested_share`` is the share of documents that lie in their cluster's parent: 1 means that
    every cluster lies in one cluster of ``in_level_of``. The coarsest level lies in none.
    """
    rows = []
    shared = levels[-1].census.shared
    for coarser, level in zip([None, *levels], levels, strict=False):
        row = {name: level.scores[name] for name in _SCORES_OF_A_LEVEL}
        if coarser is not None:
            counts = shared[coarser.k]
            row |= {
                "in_level_of": coarser.k,
                "nested_share": float(counts.max(axis=0).sum() / max(1, counts.sum())),
            }
        rows.append(row)
    return rows


def find_notices(scan: Scan, census: Census, documents: Sample) -> list[str]:
    """Collapse, empty clusters, zero vectors, rows left out."""
    notices = []
    uneven = explain_collapse(census.sizes, documents.vectors) or explain_imbalance(census.sizes)
    if uneven:
        notices.append(uneven)
    empty = int((census.sizes == 0).sum())
    if not census.sizes.any():
        notices.append("All documents are noise, and no cluster holds any: leave --noise out.")
    elif empty:
        notices.append(
            f"Empty clusters: {empty}. Ask for fewer clusters, or fit on more vectors."
            if census.noise is None or not census.noise.sizes[0]
            else f"Empty clusters: {empty}. At most noise lies nearest to them."
        )
    if scan.zeros:
        notices.append(f"Zero vectors: {scan.zeros:,}. They were clustered as points.")
    if len(scan.rejected):
        notices.append(f"Vectors left out: {len(scan.rejected):,}. rejected.parquet says why.")
    return notices


def _renumbered(table: pa.Table, ids: np.ndarray) -> pa.Table:
    column = table.schema.get_field_index("cluster_id")
    places = table.column("cluster_id").to_numpy()
    named = np.where(places < 0, NOISE, ids[places])
    return table.set_column(column, "cluster_id", pa.array(named, pa.int32()))


_OWN_TABLES = (
    r"(outliers|near_duplicates|confusion|levels|k_curve|noise|rejected|over_time|column_values|"
    r"(centroids|clusters)(_\d+)?)\.parquet"
)


def write_tables(outcome: Outcome, folder: str, columns: Sequence[KeptColumn] = ()) -> None:
    """Write tables and ``scores.json`` into ``folder``, each whole or not at all.

    Those of kept ``columns`` are among them where there are any.
    """
    tables = {"outliers": outcome.outliers}
    for level in outcome.levels:
        suffix = "" if level is outcome.levels[-1] else f"_{level.k}"
        id_type = outcome.documents.ids.type
        tables[f"centroids{suffix}"] = centroids_table(
            level.fit.centroids, level.census.sizes, fingerprint=outcome.fingerprint
        )
        tables[f"clusters{suffix}"] = clusters_table(level.clusters, id_type)
    if outcome.duplicates is not None:
        tables["near_duplicates"] = outcome.duplicates
    if outcome.census.labels:
        tables["confusion"] = confusion_table(outcome.census)
    if len(outcome.levels) > 1:
        tables["levels"] = levels_table(outcome.census, outcome.nesting)
    if outcome.regions is not None:
        tables["noise"] = outcome.regions.table()
    if outcome.choice is not None:
        tables["k_curve"] = curve_table(outcome.choice)
    if len(outcome.scan.rejected):
        tables["rejected"] = outcome.scan.rejected
    tables |= column_tables(columns)
    make_folder(folder)
    for name, table in tables.items():
        write_table(join(folder, f"{name}.parquet"), table)
    remove_stale(folder, _OWN_TABLES, {f"{name}.parquet" for name in tables})
    write_bytes(join(folder, "scores.json"), json_bytes(outcome.scores))


MOST_NAMED = 500
"""Clusters that are named, the largest first."""


_EXCERPT_CHARACTERS = 300


_EXCERPTS = 5


@dataclass(frozen=True)
class Brief:
    """What a namer is shown of one cluster."""

    keywords: list[str]
    texts: list[str]
    """Beginnings of documents, central ones first."""


class Namer(Protocol):
    """Who writes names, a model; the job brings it."""

    def check(self) -> None:
        """Raise :class:`InputError` where it cannot be asked."""

    def name(self, levels: Sequence[Sequence[Brief]]) -> list[list[str | None]]:
        """A name each, no two of a level alike; None where there is none that serves."""


def name_clusters(outcome: Outcome, namer: Namer) -> Outcome:
    """The outcome with names for the largest clusters of each of its levels; lacking ones told."""
    largest = [
        sorted((c for c in level.clusters if c.size), key=lambda c: (-c.size, c.cluster_id))
        for level in outcome.levels
    ]
    wanted = [clusters[:MOST_NAMED] for clusters in largest]
    answers = namer.name([[brief_of(cluster) for cluster in clusters] for clusters in wanted])
    levels = []
    for level, clusters, given in zip(outcome.levels, wanted, answers, strict=True):
        names = {c.cluster_id: name for c, name in zip(clusters, given, strict=True)}
        named = [replace(c, name=names.get(c.cluster_id)) for c in level.clusters]
        levels.append(replace(level, clusters=named))
    given = [name for names in answers for name in names]
    if missing := given.count(None):
        note = f"Clusters that got no name: {missing:,} of {len(given):,}. Keywords stand for them."
        outcome = replace(outcome, notices=[*outcome.notices, note])
    return replace(outcome, levels=levels)


def brief_of(cluster: Description) -> Brief:
    """Keywords and the beginnings of a few different documents."""
    texts = [example.text for example in [*cluster.central[:3], *cluster.diverse[1:]]]
    cut = [" ".join(text[: 2 * _EXCERPT_CHARACTERS].split()) for text in texts if text]
    short = dict.fromkeys(text[:_EXCERPT_CHARACTERS] for text in cut if text)
    return Brief(cluster.keywords, list(short)[:_EXCERPTS])
