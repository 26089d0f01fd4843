"""Assign a shard's documents, write their rows, and keep what scores and the report add up.

A :class:`Census` of one shard is small, and those of all shards merge to the same whole in any
order: counts are integers, and the documents kept are chosen by distance and hash of id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.assign import Assignment, NearestCentroids
from cluster.storage import written_whole
from cluster.vectors import Block, Shard, VectorSource, hash_ids, read_blocks

TEXT_CHARACTERS = 600
_FIXED_POINT = 2.0**30
"""Distances are summed as integers of this scale, so that sums do not depend on order."""


@dataclass
class Census:
    """What all documents of a level of clustering add up to."""

    sizes: np.ndarray
    """int64 (k,)."""
    distance_sums: np.ndarray
    """int64 (k,), distances to the centroid in fixed point."""
    square_sums: list[int]
    """k squared distances summed, in fixed point."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """label -> int64 (k,), its documents in each cluster."""
    nearest: pa.Table | None = None
    """The documents nearest to each centroid: cluster_id, distance, order, id, text, label."""
    farthest: pa.Table | None = None
    """Those farthest from it."""

    @property
    def inertia(self) -> float:
        """Sum of squared distances to the nearest centroid."""
        return sum(self.square_sums) / _FIXED_POINT

    def mean_distances(self) -> np.ndarray:
        """float64 (k,), NaN for empty clusters."""
        with np.errstate(invalid="ignore"):
            return self.distance_sums / _FIXED_POINT / self.sizes

    def distance_deviations(self) -> np.ndarray:
        """float64 (k,), standard deviation of the distances; NaN for empty clusters."""
        with np.errstate(invalid="ignore", divide="ignore"):
            squares = np.array([float(total) for total in self.square_sums]) / _FIXED_POINT
            return np.sqrt(np.maximum(squares / self.sizes - self.mean_distances() ** 2, 0))


def assign_shard(
    source: VectorSource,
    shard: Shard,
    levels: Mapping[int, np.ndarray],
    path: str,
    *,
    seed: int,
    kept: int,
) -> tuple[Census, dict[int, np.ndarray]]:
    """Assign the documents of one shard and write them to ``path`` as Parquet.

    ``levels`` maps a number of clusters to its centroids, float32 (k, d); the largest is the one
    that ``cluster_id`` speaks of, the others have a column ``cluster_id_K`` each. Returns the
    census of the finest level, and for every coarser one how many documents each pair
    (coarse, fine) shares, int64 (k, finest).
    """
    finest = max(levels)
    indexes = {k: NearestCentroids(centroids) for k, centroids in levels.items()}
    censuses = [empty_census(finest)]
    shared = {k: np.zeros((k, finest), dtype=np.int64) for k in levels if k != finest}
    writer = None
    with written_whole(path) as stream:
        for block in read_blocks(source, shard):
            assignment = indexes[finest].assign(block.vectors)
            coarser = {k: indexes[k].nearest(block.vectors)[:, 0] for k in shared}
            table = _to_table(block, assignment, coarser, source.columns.id)
            writer = writer or pq.ParquetWriter(stream, table.schema)
            writer.write_table(table)
            for k, ids in coarser.items():
                np.add.at(shared[k], (ids, assignment.cluster_ids), 1)
            censuses.append(_count(block, assignment, finest, seed, kept))
            if len(censuses) > 8:
                censuses = [merge_censuses(censuses, kept)]
        if writer is not None:
            writer.close()
    return merge_censuses(censuses, kept), shared


def empty_census(k: int) -> Census:
    """A census of nobody."""
    zeros = np.zeros(k, dtype=np.int64)
    return Census(zeros, zeros.copy(), [0] * k)


def merge_censuses(censuses: Iterable[Census], kept: int) -> Census:
    """The census of everyone counted in ``censuses``."""
    parts = list(censuses)
    k = len(parts[0].sizes)
    labels: dict[str, np.ndarray] = {}
    for part in parts:
        for label, counts in part.labels.items():
            labels[label] = labels.get(label, 0) + counts
    nearest = [part.nearest for part in parts if part.nearest is not None]
    farthest = [part.farthest for part in parts if part.farthest is not None]
    return Census(
        np.sum([part.sizes for part in parts], axis=0),
        np.sum([part.distance_sums for part in parts], axis=0),
        [sum(part.square_sums[cluster] for part in parts) for cluster in range(k)],
        dict(sorted(labels.items())),
        _first_of_each(pa.concat_tables(nearest), kept, 1.0) if nearest else None,
        _first_of_each(pa.concat_tables(farthest), kept, -1.0) if farthest else None,
    )


def _to_table(
    block: Block, assignment: Assignment, coarser: Mapping[int, np.ndarray], id_column: str
) -> pa.Table:
    columns = {
        id_column: block.ids,
        "cluster_id": assignment.cluster_ids,
        "distance": assignment.distances.astype(np.float32),
        "second_cluster_id": assignment.second_cluster_ids,
        "margin": assignment.margins.astype(np.float32),
    }
    columns |= {f"cluster_id_{k}": ids for k, ids in sorted(coarser.items())}
    return pa.table(columns)


def _count(block: Block, assignment: Assignment, k: int, seed: int, kept: int) -> Census:
    ids, distances = assignment.cluster_ids, assignment.distances
    fixed = np.rint(distances * _FIXED_POINT).astype(np.int64)
    squares = np.rint(distances**2 * _FIXED_POINT).astype(np.int64)
    sums = np.zeros(k, dtype=np.int64)
    square_sums = np.zeros(k, dtype=np.int64)
    np.add.at(sums, ids, fixed)
    np.add.at(square_sums, ids, squares)
    labels = {}
    if block.labels is not None:
        encoded = block.labels.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy()
        for code, label in enumerate(encoded.dictionary.to_pylist()):
            labels[label] = np.bincount(ids[codes == code], minlength=k)
    documents = pa.table({"cluster_id": ids, "distance": distances, "row": np.arange(len(ids))})
    documents = documents.append_column("order", pa.array(hash_ids(block.ids, seed)))
    ends = []
    for sign in (1.0, -1.0):
        chosen = _first_of_each(documents, kept, sign)
        rows = chosen.column("row").combine_chunks()
        table = chosen.drop_columns("row").append_column("id", block.ids.take(rows))
        for name, values in (("text", block.texts), ("label", block.labels)):
            if values is not None:
                short = values.take(rows).cast(pa.string()).to_pylist()
                short = [None if text is None else text[:TEXT_CHARACTERS] for text in short]
                table = table.append_column(name, pa.array(short, pa.string()))
        ends.append(table)
    return Census(
        np.bincount(ids, minlength=k), sums, square_sums.tolist(), labels, ends[0], ends[1]
    )


def _first_of_each(documents: pa.Table, kept: int, sign: float) -> pa.Table:
    """The ``kept`` documents of each cluster with the smallest (or, with -1, largest) distance."""
    clusters = documents.column("cluster_id").to_numpy()
    distances = documents.column("distance").to_numpy() * sign
    order = np.lexsort((documents.column("order").to_numpy(), distances, clusters))
    clusters = clusters[order]
    starts = np.searchsorted(clusters, clusters, side="left")
    return documents.take(pa.array(order[np.arange(len(order)) - starts < kept]))
