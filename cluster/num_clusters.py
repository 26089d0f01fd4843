"""Choosing the number of clusters: read off a tree over a sample, and the reason is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

from cluster.assign import NearestCentroids
from cluster.distances import squared_lengths
from cluster.hierarchy import merge_clusters
from cluster.kmeans import FitOptions, count_distinct, fit_in_memory
from cluster.metrics import adjusted_rand

TRIED_VECTORS = 8_000
"""Vectors the numbers are tried on at most."""
_SILHOUETTE_VECTORS = 3_000
_RESAMPLES = 2
_STABLE = 0.7
_MICRO_CLUSTERS = 500
_VECTORS_A_MICRO_CLUSTER = 8
_ROWS_AT_ONCE = 500
_LEAST_SHARE = 1e-12
"""Of the largest inertia: what a smaller one, or none, counts as."""


@dataclass(frozen=True)
class Candidate:
    """One number of clusters and what speaks for it."""

    k: int
    inertia: float
    silhouette: float
    silhouette_standard_error: float
    stability: float
    """ARI, over all vectors, of centroids fitted on one half and on the other."""
    elbow: float = 0.0
    """How far the inertia's logarithm lies below the line from the first to the last candidate."""
    score: float = 0.0
    """Mean of silhouette, stability and elbow, each scaled to 0..1 over all candidates."""


@dataclass(frozen=True)
class Choice:
    """The number of clusters chosen, why, and all that was tried."""

    k: int
    reason: str
    candidates: list[Candidate]


