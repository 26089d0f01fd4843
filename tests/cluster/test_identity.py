"""Cluster ids live as long as their clusters; what happened is told; no id is given twice."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.identity import (
    LEAST_SCORE,
    LINEAGE_SCHEMA,
    NewClusters,
    OldClusters,
    identify_clusters,
    lineage_table,
    match,
    pair_scores,
)

SQUARE = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], dtype=np.float32)


def old(centroids=SQUARE, sizes=(50, 50, 50, 50), ids=(3, 5, 6, 9), names=()):
    return OldClusters(np.array(ids), centroids, np.array(sizes), names)


def new(centroids=SQUARE, sizes=(50, 50, 50, 50), keywords=()):
    return NewClusters(np.asarray(centroids, dtype=np.float32), np.array(sizes), keywords)


def told(found):
    return {(e.event, e.cluster_id, e.related_cluster_id) for e in found.events}


def test_the_first_clusters_are_born_with_the_first_ids():
    found = identify_clusters(None, new(), None, next_id=0)
    assert found.ids.tolist() == [0, 1, 2, 3]
    assert found.ids.dtype == np.int32
    assert found.next_id == 4
    assert told(found) == {("born", n, None) for n in range(4)}


def test_clusters_keep_their_ids_when_they_come_in_another_order():
    order = [2, 0, 3, 1]
    shared = np.diag([50, 50, 50, 50])[:, order]
    found = identify_clusters(old(), new(SQUARE[order]), shared, next_id=10)
    assert found.ids.tolist() == [6, 3, 9, 5]
    assert found.next_id == 10
    assert not found.events


def test_documents_decide_where_centroids_say_otherwise():
    shared = np.array([[0, 50], [50, 0]])
    two = SQUARE[:2]
    found = identify_clusters(old(two, (50, 50), (0, 1)), new(two, (50, 50)), shared, next_id=2)
    assert found.ids.tolist() == [1, 0]


def test_without_a_shared_document_centroids_decide():
    shared = np.zeros((4, 4), dtype=np.int64)
    found = identify_clusters(old(), new(SQUARE[[1, 0, 3, 2]] + 0.5), shared, next_id=10)
    assert found.ids.tolist() == [5, 3, 9, 6]


def test_without_shared_documents_a_far_centroid_is_another_cluster():
    shared = np.zeros((4, 4), dtype=np.int64)
    found = identify_clusters(old(), new(SQUARE + 100), shared, next_id=10)
    assert found.ids.tolist() == [10, 11, 12, 13]
    assert {e.event for e in found.events} == {"born", "died"}


def test_centroids_of_another_encoder_are_not_compared():
    other = OldClusters(np.array([4, 7]), None, np.array([50, 50]))
    wider = np.zeros((2, 5), dtype=np.float32)
    shared = np.array([[2, 48], [48, 2]])
    found = identify_clusters(other, new(wider, (50, 50)), shared, next_id=8)
    assert found.ids.tolist() == [7, 4]


def test_a_split_keeps_the_id_with_the_larger_part():
    centroids = np.vstack([SQUARE[:2], [[10, 1]]])
    shared = np.array([[50, 0, 0], [0, 30, 20]])
    found = identify_clusters(
        old(SQUARE[:2], (50, 50), (3, 5)), new(centroids, (50, 30, 20)), shared, next_id=6
    )
    assert found.ids.tolist() == [3, 5, 6]
    assert told(found) == {("split", 6, 5)}
    assert found.events[0].shared_documents == 20


def test_a_merge_ends_the_smaller_id_in_the_larger():
    shared = np.array([[60, 0], [0, 50], [0, 30]])
    found = identify_clusters(
        old(SQUARE[:3], (60, 50, 30), (0, 1, 2)), new(SQUARE[:2], (60, 80)), shared, next_id=7
    )
    assert found.ids.tolist() == [0, 1]
    assert told(found) == {("merged", 2, 1)}


def test_a_cluster_whose_documents_scatter_or_vanish_has_died():
    shared = np.array([[50, 0], [0, 50], [9, 11], [0, 0]])
    found = identify_clusters(
        old(sizes=(50, 50, 60, 4), ids=(0, 1, 2, 3)),
        new(SQUARE[:2], (59, 61)),
        shared,
        next_id=4,
    )
    assert ("died", 3, None) in told(found)
    assert ("merged", 2, 1) in told(found)


def test_a_cluster_of_documents_never_seen_is_born():
    centroids = np.vstack([SQUARE[:2], [[50, 50]]])
    shared = np.array([[50, 0, 0], [0, 50, 0]])
    found = identify_clusters(
        old(SQUARE[:2], (50, 50), (0, 1)), new(centroids, (50, 50, 40)), shared, next_id=2
    )
    assert told(found) == {("born", 2, None)}


def test_an_id_that_died_is_not_given_again():
    shared = np.array([[50, 0, 0], [0, 50, 0], [0, 0, 0], [0, 0, 0]])
    moved = np.vstack([SQUARE[:2], [[99, 99]]])
    found = identify_clusters(old(), new(moved, (50, 50, 50)), shared, next_id=10)
    assert found.ids.tolist() == [3, 5, 10]


def test_a_name_lasts_while_half_of_it_fits_and_then_the_cluster_is_renamed():
    names = ("goal, match, team", "bank, rate, loan")
    keywords = (["team", "cup", "goal", "win"], ["oil", "price", "barrel", "rate"])
    found = identify_clusters(
        old(SQUARE[:2], (50, 50), (0, 1), names),
        new(SQUARE[:2], (50, 50), keywords),
        np.diag([50, 50]),
        next_id=2,
    )
    assert found.names == ["goal, match, team", "oil, price, barrel"]
    assert told(found) == {("renamed", 1, None)}
    assert (found.events[0].old_name, found.events[0].new_name) == (
        "bank, rate, loan",
        "oil, price, barrel",
    )


@settings(max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_the_matching_is_the_best_of_all(seed, k, m):
    random = np.random.default_rng(seed)
    shared = random.integers(0, 30, (k, m)) * random.integers(0, 2, (k, m))
    before = OldClusters(
        np.arange(k),
        random.standard_normal((k, 2)).astype(np.float32),
        shared.sum(axis=1) + random.integers(0, 9, k),
    )
    after = NewClusters(
        random.standard_normal((m, 2)).astype(np.float32),
        shared.sum(axis=0) + random.integers(0, 9, m),
    )
    scores = pair_scores(before, after, shared).toarray()
    places = match(before, after, shared)
    matched = [(i, j) for j, i in enumerate(places) if i >= 0]
    assert len({i for i, _ in matched}) == len(matched)
    assert all(scores[pair] >= LEAST_SCORE for pair in matched)
    wide = np.zeros((max(k, m), m))
    wide[:k] = scores
    best = max(
        sum(wide[i, j] for j, i in enumerate(rows)) for rows in permutations(range(len(wide)), m)
    )
    assert sum(scores[pair] for pair in matched) == pytest.approx(best)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_over_many_nights_an_id_once_ended_never_returns(seed):
    random = np.random.default_rng(seed)
    documents = random.integers(0, 4, 200)
    found = identify_clusters(None, new(), None, next_id=0)
    now, ended = found.ids[documents], set()
    for _ in range(10):
        m = int(random.integers(2, 7))
        after = np.where(random.random(200) < 0.3, random.integers(0, m, 200), documents % m)
        before_ids, codes = np.unique(now, return_inverse=True)
        shared = np.zeros((len(before_ids), m), dtype=np.int64)
        np.add.at(shared, (codes, after), 1)
        before = OldClusters(
            before_ids,
            random.standard_normal((len(before_ids), 2)).astype(np.float32),
            shared.sum(axis=1),
        )
        points = random.standard_normal((m, 2)).astype(np.float32)
        found = identify_clusters(
            before, NewClusters(points, shared.sum(axis=0)), shared, next_id=found.next_id
        )
        assert len(set(found.ids.tolist())) == m
        assert not ended & set(found.ids.tolist())
        ended |= {e.cluster_id for e in found.events if e.event in ("died", "merged")}
        assert ended >= set(before_ids.tolist()) - set(found.ids.tolist())
        documents, now = after, found.ids[after]


def test_lineage_is_a_table_of_fixed_columns():
    found = identify_clusters(None, new(sizes=(1, 2, 3, 4)), None, next_id=5)
    table = lineage_table(found.events, version=12)
    assert table.schema == LINEAGE_SCHEMA
    assert table["version"].to_pylist() == [12] * 4
    assert table["new_size"].to_pylist() == [1, 2, 3, 4]
    assert lineage_table([], version=1).schema == LINEAGE_SCHEMA


def test_thousands_of_clusters_are_matched():
    random = np.random.default_rng(0)
    k = 3_000
    centroids = random.standard_normal((k, 16)).astype(np.float32)
    order = random.permutation(k)
    shared = np.zeros((k, k), dtype=np.int64)
    shared[order, np.arange(k)] = 40
    before = OldClusters(np.arange(k), centroids, np.full(k, 41))
    found = identify_clusters(
        before, NewClusters(centroids[order], np.full(k, 42)), shared, next_id=k
    )
    assert np.array_equal(found.ids, order)
