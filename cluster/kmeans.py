"""k-means: vectors in, centroids out; from a sample in memory, or from vectors behind a seam.

In memory FAISS does the work. Over more vectors than memory holds, :func:`refine` runs Lloyd's
iterations on anything with the ``count``, ``dim`` and ``assign_to`` of FAISS's ``DatasetAssign``
(``faiss.contrib.clustering``), of which only the reduced totals come back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Protocol

import faiss
import numpy as np
import scipy.sparse
from faiss.contrib.clustering import reassign_centroids

from cluster.assign import NearestCentroids
from cluster.distances import squared_lengths
from cluster.errors import InputError

_FIXED_POINT_BITS = 62
_SUMMED_AT_A_TIME = 4096
TWO_LEVEL_FROM = 2_000
"""Number of clusters from which fitting in two levels is the default."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """Fitted centroids, largest cluster first, and how the fit went."""

    centroids: np.ndarray
    """float32 (k, d)."""
    sizes: np.ndarray
    """int64 (k,), vectors of the fit that lie nearest to each centroid."""
    inertia: float
    """Sum of squared distances of the fitted vectors to their centroids."""
    vectors: int
    """Number of vectors the centroids were fitted on."""
    iterations: int
    reseeded: int
    """How often an empty cluster was given half of a large one."""


@dataclass(frozen=True)
class FitOptions:
    """How to fit; the same in memory and over vectors on disk."""

    seed: int = 0
    restarts: int = 1
    """Independent starts, of which the one with the lowest inertia is kept."""
    max_iterations: int = 25
    unit_norm: bool = False
    """Spherical k-means: centroids are scaled to length 1, as the vectors must be."""
    two_level: bool = False
    """Cluster into about sqrt(k) groups first, then each group."""


def fit_in_memory(
    vectors: np.ndarray, k: int, options: FitOptions, *, start: np.ndarray | None = None
) -> Fit:
    """Fit ``k`` centroids to ``vectors``, float32 (n, d), by FAISS: every row counts.

    Starts from k-means++ (D² sampling; AFK-MC², its Markov-chain approximation, for large k), or
    from the ``start`` centroids, whose order is then kept. Raises :class:`InputError` where there
    are fewer than ``k`` distinct vectors.
    """
    check_enough_vectors(vectors, k)
    if start is not None:
        centroids, iterations, reseeded = _train(vectors, k, options, start)
    elif options.two_level and k > 1:
        centroids, iterations, reseeded = _train_two_levels(vectors, k, options)
    else:
        centroids, iterations, reseeded = _train(vectors, k, options)
    totals = ArrayVectors(vectors).assign_to(centroids)
    fit = Fit(centroids, totals.counts, totals.error, len(vectors), iterations, reseeded)
    return fit if start is not None else largest_first(fit)


def check_enough_vectors(vectors: np.ndarray, k: int) -> None:
    """Raise :class:`InputError` unless ``vectors`` holds at least ``k`` distinct rows."""
    if k < 1:
        raise InputError(f"{k} clusters asked for; at least 1 is needed")
    if k > len(vectors):
        raise InputError(
            f"{k} clusters asked for, but there are only {len(vectors)} vectors to fit them on: "
            f"ask for at most {len(vectors)}, or fit on more"
        )
    distinct = count_distinct(vectors)
    if k > distinct:
        raise InputError(
            f"{k} clusters asked for, but only {distinct} of the {len(vectors)} vectors differ: "
            f"ask for at most {distinct} clusters"
        )


def count_distinct(vectors: np.ndarray) -> int:
    """Number of different rows of float32 (n, d), told apart by a 64-bit hash of their bits."""
    bits = np.ascontiguousarray(vectors + np.float32(0)).view(np.uint32)
    weights = np.random.default_rng(0).integers(1, 2**63, bits.shape[1], dtype=np.uint64) | 1
    hashes = np.zeros(len(bits), dtype=np.uint64)
    for start in range(0, len(bits), 4096):
        block = bits[start : start + 4096].astype(np.uint64)
        hashes[start : start + 4096] = (block * weights).sum(axis=1, dtype=np.uint64)
    return len(np.unique(hashes))


def largest_first(fit: Fit) -> Fit:
    """The same fit with clusters renumbered by falling size, then by centroid coordinates."""
    columns = fit.centroids.T[::-1]
    order = np.lexsort([*columns, -fit.sizes])
    return replace(fit, centroids=fit.centroids[order], sizes=fit.sizes[order])


def _train(
    vectors: np.ndarray, k: int, options: FitOptions, start: np.ndarray | None = None
) -> tuple[np.ndarray, int, int]:
    """(centroids, iterations, clusters re-seeded) of FAISS's own k-means."""
    if k == len(vectors):
        return vectors.copy(), 0, 0
    means = faiss.Kmeans(
        vectors.shape[1],
        k,
        niter=options.max_iterations,
        nredo=1 if start is not None else options.restarts,
        seed=options.seed + 1,
        spherical=options.unit_norm,
        init_method=(
            faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
            if k < TWO_LEVEL_FROM
            else faiss.ClusteringInitMethod_AFK_MC2
        ),
        # FAISS by itself takes 256 points a centroid and says nothing.
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    # Among unit vectors the nearest by L2 is the nearest by angle, and inertia keeps its meaning.
    means.index = faiss.IndexFlatL2(vectors.shape[1])
    means.train(vectors, init_centroids=start)
    assert means.centroids is not None and means.iteration_stats is not None
    reseeded = int(sum(step["nsplit"] for step in means.iteration_stats))
    return means.centroids, len(means.iteration_stats), reseeded


def _train_two_levels(
    vectors: np.ndarray, k: int, options: FitOptions
) -> tuple[np.ndarray, int, int]:
    """Coarse clusters first, then k shared out among them by size: O(n·sqrt(k)) a step."""
    coarse, iterations, reseeded = _train(vectors, max(1, round(np.sqrt(k))), options)
    members = NearestCentroids(coarse).nearest(vectors)[:, 0]
    order = np.argsort(members, kind="stable")
    ends = np.cumsum(np.bincount(members, minlength=len(coarse)))
    shares = np.diff(ends * k // ends[-1], prepend=0)
    found = []
    for group, share in zip(np.split(order, ends[:-1]), shares, strict=True):
        if share:
            centroids, steps, splits = _train(vectors[group], int(share), options)
            found.append(centroids)
            iterations, reseeded = max(iterations, steps), reseeded + splits
    return np.vstack(found), iterations, reseeded


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


def refine(vectors: Vectors, start: np.ndarray, options: FitOptions) -> Fit:
    """Lloyd's iterations over all ``vectors`` from the ``start`` centroids, float32 (k, d).

    Stops when no centroid moves, or after ``options.max_iterations``. An empty cluster takes half
    of a large one, as in FAISS.
    """
    centroids = np.array(start, dtype=np.float32)
    random = np.random.RandomState(options.seed % 2**32)
    reseeded = 0
    for iteration in range(options.max_iterations + 1):
        totals = vectors.assign_to(centroids)
        log.info("iteration %d: inertia %.6g", iteration, totals.error)
        moved, splits = _means(totals, centroids, random, options)
        if iteration == options.max_iterations or np.array_equal(moved, centroids):
            break
        centroids, reseeded = moved, reseeded + splits
    return Fit(centroids, totals.counts, totals.error, vectors.count(), iteration, reseeded)


def _means(
    totals: Totals, centroids: np.ndarray, random: np.random.RandomState, options: FitOptions
) -> tuple[np.ndarray, int]:
    counts = totals.counts.copy()
    means = centroids.copy()
    filled = counts > 0
    means[filled] = (totals.sums[filled] / counts[filled, None]).astype(np.float32)
    splits = reassign_centroids(counts, means, random) if counts.max() > 1 else 0
    if options.unit_norm:
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
        largest = float(np.abs(self._vectors).max(initial=0))
        sums = FixedPointSums(len(centroids), self.dim(), self.count(), largest)
        nearest = NearestCentroids(centroids)
        for start in range(0, self.count(), 16_384):
            block = self._vectors[start : start + 16_384]
            sums.add(block, nearest.nearest(block)[:, 0])
        return sums.totals(centroids)


class FixedPointSums:
    """Sums of vectors per centroid that come out the same in whatever order they are added.

    Values become 64-bit integers on a scale that cannot overflow: integer addition is exact, so
    blocks, workers and file order leave no trace. With a million unit vectors a step of the scale
    is 2**-42, far below float32's own rounding.
    """

    def __init__(self, k: int, dimension: int, count: int, largest: float) -> None:
        """For at most ``count`` vectors with no coordinate beyond ``largest`` in size."""
        squared = max(largest, largest * largest * dimension, 1e-30)
        headroom = int(np.ceil(np.log2(max(count, 1)))) + 1
        self._bits = _FIXED_POINT_BITS - headroom - int(np.ceil(np.log2(max(largest, 1e-30))))
        self._square_bits = _FIXED_POINT_BITS - headroom - int(np.ceil(np.log2(squared)))
        self.counts = np.zeros(k, dtype=np.int64)
        self.sums = np.zeros((k, dimension), dtype=np.int64)
        self.squares = 0

    def add(self, block: np.ndarray, cluster_ids: np.ndarray) -> None:
        """Add rows, float32 (n, d), to the sums of their clusters, int (n,)."""
        k = len(self.counts)
        scale = np.float32(2.0**self._bits)
        for start in range(0, len(block), _SUMMED_AT_A_TIME):
            ids = cluster_ids[start : start + _SUMMED_AT_A_TIME]
            fixed = (block[start : start + _SUMMED_AT_A_TIME] * scale).astype(np.int64)
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
