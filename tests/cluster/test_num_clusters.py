"""The number of clusters of blobs is found; where nothing stands out, it is said."""

import numpy as np
import pytest
from sklearn.datasets import make_blobs

from cluster.kmeans import FitOptions
from cluster.num_clusters import choose_num_clusters, grid


@pytest.mark.parametrize(("centers", "d", "seed"), [(3, 2, 3), (7, 8, 1), (12, 16, 0)])
def test_the_number_of_blobs_is_chosen(centers, d, seed):
    vectors, _ = make_blobs(600, d, centers=centers, random_state=seed)
    choice = choose_num_clusters(vectors.astype(np.float32), FitOptions())
    assert choice.k == centers
    assert choice.reason.startswith(f"{centers} clusters have the best mean of silhouette")


def test_noise_has_no_number_that_stands_out():
    vectors = np.random.default_rng(0).standard_normal((400, 12)).astype(np.float32)
    choice = choose_num_clusters(vectors, FitOptions(), most=12)
    assert "No number stands out" in choice.reason
    assert set(grid(12)) <= {candidate.k for candidate in choice.candidates}


def test_a_handful_of_different_vectors_is_one_cluster_each():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    assert choose_num_clusters(vectors, FitOptions()).k == 3


@pytest.mark.parametrize("most", [2, 3, 10, 11, 40, 150])
def test_the_grid_runs_from_two_to_the_most(most):
    found = grid(most)
    assert found[0] == 2
    assert found[-1] == most
    assert found == sorted(set(found))
