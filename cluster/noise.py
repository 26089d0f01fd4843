"""Documents that belong to no dense region, told by their neighbours in a sample.

In: a sample of vectors. Out: a rule that says of any vector whether it is noise, from nothing but
the vector and the sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.assign import NearestCentroids
from cluster.distances import squared_distances_to
from pipelines.runtime.arrow import column_to_vectors, vectors_to_column

NOISE = -1
"""The ``cluster_id`` of documents that belong to no dense region."""
SAMPLED = 5_000
"""Documents of the sample that neighbours are sought in."""
_NEIGHBOURS = 5
_FEWEST = 50
_STRUCTURELESS = 2_000
_FENCE = 0.5


@dataclass(frozen=True)
class DenseRegions:
    """What lies where documents are dense.

    A document is noise whose fifth neighbour in a sample is farther than two limits: the
    median for documents without structure (normally distributed, with the mean, covariance and
    lengths of the sample), and half an interquartile range beyond the third quartile of the
    sample's own, so that blobs as dense as any have none. On labelled texts that distance told
    strangers from members better than the distance to the centroid, margins, sizes of
    micro-clusters and local outlier factors (``python benchmarks/kmeans.py --only noise``).
    """

    sample: np.ndarray
    """float32 (m, d)."""
    orders: np.ndarray
    """uint64 (m,), hashes of the sample's ids, by which its documents know themselves."""
    limit: float
    """Distance of the fifth neighbour beyond which a document is noise."""

    @classmethod
    def learn(cls, vectors: np.ndarray, orders: np.ndarray, seed: int) -> DenseRegions:
        """From ``vectors``, float32 (n, d), drawn at random, and hashes of ids, uint64 (n,)."""
        regions = cls(vectors[:SAMPLED].copy(), orders[:SAMPLED].copy(), float("inf"))
        if len(regions.sample) < _FEWEST:
            return regions
        finder = NoiseFinder(regions)
        low, high = np.quantile(finder.reach(regions.sample, regions.orders), (0.25, 0.75))
        alike = _structureless(regions.sample, seed)
        nobody = np.zeros(len(alike), dtype=bool)
        limit = max(np.median(finder.reach_of(alike, nobody)), high + _FENCE * (high - low))
        return cls(regions.sample, regions.orders, float(limit))

    def table(self) -> pa.Table:
        """``noise.parquet``: limit, the same in every row, order and vector of the sample."""
        limits = np.full(len(self.sample), self.limit)
        vectors = vectors_to_column(self.sample)
        return pa.table({"limit": limits, "order": self.orders, "vector": vectors})

    @classmethod
    def from_table(cls, table: pa.Table) -> DenseRegions:
        """Undo :meth:`table`."""
        sample = column_to_vectors(table["vector"])
        return cls(sample, table["order"].to_numpy(), float(table["limit"][0].as_py()))


class NoiseFinder:
    """Applies a rule; without one nothing is noise."""

    def __init__(self, regions: DenseRegions | None) -> None:
        self._regions = regions
        if regions is not None:
            self._index = NearestCentroids(regions.sample, count=_NEIGHBOURS + 1)

    def find(self, vectors: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """bool (n,): which of ``vectors``, float32 (n, d), with hashes of ids ``orders``, are."""
        if self._regions is None or not np.isfinite(self._regions.limit):
            return np.zeros(len(vectors), dtype=bool)
        return self.reach(vectors, orders) > self._regions.limit

    def reach(self, vectors: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """float64 (n,): distances to the fifth neighbour other than the document itself."""
        assert self._regions is not None
        return self.reach_of(vectors, np.isin(orders, self._regions.orders))

    def reach_of(self, vectors: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The same where ``own``, bool (n,), says which of them are in the sample themselves."""
        ids = self._index.nearest(vectors)
        place = np.where(own, _NEIGHBOURS, _NEIGHBOURS - 1)
        fifth = ids[np.arange(len(ids)), place]
        return np.sqrt(squared_distances_to(vectors, self._index.centroids, fifth))


def _structureless(sample: np.ndarray, seed: int) -> np.ndarray:
    """float32 (m, d): normally distributed, with the sample's mean, covariance and lengths."""
    random = np.random.default_rng(seed)
    wide = sample.astype(np.float64)
    mean = wide.mean(axis=0)
    spread, directions = np.linalg.eigh(np.cov(wide - mean, rowvar=False).reshape(len(mean), -1))
    drawn = random.standard_normal((_STRUCTURELESS, len(mean)))
    drawn = mean + (drawn * np.sqrt(np.maximum(spread, 0))) @ directions.T
    lengths = np.linalg.norm(drawn, axis=1, keepdims=True)
    wanted = random.choice(np.linalg.norm(wide, axis=1), len(drawn))[:, None]
    return (drawn * np.where(lengths > 0, wanted / np.maximum(lengths, 1e-300), 1)).astype(
        np.float32
    )


def mark_noise(cluster_ids: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """int32 (n,): ``cluster_ids`` with -1 where ``noise``, bool (n,)."""
    return np.where(noise, np.int32(NOISE), cluster_ids).astype(np.int32)
