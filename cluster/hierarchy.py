"""Levels of clusters that nest, each of which divides the one before; and merges, two by two."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from cluster.assign import NearestCentroids, split_by
from cluster.distances import squared_distances_to, squared_lengths
from cluster.kmeans import (
    TWO_LEVEL_FROM,
    Fit,
    FitOptions,
    check_enough_vectors,
    count_distinct,
    fit_in_memory,
)
from cluster.lloyd import ArrayVectors

_LIGHTEST = 1e-6
"""Weight of an empty cluster, so that it joins its nearest and moves nothing."""


def divide(
    vectors: np.ndarray, levels: Sequence[int], options: FitOptions
) -> tuple[Fit, dict[int, np.ndarray]]:
    """The finest of ``levels``, ascending, and where its clusters lie in each of the others.

    The coarsest is a k-means of all ``vectors``, float32 (n, d); k-means then divides each of its
    clusters, the wider ones into more, and so on. To merge the finest bottom up (Ward) nests too,
    but cost the coarse levels of labelled texts up to 0.06 of V-measure
    (``python benchmarks/kmeans.py --only levels``). Groups are int32 (finest,) by level.
    """
    check_enough_vectors(vectors, levels[-1])
    fit = fit_in_memory(vectors, levels[0], _within(options, levels[0]))
    places = NearestCentroids(fit.centroids, count=1).nearest(vectors)[:, 0]
    groups: dict[int, np.ndarray] = {}
    for coarse, fine in pairwise(levels):
        groups[coarse] = np.arange(coarse, dtype=np.int32)
        fit, places, parents = _divide_once(vectors, fit, places, fine, options)
        groups = {level: group[parents] for level, group in groups.items()}
    totals = ArrayVectors(vectors).assign_to(fit.centroids)
    return replace(fit, sizes=totals.counts, inertia=totals.error), groups


def _divide_once(
    vectors: np.ndarray, coarse: Fit, places: np.ndarray, k: int, options: FitOptions
) -> tuple[Fit, np.ndarray, np.ndarray]:
    """Centroids of ``k`` clusters, where each vector lies among them, and whose parts they are."""
    count = len(coarse.centroids)
    parts = split_by(np.arange(len(vectors)), places, count)
    spread = squared_distances_to(vectors, coarse.centroids, places)
    weights = np.bincount(places, weights=spread, minlength=count)
    shares = _shares(weights, [count_distinct(vectors[rows]) for rows in parts], k)
    starts = np.cumsum(shares) - shares
    centroids, steps, reseeded = np.repeat(coarse.centroids, shares, axis=0), 0, coarse.reseeded
    finer = np.empty_like(places)
    for rows, start, share in zip(parts, starts.tolist(), shares.tolist(), strict=True):
        finer[rows] = start
        if share > 1:
            fit = fit_in_memory(vectors[rows], share, _within(options, share))
            centroids[start : start + share] = fit.centroids
            finer[rows] += NearestCentroids(fit.centroids, count=1).nearest(vectors[rows])[:, 0]
            steps, reseeded = max(steps, fit.iterations), reseeded + fit.reseeded
    steps += coarse.iterations
    fit = replace(coarse, centroids=centroids, iterations=steps, reseeded=reseeded)
    return fit, finer, np.repeat(np.arange(count, dtype=np.int32), shares)


def _shares(weights: np.ndarray, most: Sequence[int], k: int) -> np.ndarray:
    """int64 (parts,) that add up to ``k``: one each, and the next where the weight of one is most.

    No part has more than ``most``, its different vectors.
    """
    shares = np.ones(len(weights), dtype=np.int64)
    waiting = [(-weight, part) for part, weight in enumerate(weights.tolist()) if most[part] > 1]
    heapq.heapify(waiting)
    for _ in range(k - len(shares)):
        _, part = heapq.heappop(waiting)
        shares[part] += 1
        if shares[part] < most[part]:
            heapq.heappush(waiting, (-weights[part] / shares[part], part))
    return shares


def _within(options: FitOptions, k: int) -> FitOptions:
    return replace(options, two_level=options.two_level and k >= TWO_LEVEL_FROM)


@dataclass(frozen=True)
class Nesting:
    """How the clusters of the finest level lie in those of the coarser ones."""

    groups: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Coarser number of clusters -> int32 (finest,), where each cluster of the finest lies."""
    heights: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Number of clusters -> float64 (k,), Ward's distance of each cluster to its nearest."""


