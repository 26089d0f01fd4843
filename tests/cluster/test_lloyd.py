"""Lloyd's iterations behind the seam: FAISS's result, whatever order vectors are added in."""

import faiss
import numpy as np
import pytest

from cluster.lloyd import ArrayVectors, FixedPointSums, refine

CORNERS = np.array(
    [[0, 0], [0, 2], [2, 0], [2, 2], [10, 0], [12, 0], [10, 10], [10, 12]], dtype=np.float32
)


def normal_vectors(n=3_000, d=24, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def test_refine_equals_faiss_from_the_same_start():
    vectors = normal_vectors(5_000)
    start = vectors[:40].copy()
    means = faiss.Kmeans(24, 40, niter=8, max_points_per_centroid=5_000, min_points_per_centroid=1)
    means.train(vectors, init_centroids=start)
    fit = refine(ArrayVectors(vectors), start, max_iterations=8)
    assert fit.centroids == pytest.approx(means.centroids, abs=2e-5)
    assert fit.iterations == 8


def test_refine_stops_when_nothing_moves():
    start = np.array([[1, 1], [11, 0], [10, 11]], dtype=np.float32)
    assert refine(ArrayVectors(CORNERS), start, max_iterations=20).iterations == 0


def test_refine_gives_an_empty_cluster_half_of_a_large_one():
    start = np.array([[1, 1], [11, 0], [10, 11], [500, 500]], dtype=np.float32)
    fit = refine(ArrayVectors(CORNERS), start, max_iterations=10)
    assert fit.reseeded >= 1
    assert (fit.counts > 0).all()


def test_sums_do_not_depend_on_the_order_they_are_added_in():
    vectors = normal_vectors(4_000) * 37
    ids = np.random.default_rng(1).integers(0, 9, len(vectors))
    largest = float(np.abs(vectors).max())

    def add(order, blocks):
        sums = FixedPointSums((9, 24), len(vectors), largest)
        for rows in np.array_split(order, blocks):
            part = FixedPointSums((9, 24), len(vectors), largest)
            part.add(vectors[rows], ids[rows])
            sums.merge(part)
        return sums.totals(np.zeros((9, 24), dtype=np.float32))

    whole = add(np.arange(len(vectors)), 1)
    shuffled = add(np.random.default_rng(2).permutation(len(vectors)), 13)
    assert whole.sums.tobytes() == shuffled.sums.tobytes()
    assert whole.error == shuffled.error
    exact = np.stack([vectors[ids == i].astype(np.float64).sum(axis=0) for i in range(9)])
    assert whole.sums == pytest.approx(exact, rel=1e-9, abs=1e-6)
    assert whole.error == pytest.approx(float((vectors.astype(np.float64) ** 2).sum()), rel=1e-12)
