"""What a clustering found: described, scored and written as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.assign import Assignment, NearestCentroids, assign_by_group
from cluster.census import Census
from cluster.describe import Description, describe_clusters
from cluster.duplicates import Decisions, find_duplicates
from cluster.hierarchy import Nesting
from cluster.kmeans import Fit
from cluster.metrics import MEANINGS, explain_collapse, explain_imbalance, score_clustering
from cluster.num_clusters import Choice
from cluster.sample import Sample, Scan
from cluster.vector_files import FINGERPRINT_KEY
from cluster.work import remove_stale
from pipelines.runtime.files import join, make_folder, write_bytes, write_table

OUTLIER_DEVIATIONS = 3.0
ALONE = Nesting()
"""One level, which lies in no other."""


def centroids_table(
    centroids: np.ndarray,
    sizes: np.ndarray,
    ids: np.ndarray | None = None,
    fingerprint: str | None = None,
) -> pa.Table:
    """``centroids.parquet``: cluster_id, size, centroid (d floats), from float32 (k, d).

    Without ``ids`` clusters are called by their places. ``fingerprint`` is that of the encoder
    that made the vectors; the file carries it as files of vectors do.
    """
    k, dimension = centroids.shape
    flat = pa.array(centroids.ravel(), pa.float32())
    table = pa.table(
        {
            "cluster_id": pa.array(range(k) if ids is None else ids, pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "centroid": pa.FixedSizeListArray.from_arrays(flat, dimension),
        }
    )
    return (
        table
        if fingerprint is None
        else table.replace_schema_metadata({FINGERPRINT_KEY: fingerprint.encode()})
    )


def clusters_table(found: list[Description], id_type: pa.DataType) -> pa.Table:
    """``clusters.parquet``: one row a cluster."""
    return pa.table(
        {
            "cluster_id": pa.array([d.cluster_id for d in found], pa.int32()),
            "size": pa.array([d.size for d in found], pa.int64()),
            "name": pa.array([d.name for d in found], pa.string()),
            "share": pa.array([d.share for d in found], pa.float64()),
            "keywords": pa.array([d.keywords for d in found], pa.list_(pa.string())),
            "representative_ids": pa.array(
                [[e.id for e in d.central] for d in found], pa.list_(id_type)
            ),
            "diverse_ids": pa.array([[e.id for e in d.diverse] for d in found], pa.list_(id_type)),
            "mean_distance": pa.array([d.mean_distance for d in found], pa.float64()),
            "top_label": pa.array([d.top_label for d in found], pa.string()),
            "top_label_share": pa.array([d.top_label_share for d in found], pa.float64()),
        }
    )


def outliers_table(census: Census) -> pa.Table:
    """``outliers.parquet``: documents farther from their centroid than their cluster's others.

    ``deviations`` counts standard deviations above the cluster's mean distance, at least 3; the
    farthest documents of every cluster are looked at, the most deviant come first.
    """
    documents = census.farthest
    if documents is None:
        raise ValueError("nothing was counted")
    clusters = documents.column("cluster_id").to_numpy()
    above = documents.column("distance").to_numpy() - census.mean_distances()[clusters]
    spread = census.distance_deviations()[clusters]
    deviations = np.divide(above, spread, out=np.zeros(len(above)), where=spread > 0)
    order = np.lexsort((documents.column("order").to_numpy(), -deviations))
    rows = pa.array(order[deviations[order] >= OUTLIER_DEVIATIONS])
    wanted = ("id", "cluster_id", "distance", "text")
    names = [name for name in wanted if name in documents.column_names]
    return documents.select(names).append_column("deviations", pa.array(deviations)).take(rows)


def duplicates_table(found: Decisions, ids: pa.Array, cluster_ids: np.ndarray) -> pa.Table:
    """``near_duplicates.parquet``: id, duplicate_of (a kept one), similarity, cluster_id."""
    rows = np.flatnonzero(found.keepers >= 0)
    return pa.table(
        {
            "id": ids.take(pa.array(rows)),
            "duplicate_of": ids.take(pa.array(found.keepers[rows])),
            "similarity": pa.array(found.similarities[rows]),
            "cluster_id": pa.array(cluster_ids[rows], pa.int32()),
        }
    )


def confusion_table(census: Census) -> pa.Table:
    """``confusion.parquet``: label, cluster_id, documents; pairs without documents are left out."""
    rows = [
        (label, int(cluster), int(counts[cluster]))
        for label, counts in census.labels.items()
        for cluster in np.flatnonzero(counts)
    ]
    names = pa.schema(
        [("label", pa.string()), ("cluster_id", pa.int32()), ("documents", pa.int64())]
    )
    return pa.Table.from_pylist([dict(zip(names.names, row, strict=True)) for row in rows], names)


def levels_table(census: Census, nesting: Nesting) -> pa.Table:
    """``levels.parquet``: the tree, each cluster in the one of the next coarser level.

    ``parent_share`` is the share of a cluster's documents that lie in its ``parent_cluster_id``;
    ``merge_height`` is Ward's distance at which the cluster is merged with another.
    """
    parts = []
    for coarse, fine in pairwise(census.plan.levels):
        shared = census.shared[coarse]
        sizes = shared.sum(axis=0)
        parents = _parents(nesting, coarse, fine)
        parts.append(
            pa.table(
                {
                    "num_clusters": pa.array([fine] * fine, pa.int32()),
                    "cluster_id": pa.array(range(fine), pa.int32()),
                    "size": pa.array(sizes, pa.int64()),
                    "parent_num_clusters": pa.array([coarse] * fine, pa.int32()),
                    "parent_cluster_id": pa.array(parents, pa.int32()),
                    "parent_share": pa.array(shared.max(axis=0) / np.maximum(sizes, 1)),
                    "merge_height": pa.array(nesting.heights[fine], pa.float64()),
                }
            )
        )
    return pa.concat_tables(parts)


def _parents(nesting: Nesting, coarse: int, fine: int) -> np.ndarray:
    """int32 (fine,): the cluster of the coarser level that each of the finer lies in."""
    finest = np.arange(len(nesting.groups[coarse]), dtype=np.int32)
    parents = np.empty(fine, dtype=np.int32)
    parents[nesting.groups.get(fine, finest)] = nesting.groups[coarse]
    return parents


def curve_table(choice: Choice) -> pa.Table:
    """``k_curve.parquet``: every number of clusters tried and what speaks for it."""
    names = ("inertia", "silhouette", "silhouette_standard_error", "stability", "elbow", "score")
    columns = {name: [getattr(c, name) for c in choice.candidates] for name in names}
    ks = pa.array([candidate.k for candidate in choice.candidates], pa.int32())
    arrays = {name: pa.array(values, pa.float64()) for name, values in columns.items()}
    return pa.table({"num_clusters": ks, **arrays})


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

    def with_ids(self, ids: np.ndarray) -> Outcome:
        """The same with each cluster called by its id, int32 (k,), instead of its place."""
        outliers = _renumbered(self.outliers, ids)
        duplicates = None if self.duplicates is None else _renumbered(self.duplicates, ids)
        finest = self.levels[-1]
        clusters = [replace(c, cluster_id=int(ids[c.cluster_id])) for c in finest.clusters]
        finest = replace(finest, cluster_ids=ids[finest.cluster_ids], clusters=clusters)
        return replace(
            self,
            levels=[*self.levels[:-1], finest],
            outliers=outliers,
            duplicates=duplicates,
            ids=ids,
        )

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
        return f"all {rows:,} vectors" if fitted == rows else f"{fitted:,} of {rows:,} vectors"

    def counts(self) -> dict[str, int]:
        """For ``run.json``."""
        return {
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
        rows = {
            "documents": f"{self.scan.rows:,}",
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
) -> Outcome:
    """Describe and score every level.

    ``fits`` maps numbers of clusters to fits. Keywords and scores without labels use the first
    ``documents`` rows of the scan's sample, near-duplicates (from cosine ``similarity`` on; None
    for no search) all of it, unless the ``duplicates`` among all vectors are given. ``nesting``
    says how several levels lie in each other.
    """
    described = scan.sample.head(documents)
    finest = NearestCentroids(fits[max(fits)].centroids).assign(described.vectors)
    levels = []
    for k, fit in sorted(fits.items()):
        assigned = finest
        if k in nesting.groups:
            assigned = assign_by_group(described.vectors, fit.centroids, nesting.groups[k], finest)
        counted = census.coarser.get(k, census)
        levels.append(describe_level(described, assigned, fit, counted, has_labels=has_labels))
    scores = dict(levels[-1].scores)
    if len(levels) > 1:
        scores["levels"] = level_scores(levels)
    notices = find_notices(scan, census, described)
    if similarity is not None:
        searched = len(scan.sample) if duplicates is None else scan.rows
        if duplicates is None:
            found = find_duplicates(scan.sample.vectors, similarity)
            nearest = NearestCentroids(levels[-1].fit.centroids)
            ids = nearest.assign(scan.sample.vectors).cluster_ids
            duplicates = duplicates_table(found, scan.sample.ids, ids)
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
    )


def describe_level(
    documents: Sample, assigned: Assignment, fit: Fit, census: Census, *, has_labels: bool
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
    found = []
    shared = levels[-1].census.shared
    for coarser, level in zip([None, *levels], levels, strict=False):
        row = {name: level.scores[name] for name in _SCORES_OF_A_LEVEL}
        if coarser is not None:
            counts = shared[coarser.k]
            row |= {
                "in_level_of": coarser.k,
                "nested_share": float(counts.max(axis=0).sum() / counts.sum()),
            }
        found.append(row)
    return found


def find_notices(scan: Scan, census: Census, documents: Sample) -> list[str]:
    """Collapse, empty clusters, zero vectors, rows left out."""
    notices = []
    uneven = explain_collapse(census.sizes, documents.vectors) or explain_imbalance(census.sizes)
    if uneven:
        notices.append(uneven)
    empty = int((census.sizes == 0).sum())
    if empty:
        notices.append(f"Empty clusters: {empty}. Ask for fewer clusters, or fit on more vectors.")
    if scan.zeros:
        notices.append(f"Zero vectors: {scan.zeros:,}. They were clustered as points.")
    if len(scan.rejected):
        notices.append(f"Vectors left out: {len(scan.rejected):,}. rejected.parquet says why.")
    return notices


def _renumbered(table: pa.Table, ids: np.ndarray) -> pa.Table:
    column = table.schema.get_field_index("cluster_id")
    places = table.column("cluster_id").to_numpy()
    return table.set_column(column, "cluster_id", pa.array(ids[places], pa.int32()))


_OWN_TABLES = (
    r"(outliers|near_duplicates|confusion|levels|k_curve|rejected|(centroids|clusters)(_\d+)?)"
    r"\.parquet"
)


def write_tables(outcome: Outcome, folder: str) -> None:
    """Write tables and ``scores.json`` into ``folder``, each whole or not at all."""
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
    if outcome.choice is not None:
        tables["k_curve"] = curve_table(outcome.choice)
    if len(outcome.scan.rejected):
        tables["rejected"] = outcome.scan.rejected
    make_folder(folder)
    for name, table in tables.items():
        write_table(join(folder, f"{name}.parquet"), table)
    remove_stale(folder, _OWN_TABLES, {f"{name}.parquet" for name in tables})
    text = json.dumps(outcome.scores, indent=2, ensure_ascii=False) + "\n"
    write_bytes(join(folder, "scores.json"), text.encode())


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


def name_clusters(
    outcome: Outcome, ask: Callable[[Sequence[Sequence[Brief]]], list[list[str | None]]]
) -> Outcome:
    """The outcome with names for the largest clusters of each of its levels."""
    largest = [
        sorted((c for c in level.clusters if c.size), key=lambda c: (-c.size, c.cluster_id))
        for level in outcome.levels
    ]
    wanted = [clusters[:MOST_NAMED] for clusters in largest]
    answers = ask([[brief_of(cluster) for cluster in clusters] for clusters in wanted])
    levels = []
    for level, clusters, given in zip(outcome.levels, wanted, answers, strict=True):
        names = {c.cluster_id: name for c, name in zip(clusters, given, strict=True)}
        named = [replace(c, name=names.get(c.cluster_id)) for c in level.clusters]
        levels.append(replace(level, clusters=named))
    return replace(outcome, levels=levels)


def brief_of(cluster: Description) -> Brief:
    """Keywords and the beginnings of a few different documents."""
    texts = [example.text for example in [*cluster.central[:3], *cluster.diverse[1:]]]
    cut = [" ".join(text[: 2 * _EXCERPT_CHARACTERS].split()) for text in texts if text]
    short = dict.fromkeys(text[:_EXCERPT_CHARACTERS] for text in cut if text)
    return Brief(cluster.keywords, list(short)[:_EXCERPTS])


Namer = Callable[[str, Sequence[Sequence[Brief]]], list[list[str | None]]]
"""From a model's name and the briefs of each level to a name each, no two of a level alike; None
where the model gave none that serves."""
