"""Drift on hand-placed clusters; what grew, shrank, appeared and vanished is told."""

import numpy as np
import pytest

from cluster.drift import changes_section, measure_drift
from cluster.identity import NewClusters, OldClusters, identify_clusters

POINTS = np.array([[0, 0], [10, 0], [0, 10]], dtype=np.float32)


def drift_of(centroids, sizes, shared, old_sizes=(40, 40, 20), radius=2.0):
    old = OldClusters(np.arange(3), POINTS, np.array(old_sizes), ("a", "b", "c"))
    new = NewClusters(np.asarray(centroids, np.float32), np.array(sizes), [["w"]] * len(sizes))
    found = identify_clusters(old, new, np.array(shared), next_id=3)
    return measure_drift(old, new, found, np.array(shared), radius=radius)


def test_nothing_moved():
    drift = drift_of(POINTS, (40, 40, 20), np.diag([40, 40, 20]))
    assert (drift.assignments, drift.centroids, drift.untouched) == (0.0, 0.0, 100)
    assert drift.changes == []


def test_documents_that_went_to_another_cluster_are_counted():
    drift = drift_of(POINTS, (35, 45, 20), [[35, 5, 0], [0, 40, 0], [0, 0, 20]])
    assert drift.assignments == pytest.approx(0.05)
    assert [(c.kind, c.cluster_id) for c in drift.changes] == [("shrank", 0), ("grew", 1)]


def test_ways_of_centroids_are_weighed_by_size_and_measured_in_radii():
    drift = drift_of([[1, 0], [10, 0], [0, 10]], (40, 40, 20), np.diag([40, 40, 20]))
    assert drift.centroids == pytest.approx(0.5 * 0.4)


def test_a_vanished_cluster_counts_in_full_and_is_told_with_an_example():
    drift = drift_of([[0, 0], [10, 0], [50, 50]], (40, 40, 30), [[40, 0, 0], [0, 40, 0], [0, 0, 0]])
    assert drift.centroids == pytest.approx(0.2)
    assert {(c.kind, c.cluster_id) for c in drift.changes} == {("appeared", 3), ("vanished", 2)}
    section = changes_section(drift, [], {2: "an old text"}, since="version 1", figures="")
    lists = {found.title: found for found in section.lists}
    assert lists["Vanished"].rows == [(2, "c", "20 → 0", "an old text")]
    assert lists["Grew"].rows == []


def test_without_untouched_documents_and_comparable_centroids_there_is_no_figure():
    old = OldClusters(np.arange(2), None, np.array([5, 5]))
    new = NewClusters(np.zeros((2, 4), np.float32), np.array([5, 5]))
    nothing = np.zeros((2, 2), dtype=np.int64)
    found = identify_clusters(old, new, nothing, next_id=2)
    drift = measure_drift(old, new, found, nothing, radius=1.0)
    assert (drift.assignments, drift.centroids) == (None, None)
