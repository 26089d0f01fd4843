"""k-means in memory, by FAISS: vectors in, centroids out.

Every row that is passed in counts; what is a sample and what is everything, the caller says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import faiss
import numpy as np

from cluster.assign import NearestCentroids, flat_index
from cluster.lloyd import ArrayVectors, Vectors, refine
from pipelines.runtime.errors import InputError

TWO_LEVEL_FROM = 2_000
"""Number of clusters from which fitting in two levels is the default."""
_SEEDED_ON = 2_048
_SEEDED_ON_PER_CLUSTER = 10
_TRIED_ON = 20_000
_TRIED_ON_PER_CLUSTER = 50
_TRIAL_ITERATIONS = 6
_SETTLED = 1e-5
_REPAIR_ITERATIONS = 3
_REPAIR_GROUPS = 8


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

    @classmethod
    def standing(cls, centroids: np.ndarray) -> Fit:
        """Centroids, float32 (k, d), that were fitted elsewhere."""
        return cls(centroids, np.zeros(len(centroids), np.int64), 0.0, 0, 0, 0)


@dataclass(frozen=True)
class FitOptions:
    """How to fit; the same in memory and over vectors on disk."""

    seed: int = 0
    restarts: int = 1
    """Independent starts, of which the one with the lowest inertia is kept."""
    max_iterations: int = 25
    """Iterations at most; fewer where the inertia falls by less than a hundred-thousandth."""
    unit_norm: bool = False
    """Spherical k-means: centroids are scaled to length 1, as the vectors must be."""
    two_level: bool = False
    """Cluster into about sqrt(k) groups first, then each group."""


def fit_in_memory(
    vectors: np.ndarray, k: int, options: FitOptions, *, start: np.ndarray | None = None
) -> Fit:
    """Fit ``k`` centroids to ``vectors``, float32 (n, d).

    Starts from greedy k-means++, or from the ``start`` centroids, whose order is then kept.
    Raises :class:`InputError` where there are fewer than ``k`` distinct vectors.
    """
    check_enough_vectors(vectors, k)
    if options.two_level and start is None and k > 1:
        trained = _train_two_levels(vectors, k, options)
    else:
        trained = _train(vectors, k, options, start)
    totals = ArrayVectors(vectors).assign_to(trained.centroids)
    fit = Fit(
        trained.centroids,
        totals.counts,
        totals.error,
        len(vectors),
        trained.iterations,
        trained.reseeded,
    )
    return fit if start is not None else in_order(fit, by_size(fit))


def refine_on_all(vectors: Vectors, first: Fit, options: FitOptions) -> Fit:
    """Go on from a ``first`` fit over all ``vectors``, wherever they are, in its order."""
    refined = refine(
        vectors,
        first.centroids,
        max_iterations=options.max_iterations,
        unit_norm=options.unit_norm,
        seed=options.seed,
    )
    return Fit(
        refined.centroids,
        refined.counts,
        refined.error,
        vectors.count(),
        refined.iterations,
        first.reseeded + refined.reseeded,
    )


def check_enough_vectors(vectors: np.ndarray, k: int) -> None:
    """Raise :class:`InputError` unless ``vectors`` holds at least ``k`` distinct rows."""
    if k < 1:
        raise InputError(f"{k} clusters asked for; at least 1 is needed")
    if k > len(vectors):
        raise InputError(
            f"{k} clusters asked for, but there are only {len(vectors)} vectors to fit them on: "
            f"ask for at most {len(vectors)}, or fit on more"
        )
    if k <= count_distinct(vectors[: _TRIED_ON_PER_CLUSTER * k]):
        return
    distinct = count_distinct(vectors)
    if k > distinct:
        raise InputError(
            f"{k} clusters asked for, but only {distinct} of the {len(vectors)} vectors differ: "
            f"ask for at most {distinct} clusters"
        )


def count_distinct(vectors: np.ndarray) -> int:
    """Number of different rows of float32 (n, d), told apart by a 64-bit hash of their bits."""
    weights = np.random.default_rng(0).integers(1, 2**63, vectors.shape[1], dtype=np.uint64) | 1
    hashes = np.zeros(len(vectors), dtype=np.uint64)
    for start in range(0, len(vectors), 4096):
        # Adding zero makes -0.0 and 0.0, which are equal, the same bits.
        block = (vectors[start : start + 4096] + np.float32(0)).view(np.uint32).astype(np.uint64)
        hashes[start : start + 4096] = (block * weights).sum(axis=1, dtype=np.uint64)
    return len(np.unique(hashes))


def by_size(fit: Fit) -> np.ndarray:
    """int64 (k,): the clusters by falling size, then by centroid coordinates."""
    return np.lexsort([*fit.centroids.T[::-1], -fit.sizes])


def in_order(fit: Fit, order: np.ndarray) -> Fit:
    """The same fit with its clusters in another ``order``, int64 (k,)."""
    return replace(fit, centroids=fit.centroids[order], sizes=fit.sizes[order])


@dataclass(frozen=True)
class _Trained:
    centroids: np.ndarray
    objective: float
    iterations: int
    reseeded: int


def _train(
    vectors: np.ndarray, k: int, options: FitOptions, start: np.ndarray | None = None
) -> _Trained:
    """The best of several starts of FAISS's k-means.

    Of many vectors the first are enough to tell starts apart: on 200,000 × 576 a few iterations on
    50 vectors a centroid rank them as all iterations on all vectors do, and only the best goes on.
    """
    if k == len(vectors):
        return _Trained(vectors.copy(), 0.0, 0, 0)
    if start is not None:
        return _train_once(vectors, k, options, start, options.seed)
    tried_on = max(_TRIED_ON, _TRIED_ON_PER_CLUSTER * k)
    if options.restarts == 1 or len(vectors) <= tried_on:
        return _best_of(vectors, k, options)
    trial = replace(options, max_iterations=min(_TRIAL_ITERATIONS, options.max_iterations))
    best = _best_of(vectors[:tried_on], k, trial)
    return _train_once(vectors, k, options, best.centroids, options.seed)


def _best_of(vectors: np.ndarray, k: int, options: FitOptions) -> _Trained:
    """Train from every start; the lowest inertia wins, of equals the first."""
    found = []
    for restart in range(options.restarts):
        seed = options.seed + restart
        seeds = seed_centroids(vectors, k, seed) if k < TWO_LEVEL_FROM else None
        found.append(_train_once(vectors, k, options, seeds, seed))
    return min(found, key=lambda trained: trained.objective)


def _train_once(
    vectors: np.ndarray,
    k: int,
    options: FitOptions,
    start: np.ndarray | None,
    seed: int,
    index: faiss.Index | None = None,
) -> _Trained:
    means = faiss.Kmeans(
        vectors.shape[1],
        k,
        niter=options.max_iterations,
        seed=(seed + 1) % 2**31,  # FAISS takes 31 bits
        spherical=options.unit_norm,
        # Only used without a start: a chain that approximates k-means++ where k is large.
        init_method=faiss.ClusteringInitMethod_AFK_MC2,
        # FAISS by itself takes 256 points a centroid and says nothing.
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
        early_stop_threshold=_SETTLED,
    )
    # Among unit vectors the nearest by L2 is the nearest by angle, and inertia keeps its meaning.
    means.index = flat_index(vectors.shape[1]) if index is None else index
    means.train(vectors, init_centroids=start)
    assert means.centroids is not None and means.iteration_stats is not None
    steps = means.iteration_stats
    reseeded = int(sum(step["nsplit"] for step in steps))
    return _Trained(means.centroids, steps[-1]["obj"], len(steps), reseeded)


def seed_centroids(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """``k`` rows far from each other to start from, float32 (k, d), by greedy k-means++.

    Each is the best of a few drawn with probability proportional to squared distance from those
    chosen (Arthur and Vassilvitskii 2007). Draws among 10 rows a centroid, at least 2,048.
    scikit-learn's ``kmeans_plusplus`` on the same rows took 3 to 4 times as long for 256 centroids
    of 576 and of 128 numbers, for fits of 0.06% less inertia
    (``python benchmarks/kmeans.py --only seeding``).
    """
    random = np.random.default_rng(seed)
    rows = min(len(vectors), max(_SEEDED_ON, _SEEDED_ON_PER_CLUSTER * k))
    pool = vectors[np.sort(random.choice(len(vectors), rows, replace=False))]
    trials = 2 + int(np.log(k))
    lengths = np.einsum("ij,ij->i", pool, pool)
    chosen = [int(random.integers(rows))]
    nearest = _to_candidates(pool, lengths, chosen)[0]
    while len(chosen) < k:
        shares = np.cumsum(nearest, dtype=np.float64)
        drawn = np.searchsorted(shares, random.random(trials) * shares[-1], side="right")
        candidates = np.minimum(drawn, rows - 1)
        remaining = np.minimum(_to_candidates(pool, lengths, candidates), nearest)
        best = int(remaining.sum(axis=1).argmin())
        chosen.append(int(candidates[best]))
        nearest = remaining[best]
        nearest[chosen] = 0
    return pool[chosen]


def _to_candidates(
    pool: np.ndarray, lengths: np.ndarray, candidates: np.ndarray | list[int]
) -> np.ndarray:
    """Squared distances, float32 (candidates, rows); rounding may leave a little below zero."""
    products = pool[candidates] @ pool.T
    return np.maximum(lengths[candidates][:, None] + lengths - 2 * products, 0)


def _train_two_levels(vectors: np.ndarray, k: int, options: FitOptions) -> _Trained:
    """Coarse clusters first, then k shared out among them by size: O(n·sqrt(k)) a step.

    A few more iterations over all vectors then move those near the edge of a coarse cluster over
    it: each is compared with the centroids of its nearest coarse clusters only.
    """
    coarse = _train(vectors, max(1, round(np.sqrt(k))), options)
    members = NearestCentroids(coarse.centroids).nearest(vectors)[:, 0]
    order = np.argsort(members, kind="stable")
    ends = np.cumsum(np.bincount(members, minlength=len(coarse.centroids)))
    shares = np.diff(ends * k // ends[-1], prepend=0)
    parts = [
        _train(vectors[group], int(share), options)
        for group, share in zip(np.split(order, ends[:-1]), shares, strict=True)
        if share
    ]
    repair = replace(options, max_iterations=_REPAIR_ITERATIONS)
    index = _index_by_group(coarse.centroids)
    start = np.vstack([part.centroids for part in parts])
    final = _train_once(vectors, k, repair, start, options.seed, index)
    return _Trained(
        final.centroids,
        final.objective,
        coarse.iterations + max(part.iterations for part in parts) + final.iterations,
        coarse.reseeded + sum(part.reseeded for part in parts) + final.reseeded,
    )


def _index_by_group(coarse: np.ndarray) -> faiss.Index:
    """An index that compares a vector with what lies in its nearest groups, float32 (groups, d)."""
    groups, dimension = coarse.shape
    quantizer = faiss.IndexFlatL2(dimension)
    quantizer.add(coarse)
    index = faiss.IndexIVFFlat(quantizer, dimension, groups)
    index.nprobe = min(_REPAIR_GROUPS, groups)
    index.is_trained = True
    return index


_TRIALS = 8


def start_from(
    centroids: np.ndarray, sizes: np.ndarray, k: int, vectors: np.ndarray, *, seed: int
) -> np.ndarray:
    """float32 (k, d): earlier ``centroids``, float32 (m, d), as the start of ``k`` clusters.

    Where there are too many, those of the smallest ``sizes``, int64 (m,), are left out. Where
    there are too few, rows of ``vectors``, float32 (n, d), are added, each the best of a few drawn
    with probability proportional to squared distance from all centroids so far (greedy k-means++,
    Arthur and Vassilvitskii 2007).
    """
    if k <= len(centroids):
        kept = np.sort(np.argsort(-sizes, kind="stable")[:k])
        return np.ascontiguousarray(centroids[kept], dtype=np.float32)
    random = np.random.default_rng(seed)
    start = np.ascontiguousarray(centroids, dtype=np.float32)
    nearest = _squared_distances(start, vectors)
    while len(start) < k:
        shares = np.cumsum(nearest)
        drawn = np.searchsorted(shares, random.random(_TRIALS) * shares[-1], side="right")
        candidates = vectors[np.minimum(drawn, len(vectors) - 1)]
        left = [np.minimum(nearest, _squared_distances(c[None], vectors)) for c in candidates]
        best = int(np.argmin([distances.sum() for distances in left]))
        start, nearest = np.vstack([start, candidates[best][None]]), left[best]
    return start


def _squared_distances(centroids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return NearestCentroids(centroids).assign(vectors).distances ** 2
