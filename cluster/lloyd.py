"""Lloyd's iterations over vectors that need not fit in memory, nor lie on one machine.

:func:`refine` runs on anything with the ``count``, ``dim`` and ``assign_to`` of FAISS's
``DatasetAssign`` (``faiss.contrib.clustering``); only reduced totals come back through that seam.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse
from faiss.contrib.clustering import reassign_centroids

from cluster.assign import NearestCentroids
from cluster.distances import fixed_point_bits, squared_lengths

_SUMMED_AT_A_TIME = 4_096
_ROWS_AT_A_TIME = 16_384

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Totals:
    """What all vectors add to one iteration, whoever holds them."""

    counts: np.ndarray
    """int64 (k,), vectors nearest to each centroid."""
    sums: np.ndarray
    """float64 (k, d), sums of those vectors."""
    error: float
    """Sum of squared distances to the nearest centroid."""


class Vectors(Protocol):
    """The seam of FAISS's ``DatasetAssign``: what k-means asks of its vectors."""

    def count(self) -> int:
        """Number of vectors."""

    def dim(self) -> int:
        """Their dimension."""

    def assign_to(self, centroids: np.ndarray) -> Totals:
        """Assign every vector to its nearest centroid and add up."""


@dataclass(frozen=True)
class Refined:
    """Where Lloyd's iterations ended."""

    centroids: np.ndarray
    """float32 (k, d)."""
    counts: np.ndarray
    """int64 (k,), vectors nearest to each centroid."""
    error: float
    iterations: int
    reseeded: int


def refine(
    vectors: Vectors,
    start: np.ndarray,
    *,
    max_iterations: int,
    unit_norm: bool = False,
    seed: int = 0,
) -> Refined:
    """Lloyd's iterations over all ``vectors`` from the ``start`` centroids, float32 (k, d).

    Stops when no centroid moves. An empty cluster takes half of a large one, as in FAISS.
    ``unit_norm`` scales centroids to length 1 (spherical k-means).
    """
    centroids = np.array(start, dtype=np.float32)
    random = np.random.RandomState(seed % 2**32)
    reseeded = 0
    for iteration in range(max_iterations + 1):
        totals = vectors.assign_to(centroids)
        log.info("iteration %d: inertia %.6g", iteration, totals.error)
        if iteration == max_iterations:
            break
        moved, splits = _means(totals, centroids, random, unit_norm)
        if np.array_equal(moved, centroids):
            break
        centroids, reseeded = moved, reseeded + splits
    return Refined(centroids, totals.counts, totals.error, iteration, reseeded)


def _means(
    totals: Totals, centroids: np.ndarray, random: np.random.RandomState, unit_norm: bool
) -> tuple[np.ndarray, int]:
    counts = totals.counts.copy()
    means = centroids.copy()
    filled = counts > 0
    means[filled] = (totals.sums[filled] / counts[filled, None]).astype(np.float32)
    splits = reassign_centroids(counts, means, random) if counts.max() > 1 else 0
    if unit_norm:
        lengths = np.sqrt(squared_lengths(means))
        means /= np.where(lengths > 0, lengths, 1)[:, None].astype(np.float32)
    return means, splits


class ArrayVectors:
    """:class:`Vectors` in one process's memory."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    def count(self) -> int:
        """Number of vectors."""
        return len(self._vectors)

    def dim(self) -> int:
        """Their dimension."""
        return int(self._vectors.shape[1])

    def assign_to(self, centroids: np.ndarray) -> Totals:
        """Assign every vector to its nearest centroid and add up."""
        blocks = [
            self._vectors[start : start + _ROWS_AT_A_TIME]
            for start in range(0, self.count(), _ROWS_AT_A_TIME)
        ]
        largest = max((float(np.abs(block).max(initial=0)) for block in blocks), default=0.0)
        return sum_by_cluster(blocks, centroids, self.count(), largest).totals(centroids)


def sum_by_cluster(
    blocks: Iterable[np.ndarray], centroids: np.ndarray, count: int, largest: float
) -> FixedPointSums:
    """Assign blocks of vectors, float32 (n, d), to ``centroids`` and sum them by cluster.

    ``count`` and ``largest`` bound all vectors that will be summed, here and by other workers.
    """
    sums = FixedPointSums(centroids.shape, count, largest)
    nearest = NearestCentroids(centroids)
    for block in blocks:
        sums.add(block, nearest.nearest(block)[:, 0])
    return sums


class FixedPointSums:
    """Sums of vectors per centroid that come out the same in whatever order they are added."""

    def __init__(self, shape: tuple[int, ...], count: int, largest: float) -> None:
        """``shape`` (k, d), for at most ``count`` vectors with no coordinate beyond ``largest``."""
        k, dimension = shape
        self._bits = fixed_point_bits(count, largest)
        self._square_bits = fixed_point_bits(count, largest * largest * dimension)
        self.counts = np.zeros(k, dtype=np.int64)
        self.sums = np.zeros((k, dimension), dtype=np.int64)
        self.squares = 0

    def add(self, block: np.ndarray, cluster_ids: np.ndarray) -> None:
        """Add rows, float32 (n, d), to the sums of their clusters, int (n,)."""
        k = len(self.counts)
        step = max(_SUMMED_AT_A_TIME, k)
        for start in range(0, len(block), step):
            ids = cluster_ids[start : start + step]
            fixed = np.ldexp(block[start : start + step], self._bits).astype(np.int64)
            ones = np.ones(len(ids), dtype=np.int64)
            members = scipy.sparse.csc_array((ones, ids, np.arange(len(ids) + 1)), (k, len(ids)))
            self.sums += members @ fixed
        self.counts += np.bincount(cluster_ids, minlength=k)
        squares = np.ldexp(squared_lengths(block), self._square_bits).astype(np.int64)
        self.squares += int(squares.sum())

    def merge(self, other: FixedPointSums) -> None:
        """Add what another worker summed."""
        self.counts += other.counts
        self.sums += other.sums
        self.squares += other.squares

    def totals(self, centroids: np.ndarray) -> Totals:
        """The sums as numbers, and the error from sum |x|² - 2 sum x·c + sum |c|²."""
        sums = np.ldexp(self.sums.astype(np.float64), -self._bits)
        squares = np.ldexp(float(self.squares), -self._square_bits)
        wide = centroids.astype(np.float64)
        error = squares - 2 * np.sum(sums * wide) + self.counts @ squared_lengths(centroids)
        return Totals(self.counts, sums, max(0.0, float(error)))
