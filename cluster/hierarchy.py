"""A tree over clusters: Ward's merging of weighted centroids, and its cuts, which nest exactly.

SciPy's ``linkage`` takes no weights; on points that are repeated instead it gives the same tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.distances import squared_distances_to, squared_lengths
from cluster.kmeans import Fit

_LIGHTEST = 1e-6
"""Weight of an empty cluster, so that it joins its nearest and moves nothing."""


@dataclass(frozen=True)
class Tree:
    """Merges of n clusters, cheapest first."""

    pairs: np.ndarray
    """int64 (n - 1, 2): the two clusters merged; the one made at step i is numbered n + i."""
    heights: np.ndarray
    """float64 (n - 1,), rising: Ward's distance, sqrt(2 a b / (a + b)) |x - y| for weights a, b."""

    def cut(self, k: int) -> np.ndarray:
        """int32 (n,): which of ``k`` groups each of the n clusters lies in, groups by first member.

        Every group of a larger ``k`` lies in one group of a smaller.
        """
        return np.unique(self._nodes(k), return_inverse=True)[1].astype(np.int32)

    def merge_heights(self, group: np.ndarray, k: int) -> np.ndarray:
        """float64 (k,): the height at which each group of a cut is merged; NaN for the last one.

        ``group``, int (n,), is that of :meth:`cut`, its groups numbered in any way.
        """
        n = len(self.pairs) + 1
        left = np.full(2 * n - 1, np.nan)
        left[self.pairs.ravel()] = np.repeat(self.heights, 2)
        heights = np.empty(k)
        heights[group] = left[self._nodes(k)]
        return heights

    def _nodes(self, k: int) -> np.ndarray:
        """int64 (n,): the node of the tree that stands for each cluster where ``k`` are left."""
        n = len(self.pairs) + 1
        parents = np.arange(2 * n - 1)
        for step, pair in enumerate(self.pairs[: n - k]):
            parents[pair] = n + step
        for node in range(2 * n - 2, -1, -1):
            parents[node] = parents[parents[node]]
        return parents[:n]


def merge_clusters(centroids: np.ndarray, weights: np.ndarray) -> Tree:
    """The tree of ``centroids``, float32 (n, d), that stand for ``weights`` points, (n,).

    Each step merges the two whose union adds least to the sum of squared distances (Ward 1963), by
    chains of nearest neighbours (Murtagh 1983): n² d operations, n d memory.
    """
    n = len(centroids)
    weight = np.maximum(weights.astype(np.float64), _LIGHTEST)
    points = centroids.astype(np.float64)
    points -= np.average(points, axis=0, weights=weight)
    squares = squared_lengths(points)
    names = np.arange(n)
    merged: list[tuple[int, int, float]] = []
    chain: list[int] = []
    size = n
    while size > 1:
        if not chain:
            chain.append(0)
        top = chain[-1]
        costs = _costs(points[:size], squares[:size], weight[:size], top)
        nearest = int(costs.argmin())
        if len(chain) > 1 and costs[chain[-2]] <= costs[nearest]:
            first, second = sorted((chain.pop(), chain.pop()))
            merged.append((int(names[first]), int(names[second]), float(costs[nearest])))
            total = weight[first] + weight[second]
            points[first] = (
                weight[first] * points[first] + weight[second] * points[second]
            ) / total
            squares[first], weight[first] = points[first] @ points[first], total
            size -= 1
            for array in (points, squares, weight, names):
                array[second] = array[size]
            chain = [second if place == size else place for place in chain]
        else:
            chain.append(nearest)
    return _in_order(merged, n)


def _costs(points: np.ndarray, squares: np.ndarray, weight: np.ndarray, of: int) -> np.ndarray:
    """float64 (n,): what merging each of ``points`` with point ``of`` adds; infinite for itself."""
    distances = np.maximum(squares + squares[of] - 2 * (points @ points[of]), 0)
    distances *= weight * weight[of] / (weight + weight[of])
    distances[of] = np.inf
    return distances


def _in_order(merged: Sequence[tuple[int, int, float]], n: int) -> Tree:
    """Merges by rising cost, their clusters numbered as they are made.

    A merge names each of its two by one member, which the merges before it lead to their cluster.
    """
    costs = np.array([cost for *_, cost in merged])
    order = np.argsort(costs, kind="stable")
    made = np.arange(2 * n - 1)
    pairs = np.empty((len(merged), 2), dtype=np.int64)
    for step, place in enumerate(order):
        roots = [_root(made, member) for member in merged[place][:2]]
        pairs[step] = sorted(roots)
        made[roots] = n + step
    return Tree(pairs, np.sqrt(2 * costs[order]))


def _root(made: np.ndarray, node: int) -> int:
    while made[node] != node:
        made[node] = made[made[node]]
        node = int(made[node])
    return node


@dataclass(frozen=True)
class Nesting:
    """How the clusters of the finest level lie in those of the coarser ones."""

    groups: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Coarser number of clusters -> int32 (finest,), where each cluster of the finest lies."""
    heights: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Number of clusters -> float64 (k,), height at which each of them is merged with another."""


def nest(finest: Fit, levels: Sequence[int], *, unit_norm: bool) -> tuple[dict[int, Fit], Nesting]:
    """All ``levels``, ascending, by merging the clusters of the ``finest``, whose k is the last.

    Clusters are numbered by falling size. With ``unit_norm`` centroids are scaled to length 1.
    """
    tree = merge_clusters(finest.centroids, finest.sizes)
    fits, groups = {levels[-1]: finest}, {}
    heights = {levels[-1]: tree.merge_heights(np.arange(levels[-1]), levels[-1])}
    for k in levels[:-1]:
        group = tree.cut(k)
        sizes = np.bincount(group, weights=finest.sizes, minlength=k).astype(np.int64)
        order = np.argsort(-sizes, kind="stable")
        group = np.argsort(order)[group].astype(np.int32)
        groups[k] = group
        heights[k] = tree.merge_heights(group, k)
        fits[k] = _merged_fit(finest, group, k, unit_norm)
    return dict(sorted(fits.items())), Nesting(groups, heights)


def _merged_fit(finest: Fit, group: np.ndarray, k: int, unit_norm: bool) -> Fit:
    weights = np.maximum(finest.sizes.astype(np.float64), _LIGHTEST)
    sums = np.zeros((k, finest.centroids.shape[1]))
    np.add.at(sums, group, finest.centroids * weights[:, None])
    means = sums / np.bincount(group, weights=weights, minlength=k)[:, None]
    if unit_norm:
        lengths = np.sqrt(squared_lengths(means))
        means /= np.where(lengths > 0, lengths, 1)[:, None]
    centroids = means.astype(np.float32)
    moved = squared_distances_to(finest.centroids, centroids, group) @ finest.sizes
    sizes = np.bincount(group, weights=finest.sizes, minlength=k).astype(np.int64)
    return replace(finest, centroids=centroids, sizes=sizes, inertia=finest.inertia + float(moved))
