"""Centroids to go on from: those of an earlier clustering, made as many as are wanted now."""

from __future__ import annotations

import numpy as np

from cluster.assign import NearestCentroids


def start_from(
    centroids: np.ndarray, sizes: np.ndarray, k: int, vectors: np.ndarray, *, seed: int
) -> np.ndarray:
    """float32 (k, d): earlier ``centroids``, float32 (m, d), as the start of ``k`` clusters.

    Where there are too many, those of the smallest ``sizes``, int64 (m,), are left out. Where
    there are too few, rows of ``vectors``, float32 (n, d), are added, each drawn with probability
    proportional to its squared distance from all centroids so far (Arthur and Vassilvitskii 2007).
    """
    if k <= len(centroids):
        kept = np.sort(np.argsort(-sizes, kind="stable")[:k])
        return np.ascontiguousarray(centroids[kept], dtype=np.float32)
    random = np.random.default_rng(seed)
    start = np.ascontiguousarray(centroids, dtype=np.float32)
    nearest = NearestCentroids(start).assign(vectors).distances ** 2
    while len(start) < k:
        shares = np.cumsum(nearest)
        row = int(np.searchsorted(shares, random.random() * shares[-1], side="right"))
        added = vectors[min(row, len(vectors) - 1)][None]
        start = np.vstack([start, added])
        nearest = np.minimum(nearest, NearestCentroids(added).assign(vectors).distances ** 2)
    return start