def nest(
    finest: Fit, groups: Mapping[int, np.ndarray], *, unit_norm: bool
) -> tuple[dict[int, Fit], Nesting]:
    """All levels, from the ``finest`` and where its clusters lie, int32 (finest,) by level.

    Clusters of the coarser levels are numbered by falling size, and their centroids are means;
    with ``unit_norm`` they are scaled to length 1.
    """
    fits, numbered = {len(finest.centroids): finest}, {}
    for k, group in groups.items():
        sizes = np.bincount(group, weights=finest.sizes, minlength=k)
        order = np.argsort(-sizes, kind="stable")
        numbered[k] = np.argsort(order)[group].astype(np.int32)
        fits[k] = _merged_fit(finest, numbered[k], k, unit_norm)
    heights = {k: merge_heights(fit.centroids, fit.sizes) for k, fit in fits.items() if groups}
    return dict(sorted(fits.items())), Nesting(numbered, heights)


def merge_heights(centroids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """float64 (k,): Ward's distance, sqrt(2 a b / (a + b)) |x - y|, to the nearest other; or NaN.

    ``centroids``, float32 (k, d), stand for ``sizes`` points, (k,).
    """
    if len(centroids) == 1:
        return np.full(1, np.nan)
    points, weight = centroids.astype(np.float64), np.maximum(sizes, _LIGHTEST)
    squares = squared_lengths(points)
    costs = [_costs(points, squares, weight, place).min() for place in range(len(points))]
    return np.sqrt(2 * np.array(costs))


def merge_clusters(centroids: np.ndarray, sizes: np.ndarray) -> list[tuple[int, int, float]]:
    """The merges of ``centroids``, float32 (k, d), that stand for ``sizes`` points each, (k,).

    Each is of the two whose union adds least to the sum of squared distances (Ward 1963): which
    stays, which joins it, what is added. SciPy's ``linkage`` takes no weights; on points that are
    repeated instead it merges alike.
    """
    points, weight = centroids.astype(np.float64), np.maximum(sizes, _LIGHTEST)
    squares, rows = squared_lengths(points), np.arange(len(points))
    costs = np.stack([_costs(points, squares, weight, place) for place in range(len(points))])
    nearest = costs.argmin(axis=1)
    merges = []
    for _ in range(len(points) - 1):
        stays = int(costs[rows, nearest].argmin())
        joins, added = int(nearest[stays]), float(costs[stays].min())
        merges.append((stays, joins, added))
        first, second = weight[stays] + weight, weight[joins] + weight
        joined = (first * costs[stays] + second * costs[joins] - weight * added) / (
            first + weight[joins]
        )
        joined[[stays, joins]] = np.inf
        weight[stays] += weight[joins]
        costs[stays] = costs[:, stays] = joined
        costs[joins] = costs[:, joins] = np.inf
        nearest[joined < costs[rows, nearest]] = stays
        stale = np.flatnonzero(np.isin(nearest, (stays, joins)))
        nearest[stale] = costs[stale].argmin(axis=1)
    return merges


def _costs(points: np.ndarray, squares: np.ndarray, weight: np.ndarray, of: int) -> np.ndarray:
    """float64 (n,): what merging each of ``points`` with point ``of`` adds; infinite for itself."""
    distances = np.maximum(squares + squares[of] - 2 * (points @ points[of]), 0)
    distances *= weight * weight[of] / (weight + weight[of])
    distances[of] = np.inf
    return distances


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
