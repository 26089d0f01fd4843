"""Nearest centroids, exactly: vectors and centroids in, cluster ids and distances out.

Float32 matrix products (FAISS's own on a GPU) find candidates; their last bits depend on how many
rows are multiplied at once. Rows whose candidates are too close to call are decided again in
float64, so a row's result depends on nothing but the row and the centroids: not on block size,
worker or thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import faiss
import numpy as np
from threadpoolctl import ThreadpoolController

from cluster.distances import squared_differences, squared_distances_to, squared_lengths

_ROUNDING = 1e-6
_ROWS_AT_A_TIME = 256
_BLOCK_ROWS = 8_192
_PRODUCT_BYTES = 2 << 20
_S = TypeVar("_S")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Assignment:
    """Nearest and second-nearest centroid of n rows; ties go to the lower cluster id."""

    cluster_ids: np.ndarray
    """int32 (n,)."""
    distances: np.ndarray
    """float64 (n,), Euclidean distance to the nearest centroid."""
    second_cluster_ids: np.ndarray
    """int32 (n,), -1 where there is only one centroid."""
    margins: np.ndarray
    """float64 (n,), distance to the second centroid less that to the first; NaN without one."""


def assign_by_group(
    vectors: np.ndarray, centroids: np.ndarray, group: np.ndarray, finest: Assignment
) -> Assignment:
    """Where ``vectors``, float32 (n, d), lie in a coarser level: in the group of their cluster.

    ``centroids``, float32 (k, d), are the coarser level's, ``group``, int32 (finest k,), says in
    which of them each cluster of the finest level lies. There is no second cluster.
    """
    ids = group[finest.cluster_ids]
    distances = np.sqrt(squared_distances_to(vectors, centroids, ids))
    none = np.full(len(ids), -1, dtype=np.int32)
    return Assignment(ids, distances, none, np.full(len(ids), np.nan))


def split_by(values: np.ndarray, keys: np.ndarray, count: int) -> list[np.ndarray]:
    """``values`` (n,) in ``count`` lists by their ``keys``, integers below ``count``; in order."""
    order = np.argsort(keys, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(keys, minlength=count))[:-1])


def flat_index(dimension: int) -> faiss.Index:
    """An index that compares with every vector in it, on the GPU where FAISS has one."""
    index: faiss.Index = faiss.IndexFlatL2(dimension)
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() > 0 else index


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread_each() -> AbstractContextManager[Any]:
    """NumPy's products of one thread: several wait for each other awake after each small one."""
    return _libraries().limit(limits=1, user_api="blas")


