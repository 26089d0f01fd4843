"""How good a candidate's vectors are for clustering: with labels, and by the texts alone.

All is computed from clusterings, int16 (candidates, n), and weights of documents, so that a
bootstrap over documents is a matter of other weights.
"""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

_ITERATIONS = 30


def cluster_vectors(vectors: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Clusters int16 (n,) of vectors float32 (n, d), by one run of k-means."""
    means = KMeans(num_clusters, n_init=1, max_iter=_ITERATIONS, random_state=seed)
    with warnings.catch_warnings():  # equal vectors make fewer clusters: a bad score, no trouble
        warnings.simplefilter("ignore", ConvergenceWarning)
        return means.fit_predict(vectors).astype(np.int16)


def partner_log_ranks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far down each row's partner is among its neighbours in the other array.

    Args:
        first: float32 (n, d), one half of each document.
        second: float32 (n, d), the other half, in the same order.

    Returns:
        float32 (n,): the logarithm of the rank of the partner by cosine, a mean over both
        directions; 0 where a half's nearest neighbour is its partner. Among equals the partner is
        in the middle.
    """
    one, other = (_centred(vectors) for vectors in (first, second))
    cosines = one @ other.T
    own = np.diagonal(cosines)
    forward, backward = (
        0.5 + (cosines > bound).sum(axis=axis) + 0.5 * (cosines == bound).sum(axis=axis)
        for bound, axis in ((own[:, None], 1), (own[None, :], 0))
    )
    return ((np.log(forward) + np.log(backward)) / 2).astype(np.float32)


def agreement(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Information that clusterings share with their counterparts.

    Args:
        first: int (a, n), clusters or labels numbered from 0.
        second: int (a, n).
        weights: float (n,), how often each document counts.

    Returns:
        float64 (a,), from 0 to 1: information shared over the mean of both entropies, which for
        labels and clusters is the V-measure. 0 where one of them has all in one cluster.
    """
    count, documents = first.shape
    wide, high = int(first.max()) + 1, int(second.max()) + 1
    cells = (np.arange(count)[:, None] * wide + first.astype(np.int64)) * high + second
    joint = np.bincount(
        cells.ravel(),
        weights=np.broadcast_to(weights / weights.sum(), (count, documents)).ravel(),
        minlength=count * wide * high,
    ).reshape(count, wide, high)
    left, right = (_entropy(joint.sum(axis=axis)) for axis in (2, 1))
    shared = np.maximum(left + right - _entropy(joint.reshape(count, -1)), 0.0)
    known = (left > 1e-12) & (right > 1e-12)
    return np.where(known, 2 * shared / np.maximum(left + right, 1e-12), 0.0)


def _entropy(shares: np.ndarray) -> np.ndarray:
    logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logarithms).sum(axis=-1)


def _centred(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1 after what is common to all has been taken away."""
    apart = vectors - vectors.mean(axis=0)
    return apart / np.maximum(np.linalg.norm(apart, axis=1, keepdims=True), 1e-12)
