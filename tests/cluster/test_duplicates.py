"""Near-duplicates point at the first document they repeat, within a cluster only."""

import numpy as np

from cluster import duplicates
from cluster.duplicates import find_duplicates


def test_a_repeat_names_the_first_document_like_it():
    vectors = np.array([[1, 0], [0, 1], [2, 0], [1, 0.001], [0, 3]], dtype=np.float32)
    found = find_duplicates(vectors, np.zeros(5, int), np.zeros(5), 0.999)
    assert found.rows.tolist() == [2, 3, 4]
    assert found.originals.tolist() == [0, 0, 1]
    assert (found.similarities > 0.999).all()


def test_clusters_are_searched_apart_and_zero_vectors_passed_over():
    vectors = np.array([[1, 0], [1, 0], [0, 0], [0, 0]], dtype=np.float32)
    found = find_duplicates(vectors, np.array([0, 1, 1, 1]), np.zeros(4), 0.5)
    assert len(found.rows) == 0


def test_pairs_equal_those_of_all_cosines():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((3_000, 3)).astype(np.float32)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    clusters = random.integers(0, 2, 3_000)
    similar = np.tril(units @ units.T >= 0.9999, -1) & (clusters[:, None] == clusters)
    found = find_duplicates(vectors, clusters, np.zeros(3_000), 0.9999)
    expected = np.flatnonzero(similar.any(axis=1))
    assert abs(len(found.rows) - len(expected)) <= 1
    assert similar[found.rows, found.originals].mean() > 0.99


def test_large_clusters_are_sliced_and_counted(monkeypatch):
    monkeypatch.setattr(duplicates, "SLICE", 10)
    vectors = np.ones((25, 2), dtype=np.float32)
    found = find_duplicates(vectors, np.zeros(25, int), np.arange(25.0), 0.9)
    assert found.sliced_clusters == 1
    assert len(found.rows) == 25 - 3
