"""Levels nest and are as good as k-means alone."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage

from cluster.assign import NearestCentroids
from cluster.hierarchy import divide, merge_heights, nest
from cluster.kmeans import FitOptions, fit_in_memory
from cluster.metrics import label_scores
from pipelines.runtime.errors import InputError


def nested_blobs(rows=1_200, seed=0):
    """Points in 4 far groups of 3 near ones, and both labels."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(4, 8)) * 20
    fine = np.repeat(coarse, 3, axis=0) + random.normal(size=(12, 8)) * 4
    labels = random.integers(0, 12, rows)
    return (fine[labels] + random.normal(size=(rows, 8))).astype(np.float32), labels // 3, labels


def v_measure(labels, ids):
    counts = np.zeros((labels.max() + 1, ids.max() + 1), dtype=np.int64)
    np.add.at(counts, (labels, ids), 1)
    return label_scores(counts).values["v_measure"]


def test_divided_levels_find_groups_within_groups_and_nest():
    vectors, coarse, fine = nested_blobs()
    finest, groups = divide(vectors, [4, 12, 40], FitOptions())
    fits, nesting = nest(finest, groups, unit_norm=False)
    ids = NearestCentroids(finest.centroids).nearest(vectors)[:, 0]
    assert v_measure(coarse, nesting.groups[4][ids]) == pytest.approx(1)
    assert v_measure(fine, nesting.groups[12][ids]) > 0.95
    assert [len(set(nesting.groups[k])) for k in (4, 12)] == [4, 12]
    for group in range(12):
        assert len(set(nesting.groups[4][nesting.groups[12] == group])) == 1
    for k in (4, 12):
        members = nesting.groups[k][ids]
        means = np.stack([vectors[members == group].mean(axis=0) for group in range(k)])
        assert fits[k].centroids == pytest.approx(means, abs=0.05)
        assert fits[k].sizes.tolist() == np.bincount(members, minlength=k).tolist()
        assert list(fits[k].sizes) == sorted(fits[k].sizes, reverse=True)


def test_a_coarse_level_is_as_good_as_k_means_alone():
    random = np.random.default_rng(1)
    centres = random.normal(size=(6, 10))
    labels = random.integers(0, 6, 2_000)
    vectors = (centres[labels] + 0.5 * random.normal(size=(2_000, 10))).astype(np.float32)
    finest, groups = divide(vectors, [6, 60], FitOptions())
    ids = NearestCentroids(finest.centroids).nearest(vectors)[:, 0]
    alone = fit_in_memory(vectors, 6, FitOptions()).centroids
    expected = v_measure(labels, NearestCentroids(alone).nearest(vectors)[:, 0])
    assert v_measure(labels, groups[6][ids]) >= expected - 0.01


def test_levels_of_few_different_vectors_share_them_out():
    vectors = np.repeat(np.array([[0, 0], [9, 0], [9, 1], [9, 3]], dtype=np.float32), 5, axis=0)
    finest, groups = divide(vectors, [2, 3, 4], FitOptions())
    assert sorted(finest.sizes.tolist()) == [5, 5, 5, 5]
    alone = int(np.flatnonzero((finest.centroids == 0).all(axis=1))[0])
    assert (groups[2] == groups[2][alone]).sum() == 1
    with pytest.raises(InputError, match="only 4 of the 20 vectors differ"):
        divide(vectors, [2, 5], FitOptions())


def test_levels_are_the_same_again():
    vectors, *_ = nested_blobs(400)
    first, second = (divide(vectors, [3, 9, 27], FitOptions(seed=2)) for _ in range(2))
    assert np.array_equal(first[0].centroids, second[0].centroids)
    assert all(np.array_equal(first[1][k], second[1][k]) for k in (3, 9))


def test_the_height_of_a_cluster_is_wards_distance_to_its_nearest():
    points, weights = np.array([[0.0, 0], [3, 0], [9, 0]], dtype=np.float32), np.array([1, 2, 1])
    near, far = np.sqrt(2 * 2 / 3) * 3, np.sqrt(2 * 2 / 3) * 6
    assert merge_heights(points, weights) == pytest.approx([near, near, far])
    assert np.isnan(merge_heights(points[:1], weights[:1])).all()
    repeated = linkage(np.repeat(points, weights, axis=0).astype(np.float64), "ward")
    assert merge_heights(points, weights).min() == pytest.approx(repeated[1, 2])
