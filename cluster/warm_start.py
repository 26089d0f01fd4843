"""Centroids to go on from: those of an earlier clustering, made as many as are wanted now."""

from __future__ import annotations

import numpy as np

from cluster.assign import NearestCentroids

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
