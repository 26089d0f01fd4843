"""Centroids to go on from, as many as are wanted."""

import numpy as np

from cluster.kmeans import start_from

THREE = np.array([[0, 0], [10, 0], [0, 10]], dtype=np.float32)


def test_as_many_stay_as_they_are():
    start = start_from(THREE, np.array([3, 2, 1]), 3, THREE, seed=0)
    assert np.array_equal(start, THREE)


def test_too_many_lose_the_smallest_and_keep_their_order():
    start = start_from(THREE, np.array([1, 9, 5]), 2, THREE, seed=0)
    assert np.array_equal(start, THREE[1:])


def test_added_ones_lie_where_vectors_are_far_from_all():
    random = np.random.default_rng(0)
    crowd = THREE[random.integers(0, 3, 300)] + random.normal(0, 0.1, (300, 2))
    lonely = np.array([[90, 90]]) + random.normal(0, 0.1, (20, 2))
    vectors = np.vstack([crowd, lonely]).astype(np.float32)
    for seed in range(20):
        start = start_from(THREE, np.array([1, 1, 1]), 4, vectors, seed=seed)
        assert np.array_equal(start[:3], THREE)
        assert np.linalg.norm(start[3] - [90, 90]) < 1
        assert start.dtype == np.float32
