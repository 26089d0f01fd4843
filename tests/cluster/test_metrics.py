"""Scores equal scikit-learn's; undefined ones are None with a reason."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from cluster.metrics import (
    LABEL_SCORES,
    explain_collapse,
    explain_imbalance,
    imbalance,
    internal_scores,
    label_scores,
    score_clustering,
)


def confusion_of(labels, clusters):
    counts = np.zeros((max(labels) + 1, max(clusters) + 1), dtype=np.int64)
    np.add.at(counts, (labels, clusters), 1)
    return counts


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 120), st.integers(1, 9), st.integers(2, 9))
def test_label_scores_equal_scikit_learn(seed, n, clusters, labels):
    random = np.random.default_rng(seed)
    truth = random.integers(0, labels, n)
    truth[:2] = [0, 1]
    found = random.integers(0, clusters, n)
    values = label_scores(confusion_of(truth, found)).values
    expected = {
        "v_measure": metrics.v_measure_score(truth, found),
        "homogeneity": metrics.homogeneity_score(truth, found),
        "completeness": metrics.completeness_score(truth, found),
        "nmi": metrics.normalized_mutual_info_score(truth, found),
        "ami": metrics.adjusted_mutual_info_score(truth, found),
        "ari": metrics.adjusted_rand_score(truth, found),
    }
    assert values == pytest.approx(expected, abs=1e-9)


def test_perfect_clusters_score_one():
    truth = np.repeat([0, 1, 2], 5)
    assert label_scores(confusion_of(truth, 2 - truth)).values == pytest.approx(
        dict.fromkeys(LABEL_SCORES, 1.0)
    )


def test_one_label_is_undefined_with_a_reason():
    scores = label_scores(confusion_of([0, 0, 0], [0, 1, 1]))
    assert set(scores.values.values()) == {None}
    assert scores.reasons["ari"] == "needs at least 2 labels, found 1"


def test_internal_scores_equal_scikit_learn():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((300, 6)).astype(np.float32)
    clusters = random.integers(0, 5, 300)
    values = internal_scores(vectors, clusters).values
    vectors = vectors.astype(np.float64)
    assert values["silhouette"] == pytest.approx(metrics.silhouette_score(vectors, clusters))
    assert values["davies_bouldin"] == metrics.davies_bouldin_score(vectors, clusters)
    assert values["calinski_harabasz"] == metrics.calinski_harabasz_score(vectors, clusters)


@pytest.mark.parametrize("clusters", [np.zeros(6, int), np.arange(6)])
def test_internal_scores_need_more_than_one_cluster_and_fewer_than_vectors(clusters):
    scores = internal_scores(np.eye(6, dtype=np.float32), clusters)
    assert scores.values["silhouette"] is None
    assert "at least 2 clusters" in scores.reasons["silhouette"]


def test_imbalance_is_one_for_equal_sizes_and_k_when_one_has_all():
    assert imbalance(np.array([5, 5, 5, 5])) == 1
    assert imbalance(np.array([20, 0, 0, 0])) == 4


def test_a_collapse_is_explained_by_what_the_vectors_have_in_common():
    sizes = np.array([96, 2, 2])
    spread = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    assert "outliers" in explain_collapse(sizes, spread)
    assert "hardly tells" in explain_collapse(sizes, spread * 0.01 + 1)
    assert explain_collapse(np.array([34, 33, 33]), spread) is None


def test_scores_json_has_the_keys_of_the_contract():
    vectors = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    clusters = np.arange(30) % 3
    sizes = np.bincount(clusters)
    scores = score_clustering(sizes, 1.5, None, vectors, clusters)
    assert scores["labels"] is None
    assert scores["undefined"] == {"labels": "no label column was given"}
    assert {"num_clusters", "inertia", "imbalance", "empty_clusters"} < scores.keys()
    assert {"silhouette", "davies_bouldin", "calinski_harabasz", "sample_size"} < scores[
        "internal"
    ].keys()
    assert scores["internal"]["sample_size"] == 30


def test_two_clusters_collapse_only_where_one_is_all_but_empty():
    spread = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    assert explain_collapse(np.array([80, 20]), spread) is None
    assert explain_collapse(np.array([97, 3]), spread).startswith("One cluster holds 97%")


def test_uneven_sizes_are_explained_and_ordinary_ones_are_not():
    sizes = np.array([60, 60, *[1] * 30])
    assert "2 of 32 clusters hold half of the documents" in explain_imbalance(sizes)
    assert explain_imbalance(np.array([40, 30, 20, 10])) is None
