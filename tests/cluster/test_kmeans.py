"""k-means on points whose answer a person can see, and against FAISS and scikit-learn."""

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from cluster import kmeans
from cluster.assign import NearestCentroids
from cluster.kmeans import FitOptions, count_distinct, fit_in_memory
from pipelines.runtime.errors import InputError

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


def test_two_levels_give_all_the_clusters_asked_for():
    vectors = normal_vectors(4_000)
    fit = fit_in_memory(vectors, 150, FitOptions(two_level=True))
    assert fit.centroids.shape == (150, 24)
    direct = fit_in_memory(vectors, 150, FitOptions())
    assert fit.inertia < 1.05 * direct.inertia


def test_two_levels_repair_what_the_coarse_edges_cost():
    vectors, _ = make_blobs(6_000, 16, centers=60, cluster_std=4.0, random_state=2)
    vectors = vectors.astype(np.float32)
    fit = fit_in_memory(vectors, 200, FitOptions(two_level=True))
    direct = fit_in_memory(vectors, 200, FitOptions())
    assert fit.inertia < 1.02 * direct.inertia
    assert (fit.sizes > 0).all()


def test_restarts_on_many_vectors_are_ranked_on_the_first(monkeypatch):
    monkeypatch.setattr(kmeans, "_TRIED_ON", 500)
    monkeypatch.setattr(kmeans, "_TRIED_ON_PER_CLUSTER", 1)
    vectors, truth = make_blobs(4_000, 4, centers=9, cluster_std=0.2, random_state=1)
    vectors = vectors.astype(np.float32)
    fit = fit_in_memory(vectors, 9, FitOptions(restarts=6))
    assert fit.vectors == 4_000
    found = NearestCentroids(fit.centroids).assign(vectors).cluster_ids
    assert adjusted_rand_score(truth, found) == 1.0


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


@pytest.mark.parametrize("back", [1, 2])
def test_the_largest_seeds_are_seeds_like_any_other(back):
    options = FitOptions(seed=2**31 - back, restarts=5)
    assert fit_in_memory(CORNERS, 3, options).centroids.tolist() == [[1, 1], [10, 11], [11, 0]]
