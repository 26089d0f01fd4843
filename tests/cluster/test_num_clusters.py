"""The number of clusters of blobs is found; where nothing stands out, it is said."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from cluster.distances import squared_distances_to
from cluster.hierarchy import merge_clusters
from cluster.kmeans import FitOptions
from cluster.num_clusters import Silhouettes, Tree, choose_num_clusters


@pytest.mark.parametrize(("centers", "d", "seed"), [(3, 2, 3), (7, 8, 1), (12, 16, 0)])
def test_the_number_of_blobs_is_chosen(centers, d, seed):
    vectors, _ = make_blobs(600, d, centers=centers, random_state=seed)
    choice = choose_num_clusters(vectors.astype(np.float32), FitOptions())
    assert choice.k == centers
    assert choice.reason.startswith(f"{centers} clusters have the best mean of silhouette")


def test_two_blobs_that_lie_near_each_other_are_two_clusters():
    vectors, _ = make_blobs(2000, 8, centers=20, random_state=7)
    assert choose_num_clusters(vectors.astype(np.float32), FitOptions()).k == 20


def test_vectors_of_a_few_values_have_as_many_clusters():
    vectors = np.repeat(np.eye(8, dtype=np.float32), 40, axis=0)
    choice = choose_num_clusters(np.random.default_rng(0).permutation(vectors), FitOptions())
    assert [candidate.k for candidate in choice.candidates] == [2, 3, 4]
    assert choice.k == 4


def test_noise_has_no_number_that_stands_out():
    vectors = np.random.default_rng(0).standard_normal((400, 12)).astype(np.float32)
    choice = choose_num_clusters(vectors, FitOptions(), most=12)
    assert "No number stands out" in choice.reason
    assert [candidate.k for candidate in choice.candidates] == list(range(2, 13))


def test_a_handful_of_different_vectors_is_one_cluster_each():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    assert choose_num_clusters(vectors, FitOptions()).k == 3


@pytest.mark.parametrize(("n", "most", "tried"), [(8, None, 4), (900, None, 30), (50, 40, 25)])
def test_every_number_up_to_the_most_is_tried(n, most, tried):
    vectors = np.random.default_rng(1).standard_normal((n, 3)).astype(np.float32)
    choice = choose_num_clusters(vectors, FitOptions(), most=most)
    assert [candidate.k for candidate in choice.candidates] == list(range(2, tried + 1))


def test_weighted_clusters_merge_as_repeated_points_do():
    random = np.random.default_rng(0)
    points, weights = random.standard_normal((60, 5)).astype(np.float32), random.integers(1, 9, 60)
    merges = merge_clusters(points, weights)
    scipy = linkage(np.repeat(points, weights, axis=0).astype(np.float64), "ward")
    heights = np.sqrt([2 * added for *_, added in merges])
    np.testing.assert_allclose(heights, np.sort(scipy[:, 2])[-59:], rtol=1e-6)
    cuts, first = Tree(points, merges, 0.0).cuts(70), np.cumsum(weights) - weights
    assert list(cuts) == list(range(2, 61))
    for k, cut in cuts.items():
        assert adjusted_rand_score(cut, fcluster(scipy, k, "maxclust")[first]) == 1
        assert set(cut) == set(range(k))


def test_cuts_have_the_inertia_and_silhouette_of_their_clusters():
    vectors = np.random.default_rng(2).standard_normal((500, 4)).astype(np.float32)
    tree = Tree.grow(vectors, 30, FitOptions(max_iterations=200))
    assert len(tree.centroids) == 62
    silhouettes = Silhouettes(vectors, tree)
    for k, cut in tree.cuts(30).items():
        ids = cut[tree.micro_of(vectors)]
        means = np.array([vectors[ids == i].mean(axis=0) for i in range(k)])
        found = squared_distances_to(vectors, means, ids).sum()
        assert tree.inertia(k) == pytest.approx(found, rel=1e-4)
        values = silhouette_samples(vectors.astype(np.float64), ids)
        wanted = values.mean(), values.std(ddof=1) / np.sqrt(500)
        assert silhouettes.of_cut(cut) == pytest.approx(wanted, rel=1e-9)


def test_the_stability_is_the_agreement_of_halves_cut_alike():
    vectors, _ = make_blobs(400, 3, centers=5, cluster_std=2.5, random_state=0)
    vectors, options = vectors.astype(np.float32), FitOptions(seed=3)
    found = {c.k: c.stability for c in choose_num_clusters(vectors, options, most=12).candidates}
    wanted = []
    for resample in range(2):
        order = np.random.default_rng([3, resample]).permutation(400)
        trees = [Tree.grow(vectors[half], 12, options) for half in (order[:200], order[200:])]
        ids = [tree.cuts(12)[7][tree.micro_of(vectors)] for tree in trees]
        wanted.append(adjusted_rand_score(*ids))
    assert 0.2 < found[7] < 0.9
    assert found[7] == pytest.approx(np.mean(wanted))


def test_the_silhouette_of_vectors_that_are_alone_or_all_together_is_nought():
    vectors = np.array([[0, 0], [0, 1], [9, 9]], np.float32)
    tree = Tree(vectors, merge_clusters(vectors, np.ones(3)), 0.0)
    silhouettes = Silhouettes(vectors, tree)
    assert silhouettes.of_cut(np.zeros(3, int)) == silhouettes.of_cut(np.arange(3)) == (0, 0)
    wanted = silhouette_samples(vectors, [0, 0, 1]).mean()
    assert silhouettes.of_cut(np.array([0, 0, 1]))[0] == pytest.approx(wanted)
