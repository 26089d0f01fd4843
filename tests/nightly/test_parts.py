"""What the parts of a fit are published as, night after night, where people merged clusters."""

import numpy as np
import pytest

from cluster.identity import NewClusters, identify_clusters, keep_clusters
from pipelines.nightly.parts import OldClusters, Parts, publish_parts
from pipelines.store.edits import Edit, home_of, merged_into

PLACES = np.array([[0, 0], [10, 0], [0, 10], [10, 10], [20, 20]], np.float32)
"""Centroids that lie so far apart that each is matched with itself."""


def merge(number: int, one: int, other: int) -> Edit:
    return Edit(number, "merge", (one, other), "", "", "", None, "me", "", 0)


def parts_of(part_ids, ids, sizes=None) -> Parts:
    part_ids = np.array(part_ids, np.int32)
    centroids = PLACES[[min(i, len(PLACES) - 1) for i in part_ids]]
    sizes = np.full(len(part_ids), 5) if sizes is None else np.array(sizes)
    return Parts(part_ids, np.array(ids, np.int32), centroids, sizes.astype(np.int64))


def old_of(before: Parts) -> OldClusters:
    ids, places = np.unique(before.ids, return_inverse=True)
    sizes = np.bincount(places, before.sizes).astype(np.int64)
    sums = np.zeros((len(ids), 2))
    np.add.at(sums, places, before.centroids * before.sizes[:, None])
    centroids = (sums / sizes[:, None]).astype(np.float32)
    return OldClusters(ids.astype(np.int64), centroids, sizes)


def next_night(edits, before, flows, *, released=(), split=(), standing=False, next_id=50):
    """The night after ``before``: ``flows`` are centroids and, by old cluster, their documents."""
    old = old_of(before)
    new = NewClusters(
        np.array([place for place, _ in flows], np.float32),
        np.array([sum(documents.values()) for _, documents in flows], np.int64),
        [["word"]] * len(flows),
    )
    shared = np.array([[documents.get(int(i), 0) for _, documents in flows] for i in old.ids])
    if standing:
        identity = keep_clusters(old, new, shared, before.part_ids, next_id=next_id)
    else:
        identity = identify_clusters(old, new, shared, next_id=next_id)
    published = publish_parts(
        edits, old, before, new, shared, identity, released=released, split=split, standing=standing
    )
    return dict(zip(published.parts.part_ids.tolist(), published.parts.ids.tolist(), strict=True))


def after(parts: dict[int, int]) -> Parts:
    return parts_of([*parts], [*parts.values()])


def test_a_part_that_a_fit_adds_to_a_merged_cluster_stays_in_it():
    edits = [merge(1, 0, 1)]
    before = parts_of([0, 1, 2], [0, 0, 2])
    flows = [((0, 0), {0: 4}), ((10, 0), {0: 3}), ((20, 20), {0: 3}), ((0, 10), {2: 5})]
    night = next_night(edits, before, flows)
    assert night == {0: 0, 1: 0, 50: 0, 2: 2}
    again = [((0, 0), {0: 5}), ((10, 0), {0: 5}), ((20, 20), {0: 5}), ((0, 10), {2: 5})]
    before = Parts(
        np.array([0, 1, 50, 2], np.int32), np.array([0, 0, 0, 2], np.int32),
        np.array([place for place, _ in again], np.float32), np.full(4, 5),
    )  # fmt: skip
    for standing in (False, True):
        assert next_night(edits, before, again, standing=standing, next_id=60) == night
    undone = next_night([], before, again, released={1}, next_id=60)
    assert undone == {0: 0, 1: 1, 50: 1, 2: 2}  # with the nearest of those that were named
    free = Parts(before.part_ids, np.array([0, 1, 1, 2], np.int32), before.centroids, before.sizes)
    two = [((0, 0), {0: 5}), ((10, 0), {1: 5}), ((20, 20), {1: 3}), ((30, 0), {1: 3})]
    two.append(((0, 10), {2: 5}))
    assert next_night([], free, two, next_id=60) == {0: 0, 1: 1, 50: 1, 60: 60, 2: 2}
    other = [merge(2, 2, 0), *edits]
    assert next_night(other, before, again, next_id=60) == dict.fromkeys((0, 1, 50, 2), 2)


def test_a_cluster_that_people_split_is_not_joined_again():
    before = parts_of([0, 1, 2], [0, 0, 2])
    flows = [((0, 0), {0: 5}), ((10, 0), {0: 5}), ((20, 20), {0: 4}), ((0, 10), {2: 5})]
    assert next_night([], before, flows, split=[50]) == {0: 0, 1: 0, 50: 50, 2: 2}
    assert next_night([merge(1, 2, 0)], before, flows, split=[50]) == {0: 2, 1: 2, 50: 50, 2: 2}


def test_clusters_that_stand_keep_their_parts_whatever_their_documents_say():
    edits = [merge(1, 0, 1)]
    before = parts_of([0, 1, 2], [0, 0, 2])
    flows = [((0, 0), {}), ((10, 0), {0: 5, 2: 5}), ((0, 10), {0: 5})]
    assert next_night(edits, before, flows, standing=True) == {0: 0, 1: 0, 2: 2}
    added = [*flows, ((20, 20), {2: 9})]
    assert next_night(edits, before, added, standing=True) == {0: 0, 1: 0, 2: 2, 50: 50}


