"""What a clustering found: described, scored and written as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.assign import NearestCentroids
from cluster.census import Census
from cluster.describe import Description, describe_clusters
from cluster.duplicates import find_duplicates
from cluster.kmeans import Fit
from cluster.metrics import MEANINGS, explain_collapse, score_clustering
from cluster.num_clusters import Choice
from cluster.sample import Sample, Scan
from cluster.storage import join, write_table, write_text
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


@dataclass(frozen=True)
class Outcome:
    """One clustering, described and scored."""

    scan: Scan
    fits: Mapping[int, Fit]
    """Number of clusters -> fit; the largest number is the level that cluster_id speaks of."""
    choice: Choice | None
    """How the number of clusters was chosen, where it was."""
    census: Census
    documents: Sample
    """The sample that keywords, examples, the map and scores without labels come from."""
    cluster_ids: np.ndarray
    """int32 (n,), clusters of ``documents``."""
    clusters: list[Description]
    scores: dict[str, Any]
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
        clusters = [replace(c, cluster_id=int(ids[c.cluster_id])) for c in self.clusters]
        return replace(
            self,
            cluster_ids=ids[self.cluster_ids],
            clusters=clusters,
            outliers=outliers,
            duplicates=duplicates,
            ids=ids,
        )

    @property
    def fit(self) -> Fit:
        """The finest level's fit."""
        return self.fits[max(self.fits)]

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
    """Describe and score the finest level.

    Keywords and scores without labels use the first ``documents`` rows of the scan's sample,
    near-duplicates (from cosine ``similarity`` on; None for no search) all of it.
    """
    assigned = NearestCentroids(fits[max(fits)].centroids).assign(scan.sample.vectors)
    ids, distances = assigned.cluster_ids, assigned.distances
    described = scan.sample.head(documents)
    clusters = describe_clusters(census, described, ids[:documents], distances[:documents])
    confusion = np.array(list(census.labels.values())).reshape(-1, len(census.sizes))
    scores = score_clustering(
        census.sizes,
        census.inertia,
        confusion if has_labels else None,
        described.vectors[:SCORED_DOCUMENTS],
        ids[: len(described)][:SCORED_DOCUMENTS],
    )
    if len(fits) > 1:
        scores["levels"] = level_scores(census)
    notices = find_notices(scan, census, described)
    duplicates = None
    if similarity is not None:
        found = find_duplicates(scan.sample.vectors, ids, distances, similarity)
        duplicates = duplicates_table(found, scan.sample.ids, ids)
        scores["near_duplicates"] = {
            "count": len(found.rows),
            "similarity": similarity,
            "searched": len(scan.sample),
            "sliced_clusters": found.sliced_clusters,
        }
    return Outcome(
        scan,
        fits,
        choice,
        census,
        described,
        ids[: len(described)],
        clusters,
        scores,
        outliers_table(census),
        duplicates,
        notices,
    )


def level_scores(census: Census) -> list[dict[str, Any]]:
    """For each level but the coarsest, the share of documents that lie in their cluster's parent.

    1 means that every cluster lies in one cluster of the next coarser level.
    """
    found = []
    for coarse, fine in pairwise(census.plan.levels):
        shared = census.shared[coarse]
        nested = float(shared.max(axis=0).sum() / shared.sum())
        found.append({"num_clusters": fine, "in_level_of": coarse, "nested_share": nested})
    return found


def find_notices(scan: Scan, census: Census, documents: Sample) -> list[str]:
    """Collapse, empty clusters, zero vectors, rows left out."""
    notices = []
    collapse = explain_collapse(census.sizes, documents.vectors)
    if collapse:
        notices.append(collapse)
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
    found = {
        "centroids": centroids_table(outcome.fit.centroids, outcome.census.sizes),
        "clusters": clusters_table(outcome.clusters, outcome.documents.ids.type),
        "outliers": outcome.outliers,
    }
    for k in outcome.census.plan.levels[:-1]:
        found[f"centroids_{k}"] = centroids_table(
            outcome.fits[k].centroids, outcome.census.shared[k].sum(axis=1)
        )
    if outcome.duplicates is not None:
        found["near_duplicates"] = outcome.duplicates
    if outcome.census.labels:
        found["confusion"] = confusion_table(outcome.census)
    if len(outcome.fits) > 1:
        found["levels"] = levels_table(outcome.census)
    if outcome.choice is not None:
        found["k_curve"] = curve_table(outcome.choice)
    if len(outcome.scan.rejected):
        found["rejected"] = outcome.scan.rejected
    for name, table in found.items():
        write_table(join(folder, f"{name}.parquet"), table)
    text = json.dumps(outcome.scores, indent=2, ensure_ascii=False) + "\n"
    write_text(join(folder, "scores.json"), text)