def choose_num_clusters(
    vectors: np.ndarray, options: FitOptions, *, most: int | None = None
) -> Choice:
    """Choose from 2 to ``most`` clusters (default: the square root of n, 20 to 150).

    ``vectors``, float32 (n, d), are a random sample in random order. One k-means makes some hundred
    micro-clusters, which Ward's rule merges two by two: every number of clusters is a cut of that
    tree.
    """
    vectors = vectors[:TRIED_VECTORS]
    distinct = count_distinct(vectors)
    if distinct < 4:
        reason = f"only {distinct} different vectors: one cluster each"
        return Choice(distinct, reason, [])
    most = min(most or int(np.clip(np.sqrt(len(vectors)), 20, 150)), distinct // 2)
    # plain means, also of unit vectors: what a merge adds is then exact
    options = replace(options, restarts=1, two_level=False, unit_norm=False)
    tree = Tree.grow(vectors, most, options)
    stabilities = _stabilities(vectors, most, options)
    silhouettes = Silhouettes(vectors[:_SILHOUETTE_VECTORS], tree)
    tried = [
        Candidate(k, tree.inertia(k), *silhouettes.of_cut(cut), stabilities.get(k, 0.0))
        for k, cut in tree.cuts(most).items()
    ]
    ranked = in_order_of_score(tried)
    return Choice(ranked[0].k, _reason(ranked, len(vectors)), sorted(ranked, key=lambda c: c.k))


@dataclass(frozen=True)
class Tree:
    """Micro-clusters of vectors, merged two by two until one is left."""

    centroids: np.ndarray
    """float32 (m, d)."""
    merges: list[tuple[int, int, float]]
    """Of each of the m - 1 merges the cluster that stays, the one that joins it, and what that
    adds to the inertia."""
    least: float
    """Inertia of the micro-clusters."""

    @classmethod
    def grow(cls, vectors: np.ndarray, most: int, options: FitOptions) -> Tree:
        """The tree of ``vectors``, float32 (n, d), for cuts into ``most`` clusters and fewer."""
        wanted = max(most, min(_MICRO_CLUSTERS, len(vectors) // _VECTORS_A_MICRO_CLUSTER))
        micro = fit_in_memory(vectors, min(wanted, count_distinct(vectors)), options)
        return cls(micro.centroids, merge_clusters(micro.centroids, micro.sizes), micro.inertia)

    def cuts(self, most: int) -> dict[int, np.ndarray]:
        """By number of clusters from 2 to ``most``, ascending: the cluster of each micro-cluster.

        int64 (m,), from 0 on; not for numbers beyond the micro-clusters.
        """
        count = len(self.centroids)
        owners, found = np.arange(count), {count: np.arange(count)}
        for left, (stays, joins, _) in zip(range(count - 1, 1, -1), self.merges, strict=False):
            owners[owners == joins] = stays
            if left <= most:
                found[left] = np.unique(owners, return_inverse=True)[1]
        return {k: found[k] for k in sorted(found) if 2 <= k <= most}

    def inertia(self, k: int) -> float:
        """Sum of squared distances to the means of ``k`` clusters."""
        return self.least + sum(added for *_, added in self.merges[: len(self.centroids) - k])

    def micro_of(self, vectors: np.ndarray) -> np.ndarray:
        """int (n,): the micro-cluster that each of ``vectors`` lies in."""
        return NearestCentroids(self.centroids, count=1).nearest(vectors)[:, 0]


class Silhouettes:
    """Mean silhouette of every cut of a tree, from one pass over all pairs of vectors."""

    def __init__(self, vectors: np.ndarray, tree: Tree) -> None:
        """``vectors``, float32 (n, d), are those that the silhouette is of."""
        self._micro = tree.micro_of(vectors)
        points, rows = vectors.astype(np.float64), np.arange(len(vectors))
        squares, shape = squared_lengths(points), (len(points), len(tree.centroids))
        members = csr_array((np.ones(len(points)), (rows, self._micro)), shape)
        self._sums = np.empty(shape)  # distances to all of each micro-cluster
        for start in range(0, len(points), _ROWS_AT_ONCE):
            block = slice(start, start + _ROWS_AT_ONCE)
            squared = squares[block, None] + squares - 2 * (points[block] @ points.T)
            distances = np.sqrt(np.maximum(squared, 0))
            distances[np.arange(len(distances)), rows[block]] = 0
            self._sums[block] = distances @ members

    def of_cut(self, groups: np.ndarray) -> tuple[float, float]:
        """The mean over all vectors, and its standard error, of micro-clusters in ``groups``.

        As scikit-learn's: 0 for a vector that is alone; 0, 0 where all lie in one cluster.
        """
        k = int(groups.max()) + 1
        own, rows = groups[self._micro], np.arange(len(self._micro))
        sizes = np.bincount(own, minlength=k)
        if np.count_nonzero(sizes) < 2:
            return 0.0, 0.0
        micro = np.arange(len(groups))
        sums = self._sums @ csr_array((np.ones(len(groups)), (micro, groups)))
        within = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
        means = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.inf)
        means[rows, own] = np.inf
        other = means.min(axis=1)
        larger = np.maximum(within, other)
        values = np.where((sizes[own] > 1) & (larger > 0), (other - within) / larger, 0)
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _stabilities(vectors: np.ndarray, most: int, options: FitOptions) -> dict[int, float]:
    """Mean agreement (ARI), over all ``vectors``, of the trees of two random halves, by number.

    After Lange et al. 2004; not for numbers beyond the different vectors of a half.
    """
    agreements: dict[int, list[float]] = {}
    for resample in range(_RESAMPLES):
        order = np.random.default_rng([options.seed, resample]).permutation(len(vectors))
        one, other = (Tree.grow(vectors[half], most, options) for half in np.array_split(order, 2))
        places = one.micro_of(vectors), other.micro_of(vectors)
        others = other.cuts(most)
        for k, cut in one.cuts(most).items():
            if k in others:
                first, second = cut[places[0]], others[k][places[1]]
                cells = np.unique(first * k + second, return_counts=True)[1]
                found = adjusted_rand(cells, np.bincount(first), np.bincount(second))
                agreements.setdefault(k, []).append(found)
    return {k: sum(found) / _RESAMPLES for k, found in agreements.items()}


def in_order_of_score(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates with elbow and score, best first; of equals the smaller number."""
    candidates = sorted(candidates, key=lambda candidate: candidate.k)
    numbers = _scaled([candidate.k for candidate in candidates])
    inertias = np.array([candidate.inertia for candidate in candidates])
    elbows = 1 - _scaled(np.log(np.maximum(inertias, _LEAST_SHARE * inertias.max()))) - numbers
    parts = [
        _scaled([candidate.silhouette for candidate in candidates]),
        _scaled([candidate.stability for candidate in candidates]),
        _scaled(elbows),
    ]
    scores = np.mean(parts, axis=0)
    candidates = [
        replace(candidate, elbow=float(elbow), score=float(score))
        for candidate, elbow, score in zip(candidates, elbows, scores, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.k))


def _scaled(values: list[int] | list[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    width = np.ptp(array)
    return (array - array.min()) / width if width else np.zeros(len(array))


def _reason(ranked: list[Candidate], vectors: int) -> str:
    best, numbers = ranked[0], sorted(candidate.k for candidate in ranked)
    reason = (
        f"{best.k} clusters have the best mean of silhouette ({best.silhouette:.3f} ± "
        f"{best.silhouette_standard_error:.3f}), stability ({best.stability:.2f}) and elbow "
        f"({best.elbow:.2f}), each scaled over the {len(ranked)} numbers tried, "
        f"{numbers[0]} to {numbers[-1]}, on {vectors:,} vectors."
    )
    if len(ranked) > 1:
        reason += f" Next best: {ranked[1].k}."
    if best.stability < _STABLE:
        reason += (
            " No number stands out: under resampling its clusters agree only in part "
            f"(ARI {best.stability:.2f}), so a nearby number serves as well."
        )
    return reason