@pytest.mark.parametrize("same_encoder", [True, False])
def test_where_a_merged_cluster_has_fewer_parts_its_own_lasts(same_encoder):
    edits = [merge(1, 3, 2), merge(2, 0, 3)]
    before = parts_of([0, 2, 3], [0, 0, 0], sizes=[2, 9, 2])
    if not same_encoder:
        before = Parts(before.part_ids, before.ids, None, before.sizes)
    near = [((0, 10), {0: 7}), ((10, 10), {0: 6})]
    flows = [*near, ((20, 20), {})]
    old = OldClusters(
        np.array([0]), np.array([[3, 9]], np.float32) if same_encoder else None, np.array([13])
    )
    new = NewClusters(
        np.array([p for p, _ in flows], np.float32), np.array([7, 6, 0]), [["word"]] * 3
    )
    shared = np.array([[7, 6, 0]])
    identity = identify_clusters(old, new, shared, next_id=50)
    published = publish_parts(
        edits, old, before, new, shared, identity, released=(), split=(), standing=False
    )
    assert sorted(published.parts.part_ids.tolist())[:2] == [0, 3]
    assert published.parts.ids.tolist()[:2] == [0, 0]
    homes = published.parts.published()
    assert home_of(2, merged_into(edits), homes) == 0  # its documents are where its cluster's are
    assert home_of(7, merged_into(edits), homes) is None


def test_a_merge_into_a_cluster_that_died_takes_nothing_along():
    edits = [merge(1, 0, 1), merge(2, 3, 0)]
    before = parts_of([0, 1, 3], [0, 0, 3])
    flows = [((0, 0), {0: 5}), ((10, 0), {0: 5})]
    assert next_night(edits, before, flows) == {0: 0, 1: 0}


def test_a_chain_of_which_people_take_a_link_back_is_one_again_below_it():
    edits = [merge(1, 1, 2), merge(2, 0, 1)]
    before = parts_of([0, 1, 2], [0, 0, 0])
    flows = [((0, 0), {0: 5}), ((10, 0), {0: 5}), ((0, 10), {0: 5})]
    for standing in (False, True):
        assert next_night(edits, before, flows, standing=standing) == {0: 0, 1: 0, 2: 0}
        assert next_night(edits[:1], before, flows, released={1}, standing=standing) == {
            0: 0, 1: 1, 2: 1,
        }  # fmt: skip


class Nights:
    """Random fits of a random plane, and merges that people enter and take back."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.before = parts_of(range(5), range(5))
        self.edits: list[Edit] = []
        self.number, self.next_id = 0, 50

    def edit(self) -> set[int]:
        """An edit or none; the clusters that an undo gives back."""
        ids = np.unique(self.before.ids)
        merged = {e.clusters[1]: e.clusters[0] for e in self.edits}
        if self.edits and self.random.random() < 0.3:
            gone = self.edits.pop(self.random.integers(len(self.edits)))
            parts = self.before.published()
            one, other = gone.clusters
            applied = other in parts and parts[other] == home_of(
                one, merged_into([*self.edits, gone]), parts
            )
            return {other} if applied else set()
        if len(ids) > 1 and self.random.random() < 0.7:
            one, other = self.random.choice(ids, 2, replace=False).tolist()
            if not {one, other} & merged.keys():  # as entering refuses it
                self.number += 1
                self.edits.append(merge(self.number, one, other))
        return set()

    def night(self, released: set[int]):
        standing = self.random.random() < 0.5
        centroids = self.before.centroids
        if not standing:
            keep = self.random.random(len(centroids)) < 0.8
            keep[0] = True
            centroids = centroids[keep] + self.random.normal(0, 1, (keep.sum(), 2))
        added = self.random.uniform(0, 30, (self.random.integers(0, 3), 2))
        centroids = np.vstack([centroids, added]).astype(np.float32)
        old = old_of(self.before)
        shared = np.zeros((len(old.ids), len(centroids)), np.int64)
        for place, cluster in zip(self.before.centroids, self.before.ids, strict=True):
            near = np.argsort(np.linalg.norm(centroids - place, axis=1))[:2]
            shared[np.searchsorted(old.ids, cluster), near] += self.random.integers(0, 9, len(near))
        new = NewClusters(centroids, shared.sum(axis=0) + 1, [["word"]] * len(centroids))
        given = {"next_id": self.next_id}
        identity = (
            keep_clusters(old, new, shared, self.before.part_ids, **given)
            if standing
            else identify_clusters(old, new, shared, **given)
        )
        self.next_id = identity.next_id
        self.published = publish_parts(
            self.edits, old, self.before, new, shared, identity,
            released=released, split=(), standing=standing,
        )  # fmt: skip
        return standing, self.published.parts


@pytest.mark.parametrize("seed", range(20))
def test_random_nights_with_merges_leave_clusters_whole(seed):
    nights, merges = Nights(seed), 0
    for _ in range(40):
        released = nights.edit()
        undone = len(nights.edits) < merges
        merges = len(nights.edits)
        standing, parts = nights.night(released)
        before, now = nights.before.published(), parts.published()
        assert len({*parts.part_ids.tolist()}) == len(parts.part_ids)
        assert nights.published.identity.ids.tolist() == list(dict.fromkeys(parts.ids.tolist()))
        if standing:
            assert {*nights.before.part_ids.tolist()} <= now.keys()
        for cluster in {*parts.ids.tolist()}:
            assert now[cluster] == cluster  # none is published that is part of another
            assert cluster in parts.part_ids
        for edit in nights.edits:
            one, other = edit.clusters
            if (
                other in now
                and home_of(one, merged_into(nights.edits), now) is not None
                and one in now
            ):
                assert now[other] == now[one]
        if not undone:
            for cluster in {*nights.before.ids.tolist()}:
                together = {now[p] for p, c in before.items() if c == cluster and p in now}
                assert len(together) <= 1
        nights.before = parts