def side_by_side(function: Callable[[_S], _T], items: Sequence[_S]) -> list[_T]:
    """``function`` of all items, in order, on as many threads as OpenMP has.

    A product by several threads would leave all else to one.
    """
    threads = min(faiss.omp_get_max_threads(), len(items))
    if threads < 2:
        with one_thread_each():
            return [function(item) for item in items]
    with one_thread_each(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


class NearestCentroids:
    """Finds the nearest of k centroids, float32 (k, d), on the GPU where FAISS has one."""

    def __init__(self, centroids: np.ndarray, count: int = 2) -> None:
        """``count`` says how many of the nearest are wanted."""
        self._wanted = count
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self._squared_norms = squared_lengths(self.centroids)
        self._factors = np.ascontiguousarray(self.centroids.T) * np.float32(-2)
        self._index = None
        if faiss.get_num_gpus() > 0:
            self._index = flat_index(self.centroids.shape[1])
            self._index.add(self.centroids)

    def assign(self, vectors: np.ndarray) -> Assignment:
        """Nearest and second-nearest centroid of each row of ``vectors``, float32 (n, d)."""
        parts = self._by_blocks(self._assign, vectors)
        ids, distances = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        first = distances[:, 0]
        if ids.shape[1] == 1:
            none = np.full(len(ids), -1, dtype=np.int32)
            return Assignment(ids[:, 0], first, none, np.full(len(ids), np.nan))
        return Assignment(ids[:, 0], first, ids[:, 1], distances[:, 1] - first)

    def _assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroids, int32 (n, 1 or 2), and the distances to them, float64."""
        ids = self._nearest(vectors)[:, :2]
        squared = [squared_distances_to(vectors, self.centroids, column) for column in ids.T]
        return ids, np.sqrt(np.stack(squared, axis=1))

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """int32 (n, count): the nearest centroids, nearest first; (n, k) where k is less."""
        return np.concatenate(self._by_blocks(self._nearest, vectors))

    def _by_blocks(self, function: Callable[[np.ndarray], _T], vectors: np.ndarray) -> list[_T]:
        """What ``function`` makes of blocks of rows."""
        starts = range(0, len(vectors), _BLOCK_ROWS)
        blocks = [vectors[start : start + _BLOCK_ROWS] for start in starts]
        if len(blocks) < 2 or self._index is not None:
            return [function(block) for block in blocks or [vectors]]
        return side_by_side(function, blocks)

    def _nearest(self, vectors: np.ndarray) -> np.ndarray:
        k, dimension = self.centroids.shape
        # One more than is wanted, to see whether the last is too close to call.
        candidates = min(k, self._wanted + 1)
        if self._index is not None:
            found, wide_ids = self._index.search(vectors, candidates)
            ids = wide_ids.astype(np.int32)
        else:
            found, ids = self._candidates(vectors, candidates)
        if k == 1:
            return ids
        scale = np.einsum("ij,ij->i", vectors, vectors) + self._squared_norms.max()
        tolerance = _ROUNDING * np.sqrt(dimension) * scale
        gaps = np.diff(found, axis=1)
        close = np.flatnonzero((gaps <= tolerance[:, None]).any(axis=1))
        for start in range(0, len(close), _ROWS_AT_A_TIME):
            rows = close[start : start + _ROWS_AT_A_TIME]
            overflow = gaps[rows, -1] <= tolerance[rows] if k > candidates else None
            ids[rows] = self._decide(vectors[rows], ids[rows], overflow)
        return ids[:, : self._wanted]

    def _candidates(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances less |x|², float32 (n, count), and ids, int32, nearest first.

        Blocks of products that stay in the processor's cache, then its argmin for each.
        """
        n, k = len(vectors), len(self.centroids)
        found, ids = np.empty((n, count), np.float32), np.empty((n, count), np.int32)
        norms = self._squared_norms.astype(np.float32)
        step = max(16, min(4_096, _PRODUCT_BYTES // (4 * k)))
        products = np.empty((min(step, n), k), np.float32)
        for start in range(0, n, step):
            block = vectors[start : start + step]
            rows = np.arange(len(block))
            scores = np.matmul(block, self._factors, out=products[: len(block)])
            scores += norms
            for place in range(count):
                best = scores.argmin(axis=1)
                ids[start : start + step, place] = best
                found[start : start + step, place] = scores[rows, best]
                scores[rows, best] = np.inf
        return found, ids

    def _decide(
        self, vectors: np.ndarray, ids: np.ndarray, overflow: np.ndarray | None
    ) -> np.ndarray:
        """Sort the candidates of each row by float64 distance, then by id.

        ``overflow`` marks rows where even the last candidate is close: a centroid that is not
        among them may be as near, so all are compared.
        """
        ids = np.sort(ids, axis=1)
        exact = squared_differences(vectors[:, None, :], self.centroids[ids])
        ids = np.take_along_axis(ids, np.argsort(exact, axis=1, kind="stable"), axis=1)
        for row in np.flatnonzero(overflow) if overflow is not None else ():
            every = squared_differences(vectors[row], self.centroids)
            ids[row] = np.argsort(every, kind="stable")[: ids.shape[1]]
        return ids
