"""k-means on points whose answer a person can see, and against FAISS and scikit-learn."""

import faiss
import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from cluster.assign import NearestCentroids
from cluster.errors import InputError
from cluster.kmeans import (
    ArrayVectors,
    FitOptions,
    FixedPointSums,
    count_distinct,
    fit_in_memory,
    refine,
)

CORNERS = np.array(
    [[0, 0], [0, 2], [2, 0], [2, 2], [10, 0], [12, 0], [10, 10], [10, 12]], dtype=np.float32
)


def normal_vectors(n=3_000, d=24, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def test_hand_placed_points_give_the_means_a_person_computes():
    fit = fit_in_memory(CORNERS, 3, FitOptions(restarts=5))
    assert fit.sizes.tolist() == [4, 2, 2]
    assert fit.centroids.tolist() == [[1, 1], [10, 11], [11, 0]]
    assert fit.inertia == pytest.approx(4 * 2 + 2 * 1 + 2 * 1)


def test_separated_blobs_are_found_exactly():
    vectors, truth = make_blobs(2_000, n_features=8, centers=7, cluster_std=0.3, random_state=1)
    vectors = vectors.astype(np.float32)
    fit = fit_in_memory(vectors, 7, FitOptions(restarts=3))
    found = NearestCentroids(fit.centroids).assign(vectors).cluster_ids
    assert adjusted_rand_score(truth, found) == 1.0


@pytest.mark.parametrize("two_level", [False, True])
def test_the_same_seed_gives_the_same_bits(two_level):
    options = FitOptions(seed=5, restarts=2, two_level=two_level)
    first = fit_in_memory(normal_vectors(), 30, options)
    second = fit_in_memory(normal_vectors(), 30, options)
    assert first.centroids.tobytes() == second.centroids.tobytes()
    assert first.inertia == second.inertia


def test_spherical_centroids_have_length_one():
    vectors = normal_vectors()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fit = fit_in_memory(vectors, 12, FitOptions(unit_norm=True))
    assert np.linalg.norm(fit.centroids, axis=1) == pytest.approx(1, abs=1e-5)


def test_given_centroids_keep_their_order():
    start = np.array([[10, 11], [11, 0], [1, 1]], dtype=np.float32)
    fit = fit_in_memory(CORNERS, 3, FitOptions(), start=start)
    assert fit.centroids.tolist() == start.tolist()


def test_refine_equals_faiss_from_the_same_start():
    vectors = normal_vectors(5_000)
    start = vectors[:40].copy()
    means = faiss.Kmeans(24, 40, niter=8, max_points_per_centroid=5_000, min_points_per_centroid=1)
    means.train(vectors, init_centroids=start)
    fit = refine(ArrayVectors(vectors), start, FitOptions(max_iterations=8))
    assert fit.centroids == pytest.approx(means.centroids, abs=2e-5)
    assert fit.iterations == 8


def test_refine_stops_when_nothing_moves():
    start = np.array([[1, 1], [11, 0], [10, 11]], dtype=np.float32)
    assert refine(ArrayVectors(CORNERS), start, FitOptions(max_iterations=20)).iterations == 0


def test_refine_gives_an_empty_cluster_half_of_a_large_one():
    start = np.array([[1, 1], [11, 0], [10, 11], [500, 500]], dtype=np.float32)
    fit = refine(ArrayVectors(CORNERS), start, FitOptions(max_iterations=10))
    assert fit.reseeded >= 1
    assert (fit.sizes > 0).all()


def test_sums_do_not_depend_on_the_order_they_are_added_in():
    vectors = normal_vectors(4_000) * 37
    ids = np.random.default_rng(1).integers(0, 9, len(vectors))
    largest = float(np.abs(vectors).max())

    def add(order, blocks):
        sums = FixedPointSums(9, 24, len(vectors), largest)
        for rows in np.array_split(order, blocks):
            part = FixedPointSums(9, 24, len(vectors), largest)
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


def test_two_levels_give_all_the_clusters_asked_for():
    vectors = normal_vectors(4_000)
    fit = fit_in_memory(vectors, 150, FitOptions(two_level=True))
    assert fit.centroids.shape == (150, 24)
    direct = fit_in_memory(vectors, 150, FitOptions())
    assert fit.inertia < 1.05 * direct.inertia


def test_more_clusters_than_vectors_is_an_error():
    with pytest.raises(InputError, match="only 8 vectors"):
        fit_in_memory(CORNERS, 9, FitOptions())


def test_fewer_distinct_vectors_than_clusters_is_an_error():
    vectors = np.repeat(CORNERS, 10, axis=0)
    assert count_distinct(vectors) == 8
    with pytest.raises(InputError, match="only 8 of the 80 vectors differ"):
        fit_in_memory(vectors, 9, FitOptions())


def test_one_cluster_is_the_mean():
    fit = fit_in_memory(CORNERS, 1, FitOptions())
    assert fit.centroids[0] == pytest.approx(CORNERS.mean(axis=0))


def test_as_many_clusters_as_vectors_leaves_no_distance():
    fit = fit_in_memory(CORNERS, 8, FitOptions())
    assert fit.inertia == 0
    assert sorted(fit.centroids.tolist()) == sorted(CORNERS.tolist())
