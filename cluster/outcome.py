"""What a clustering found: described, scored and written as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.assign import NearestCentroids
from cluster.census import Census
from cluster.describe import Description, describe_clusters
from cluster.duplicates import find_duplicates
from cluster.kmeans import Fit
from cluster.metrics import MEANINGS, explain_collapse, explain_imbalance, score_clustering
from cluster.num_clusters import Choice
from cluster.sample import Sample, Scan
from cluster.storage import delete_others, join, write_table, write_text
from cluster.tables import (
    centroids_table,
    clusters_table,
    confusion_table,
    curve_table,
    duplicates_table,
    levels_table,
    outliers_table,
)

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
) -> Outcome:
    """Describe and score every level.

    ``fits`` maps numbers of clusters to fits. Keywords and scores without labels use the first
    ``documents`` rows of the scan's sample, near-duplicates (from cosine ``similarity`` on; None
    for no search) all of it, within clusters of the finest level.
    """
    described = scan.sample.head(documents)
    levels = [
        describe_level(described, fits[k], census.coarser.get(k, census), has_labels=has_labels)
        for k in sorted(fits)
    ]
    scores = dict(levels[-1].scores)
    if len(levels) > 1:
        scores["levels"] = level_scores(levels)
    notices = find_notices(scan, census, described)
    duplicates = None
    if similarity is not None:
        assigned = NearestCentroids(levels[-1].fit.centroids).assign(scan.sample.vectors)
        ids, distances = assigned.cluster_ids, assigned.distances
        found = find_duplicates(scan.sample.vectors, ids, distances, similarity)
        duplicates = duplicates_table(found, scan.sample.ids, ids)
        scores["near_duplicates"] = {
            "count": len(found.rows),
            "similarity": similarity,
            "searched": len(scan.sample),
            "sliced_clusters": found.sliced_clusters,
        }
    return Outcome(
        scan, levels, choice, described, scores, outliers_table(census), duplicates, notices
    )


def describe_level(documents: Sample, fit: Fit, census: Census, *, has_labels: bool) -> Level:
    """Describe and score one level; its census is of all documents, ``documents`` a sample."""
    assigned = NearestCentroids(fit.centroids).assign(documents.vectors)
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


def write_tables(outcome: Outcome, folder: str) -> None:
    """Write tables and ``scores.json`` into ``folder``, each whole or not at all."""
    found = {"outliers": outcome.outliers}
    for level in outcome.levels:
        suffix = "" if level is outcome.levels[-1] else f"_{level.k}"
        id_type = outcome.documents.ids.type
        found[f"centroids{suffix}"] = centroids_table(level.fit.centroids, level.census.sizes)
        found[f"clusters{suffix}"] = clusters_table(level.clusters, id_type)
    if outcome.duplicates is not None:
        found["near_duplicates"] = outcome.duplicates
    if outcome.census.labels:
        found["confusion"] = confusion_table(outcome.census)
    if len(outcome.levels) > 1:
        found["levels"] = levels_table(outcome.census)
    if outcome.choice is not None:
        found["k_curve"] = curve_table(outcome.choice)
    if len(outcome.scan.rejected):
        found["rejected"] = outcome.scan.rejected
    for name, table in found.items():
        write_table(join(folder, f"{name}.parquet"), table)
    delete_others(folder, {f"{name}.parquet" for name in found})
    text = json.dumps(outcome.scores, indent=2, ensure_ascii=False) + "\n"
    write_text(join(folder, "scores.json"), text)
