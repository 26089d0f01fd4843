"""Ward's tree of weighted centroids: SciPy's on repeated points, and cuts that nest."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from cluster.hierarchy import merge_clusters


def draw(n, d=5, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)).astype(np.float32), random.integers(1, 6, n)


def same_partition(left, right):
    pairs = {(a, b) for a, b in zip(left, right, strict=True)}
    return len(pairs) == len(set(left)) == len(set(right))


@pytest.mark.parametrize("seed", range(5))
def test_a_weighted_tree_is_scipys_on_repeated_points(seed):
    points, weights = draw(40, seed=seed)
    repeated = np.repeat(points, weights, axis=0)
    expected = linkage(repeated.astype(np.float64), "ward")
    tree = merge_clusters(points, weights)
    assert tree.heights == pytest.approx(expected[-39:, 2], rel=1e-6)
    for k in (2, 3, 7, 20):
        labels = fcluster(expected, k, "maxclust")
        assert same_partition(np.repeat(tree.cut(k), weights), labels)


def test_levels_nest_and_have_the_size_asked_for():
    tree = merge_clusters(*draw(200))
    levels = [tree.cut(k) for k in (5, 17, 60, 200)]
    assert [len(set(level)) for level in levels] == [5, 17, 60, 200]
    for coarse, fine in pairwise(levels):
        for group in set(fine):
            assert len(set(coarse[fine == group])) == 1


def test_two_far_pairs_merge_first_within_and_an_empty_cluster_joins_its_nearest():
    points = np.array([[0, 0], [0, 1], [9, 0], [9, 1], [8, 4]], dtype=np.float32)
    tree = merge_clusters(points, np.array([5, 5, 5, 5, 0]))
    assert tree.cut(2).tolist() == [0, 0, 1, 1, 1] or tree.cut(2).tolist() == [1, 1, 0, 0, 0]


def test_equal_points_and_one_point_are_trees_too():
    tree = merge_clusters(np.ones((6, 3), dtype=np.float32), np.ones(6))
    assert tree.heights.tolist() == [0] * 5
    assert len(set(tree.cut(4))) == 4
    assert merge_clusters(np.ones((1, 3), dtype=np.float32), np.ones(1)).cut(1).tolist() == [0]
