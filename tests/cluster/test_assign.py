"""Assignment equals NumPy's argmin, however the rows are cut into blocks."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.assign import NearestCentroids
from cluster.kmeans import FitOptions, fit_in_memory


def by_numpy(vectors, centroids):
    differences = vectors[:, None, :].astype(np.float64) - centroids[None].astype(np.float64)
    return (differences**2).sum(axis=2)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (50, 2, 3), (700, 40, 96), (64, 200, 8)])
def test_nearest_equals_argmin(n, k, d):
    random = np.random.default_rng(n)
    vectors = random.standard_normal((n, d)).astype(np.float32)
    centroids = random.standard_normal((k, d)).astype(np.float32)
    squared = by_numpy(vectors, centroids)
    found = NearestCentroids(centroids).assign(vectors)
    assert found.cluster_ids.tolist() == squared.argmin(axis=1).tolist()
    assert found.distances == pytest.approx(np.sqrt(squared.min(axis=1)), abs=1e-12)
    if k > 1:
        second = np.argsort(squared, axis=1, kind="stable")[:, 1]
        assert found.second_cluster_ids.tolist() == second.tolist()
        ordered = np.sort(np.sqrt(squared), axis=1)
        assert found.margins == pytest.approx(ordered[:, 1] - ordered[:, 0], abs=1e-12)


def test_a_row_alone_gets_the_same_bits_as_in_company():
    random = np.random.default_rng(3)
    vectors = random.standard_normal((501, 72)).astype(np.float32)
    index = NearestCentroids(random.standard_normal((33, 72)).astype(np.float32))
    together = index.assign(vectors)
    for size in (1, 7, 100):
        parts = [index.assign(vectors[i : i + size]) for i in range(0, len(vectors), size)]
        alone = np.concatenate([part.distances for part in parts])
        assert alone.tobytes() == together.distances.tobytes()
        ids = np.concatenate([part.second_cluster_ids for part in parts])
        assert ids.tobytes() == together.second_cluster_ids.tobytes()


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 1_000))
def test_ties_go_to_the_lower_cluster_id(k, d, seed):
    random = np.random.default_rng(seed)
    # Whole numbers: many exact ties, and repeated centroids.
    centroids = random.integers(-2, 3, (k, d)).astype(np.float32)
    vectors = random.integers(-2, 3, (40, d)).astype(np.float32)
    squared = by_numpy(vectors, centroids)
    found = NearestCentroids(centroids).assign(vectors)
    assert found.cluster_ids.tolist() == squared.argmin(axis=1).tolist()
    second = np.argsort(squared, axis=1, kind="stable")[:, 1]
    assert found.second_cluster_ids.tolist() == second.tolist()


def test_one_centroid_has_no_second():
    found = NearestCentroids(np.zeros((1, 2), np.float32)).assign(np.ones((3, 2), np.float32))
    assert found.second_cluster_ids.tolist() == [-1, -1, -1]
    assert np.isnan(found.margins).all()


def test_the_gpu_is_used_where_faiss_has_one(monkeypatch):
    moved = []

    def to_gpus(index):
        moved.append(index)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus, raising=False)
    vectors = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    found = NearestCentroids(vectors[:5]).assign(vectors)
    assert found.cluster_ids.tolist() == by_numpy(vectors, vectors[:5]).argmin(axis=1).tolist()
    assert len(moved) == 1
    fit_in_memory(vectors, 3, FitOptions())
    assert len(moved) > 2


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_one_or_many_neighbours_agree_on_the_nearest_even_where_many_tie(k):
    random = np.random.default_rng(k)
    centroids = random.integers(0, 3, (k, 5)).astype(np.float32)
    vectors = random.integers(0, 3, (500, 5)).astype(np.float32)
    squared = ((vectors[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    order = np.argsort(squared, axis=1, kind="stable")
    for count in (1, 2, 4):
        ids = NearestCentroids(centroids, count=count).nearest(vectors)
        assert ids.tolist() == order[:, :count].tolist()
