"""What a clustering found, as the tables that it writes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from cluster.census import Census
from cluster.describe import Description
from cluster.duplicates import Decisions
from cluster.hierarchy import Nesting
from cluster.num_clusters import Choice
from pipelines.runtime.arrow import FINGERPRINT_KEY, vectors_to_column

OUTLIER_DEVIATIONS = 3.0


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
    table = pa.table(
        {
            "cluster_id": pa.array(range(len(centroids)) if ids is None else ids, pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "centroid": vectors_to_column(centroids, pa.float32()),
        }
    )
    if fingerprint is None:
        return table
    return table.replace_schema_metadata({FINGERPRINT_KEY: fingerprint.encode()})


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
    labels, counts = list(census.labels), np.array(list(census.labels.values()))
    rows, clusters = np.nonzero(counts)
    return pa.table(
        {
            "label": pa.array([labels[row] for row in rows], pa.string()),
            "cluster_id": pa.array(clusters, pa.int32()),
            "documents": counts[rows, clusters],
        }
    )


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
