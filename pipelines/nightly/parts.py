"""The centroids of a fit, and the clusters that they are published as.

A fit has *parts*, each with a centroid. A part is published as the cluster of its own id, unless
people merged clusters: then a cluster has several parts, and rows of ``centroids.parquet`` with the
same ``cluster_id`` and different ``part_id``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from scipy.optimize import linear_sum_assignment

from cluster.identity import (
    Event,
    Identity,
    NewClusters,
    OldClusters,
    lasting_names,
    name_of,
    related_event,
    renamed_events,
)
from cluster.tables import centroids_table
from pipelines.nightly.titles import read_titles
from pipelines.runtime.arrow import column_to_vectors
from pipelines.store.edits import Edit, follow, merged_into, read_applied
from pipelines.store.version import Version

CENTROIDS = "centroids.parquet"
CLUSTERS = "clusters.parquet"


@dataclass(frozen=True)
class Parts:
    """The centroids of a fit and what they are published as, m of them."""

    part_ids: np.ndarray
    """int32 (m,), each once."""
    ids: np.ndarray
    """int32 (m,), the clusters that they are published as."""
    centroids: np.ndarray | None
    """float32 (m, d); None where they are another encoder's."""
    sizes: np.ndarray
    """int64 (m,)."""

    def published(self) -> dict[int, int]:
        """By part, and by cluster, the cluster that it is published as."""
        clusters = self.ids.tolist()
        return dict(zip([*clusters, *self.part_ids.tolist()], clusters * 2, strict=True))

    def table(self) -> pa.Table:
        """``centroids.parquet``; ``part_id`` is there where a cluster has several parts."""
        assert self.centroids is not None
        table = centroids_table(self.centroids, self.sizes, self.ids)
        if np.array_equal(self.ids, self.part_ids):
            return table
        return table.append_column("part_id", pa.array(self.part_ids, pa.int32()))


def read_parts(version: Version, *, same_encoder: bool) -> Parts:
    """The parts of a version, by rising id."""
    table = version.read_table(CENTROIDS)
    key = "part_id" if "part_id" in table.column_names else "cluster_id"
    table = table.sort_by(key)
    return Parts(
        table[key].to_numpy().astype(np.int32),
        table["cluster_id"].to_numpy().astype(np.int32),
        column_to_vectors(table["centroid"]) if same_encoder else None,
        table["size"].to_numpy().astype(np.int64),
    )


def published_clusters(version: Version, parts: Parts) -> OldClusters:
    """A version's clusters by rising id, the parts of one taken together.

    A cluster that a person or a model named goes by the name that its keywords gave it: the other
    says nothing about whether those still fit.
    """
    table = version.read_table(CLUSTERS)
    names = dict(zip(table["cluster_id"].to_pylist(), table["name"].to_pylist(), strict=True))
    names.update({i: by_keywords for i, (_, by_keywords) in read_titles(version).items()})
    for row in read_applied(version).to_pylist():
        if row["action"] == "name" and row["status"] == "applied":
            names[row["cluster_ids"][0]] = row["overrode"]
    ids, places = np.unique(parts.ids, return_inverse=True)
    sizes, centroids = _joined(parts.centroids, parts.sizes, places, len(ids))
    return OldClusters(
        ids.astype(np.int64), centroids, sizes, [names.get(int(i)) or "" for i in ids]
    )


def _joined(
    centroids: np.ndarray | None, sizes: np.ndarray, places: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Sizes int64 (count,) and mean centroids float32 (count, d) of the parts at each place."""
    joined = np.bincount(places, sizes, count).astype(np.int64)
    if centroids is None:
        return joined, None
    weights = np.maximum(sizes, 1e-9).astype(np.float64)
    sums = np.zeros((count, centroids.shape[1]))
    np.add.at(sums, places, centroids * weights[:, None])
    return joined, (sums / np.bincount(places, weights, count)[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Published:
    """A night's clusters as they are published."""

    parts: Parts
    new: NewClusters
    """By published cluster, parts taken together."""
    identity: Identity
    shared: np.ndarray | None
    """int64 (k, m), untouched documents by old and new published cluster."""


def publish_parts(
    edits: Sequence[Edit],
    old: OldClusters | None,
    before: Parts | None,
    new: NewClusters,
    shared: np.ndarray | None,
    identity: Identity,
    *,
    released: Collection[int],
    split: Collection[int],
    standing: bool,
) -> Published:
    """What the parts of a fit are published as, merges of people followed.

    Args:
        edits: those that hold.
        old: the clusters of the version before, as they were published.
        before: their parts.
        new: the fitted parts.
        shared: int64 (k, m), untouched documents by old cluster and new part.
        identity: which new part is which old cluster; of ``standing`` ones which old part.
        released: clusters whose merge the version before had, and people have taken back.
        split: clusters that came out of others tonight as people wanted.
        standing: whether the parts of before are there as they were.
    """
    groups = {} if before is None else _groups(before)
    merged = merged_into(edits)
    part_ids = identity.ids.copy()
    home: dict[int, int] = {}
    for cluster, group in groups.items():
        places = np.flatnonzero(np.isin(part_ids, group))
        if not standing:
            assert before is not None
            places = _places_of(cluster, identity, split)
            lasting = sorted({cluster, *group}, key=_rank(cluster, before, merged, released))
            part_ids[places] = _pool(lasting[: len(places)], places, before, new, identity)
        home |= dict.fromkeys(part_ids[places].tolist(), cluster)
    there = {*part_ids.tolist(), *home.values()}
    merged = {b: a for b, a in merged.items() if a in there and b in there}
    targets = {cluster: follow(merged, cluster) for cluster in merged}
    ids = np.array([targets.get(part, part) for part in part_ids.tolist()], np.int32)
    named = {*merged, *merged.values(), *released, *home.values()}
    joined = {home.get(part, part) for part in targets} | {*targets.values()}
    _join_unnamed(ids, part_ids, home, named, groups, joined, new.centroids)
    parts = Parts(part_ids, ids, new.centroids, new.sizes)
    if np.array_equal(parts.ids, identity.ids):
        return Published(parts, new, identity, shared)
    return _join_parts(parts, old, new, shared, identity)


def _groups(parts: Parts) -> dict[int, list[int]]:
    """Published clusters with parts other than their own, and those."""
    groups = {int(i): parts.part_ids[parts.ids == i].tolist() for i in np.unique(parts.ids)}
    return {i: group for i, group in groups.items() if group != [i]}


def _places_of(cluster: int, identity: Identity, split: Collection[int]) -> np.ndarray:
    """New parts that an old cluster went into: its match, and most of whose documents were its.

    Without those that people ``split`` off.
    """
    parted = [
        e.cluster_id
        for e in identity.events
        if e.event == "split" and e.related_cluster_id == cluster and e.cluster_id not in split
    ]
    return np.flatnonzero(np.isin(identity.ids, [cluster, *parted]))


def _rank(
    cluster: int, before: Parts, merged: Mapping[int, int], released: Collection[int]
) -> Callable[[int], tuple[float, int, int]]:
    """The key of a cluster's parts by which they last, where a fit has fewer places for them.

    Its own comes first, then those that were merged into it, then those that were merged into
    these; last the ones that no edit speaks of. The larger ones of equals come first.
    """
    sizes = dict(zip(before.part_ids.tolist(), before.sizes.tolist(), strict=True))

    def key(part: int) -> tuple[float, int, int]:
        steps, at = 0, part
        while at != cluster and at not in released and at in merged:
            steps, at = steps + 1, merged[at]
        named = at == cluster or at in released
        depth = steps + (at != cluster) if named else float("inf")
        return depth, -sizes.get(part, 0), part

    return key


def _pool(
    lasting: Sequence[int],
    places: np.ndarray,
    before: Parts,
    new: NewClusters,
    identity: Identity,
) -> np.ndarray:
    """Part ids of the places of a group: those that last, each at the nearest; then new ones."""
    ids = np.full(len(places), -1, np.int32)
    left, free = list(lasting), np.argsort(-new.sizes[places], kind="stable")
    if before.centroids is not None:
        rows = np.flatnonzero(np.isin(before.part_ids, lasting))
        ways = np.linalg.norm(
            new.centroids[places][:, None].astype(np.float64) - before.centroids[rows][None],
            axis=2,
        )
        chosen, olds = linear_sum_assignment(ways)
        ids[chosen] = before.part_ids[rows][olds]
        left = [i for i in lasting if i not in ids]
        free = np.flatnonzero(ids < 0)
    given = [*left, *(i for i in identity.ids[places].tolist() if i not in lasting)]
    ids[free] = given[: len(free)]
    return ids


def _join_unnamed(
    ids: np.ndarray,
    part_ids: np.ndarray,
    home: Mapping[int, int],
    named: Collection[int],
    groups: Mapping[int, Sequence[int]],
    joined: Collection[int],
    centroids: np.ndarray,
) -> None:
    """Publish parts that no edit speaks of, in ``ids``, as the nearest is that one speaks of.

    Only within the cluster that they come from, and those of tonight only where it is ``joined``.
    """
    for cluster, group in groups.items():
        mine = [p for p, part in enumerate(part_ids.tolist()) if home.get(part) == cluster]
        known = [p for p in mine if int(part_ids[p]) in named]
        for place in (p for p in mine if int(part_ids[p]) not in named):
            if known and (int(part_ids[place]) in group or cluster in joined):
                ways = np.linalg.norm(centroids[known] - centroids[place], axis=1)
                ids[place] = ids[known[int(ways.argmin())]]


def _join_parts(
    parts: Parts,
    old: OldClusters | None,
    new: NewClusters,
    shared: np.ndarray | None,
    identity: Identity,
) -> Published:
    """Everything by published cluster, in the order of first parts."""
    _, first = np.unique(parts.ids, return_index=True)
    ids = parts.ids[np.sort(first)]
    place_of = {int(i): place for place, i in enumerate(ids)}
    places = np.array([place_of[int(i)] for i in parts.ids])
    sizes, centroids = _joined(new.centroids, new.sizes, places, len(ids))
    assert centroids is not None
    ranked = [_ranked(parts, int(i)) for i in ids]
    keywords = [list(dict.fromkeys(w for p in mine for w in new.keywords[p])) for mine in ranked]
    joined = None
    old_places = np.full(len(ids), -1, np.int64)
    if shared is not None and old is not None:
        joined = np.zeros((len(shared), len(ids)), np.int64)
        np.add.at(joined.T, places, shared.T)
        places_before = np.searchsorted(old.ids, ids)
        known = (places_before < len(old.ids)) & (
            old.ids[np.minimum(places_before, len(old.ids) - 1)] == ids
        )
        old_places[known] = places_before[known]
    clusters = NewClusters(centroids, sizes, keywords)
    names = [name_of(new.keywords[mine[0]]) for mine in ranked]
    joined_identity = Identity(ids, old_places, identity.next_id, names, [])
    if old is not None:
        names = lasting_names(old, clusters, joined_identity)
        joined_identity = replace(joined_identity, names=names)
    events = _events(old, joined_identity, clusters, joined, identity)
    return Published(parts, clusters, replace(joined_identity, events=events), joined)


def moved_by_the_night(
    published: Published, old: OldClusters, before: Parts, split: Mapping[int, int]
) -> tuple[OldClusters, NewClusters, Identity, np.ndarray]:
    """Old and new clusters with those taken together that people merge, part or split.

    What is different between the two is then the night's doing. ``split`` has, by cluster, the one
    that came out of it.
    """
    labels: dict[int, int] = {}
    now = published.parts
    pairs = [
        *zip(before.part_ids, before.ids, strict=True),
        *zip(now.part_ids, now.ids, strict=True),
    ]
    for one, other in [*pairs, *split.items()]:
        first, second = follow(labels, int(one)), follow(labels, int(other))
        if first != second:
            labels[max(first, second)] = min(first, second)
    assert published.shared is not None
    if not labels:
        return old, published.new, published.identity, published.shared
    ids, rows = np.unique([follow(labels, int(i)) for i in old.ids], return_inverse=True)
    new_ids, columns = np.unique(
        [follow(labels, int(i)) for i in published.identity.ids], return_inverse=True
    )
    shared = np.zeros((len(ids), len(new_ids)), np.int64)
    np.add.at(shared, (rows[:, None], columns[None]), published.shared)
    sizes, centroids = _joined(old.centroids, old.sizes, rows, len(ids))
    new_sizes, new_centroids = _joined(
        published.new.centroids, published.new.sizes, columns, len(new_ids)
    )
    assert new_centroids is not None
    old_names = dict(zip(old.ids.tolist(), old.names, strict=True))
    names = dict(zip(published.identity.ids.tolist(), published.identity.names, strict=True))
    places = np.searchsorted(ids, new_ids)
    there = ids[np.minimum(places, len(ids) - 1)] == new_ids
    return (
        OldClusters(ids, centroids, sizes, [old_names.get(int(i), "") for i in ids]),
        NewClusters(new_centroids, new_sizes),
        replace(
            published.identity,
            ids=new_ids.astype(np.int32),
            old_places=np.where(there, places, -1),
            names=[names.get(int(i), "") for i in new_ids],
        ),
        shared,
    )


def _ranked(parts: Parts, cluster: int) -> list[int]:
    """Places of a cluster's parts: its own, whose words name it, then the others by size."""
    places = np.flatnonzero(parts.ids == cluster).tolist()
    return sorted(places, key=lambda p: (parts.part_ids[p] != cluster, -parts.sizes[p]))


def _events(
    old: OldClusters | None,
    published: Identity,
    new: NewClusters,
    shared: np.ndarray | None,
    identity: Identity,
) -> list[Event]:
    """What happened to published clusters; people's merges and their undoing among it."""
    if old is None or shared is None:
        return identity.events
    ids, was = published.ids.tolist(), old.ids.tolist()
    events = []
    for place in (p for p, cluster in enumerate(ids) if cluster not in was):
        size, name = int(new.sizes[place]), published.names[place]
        begun = Event("born", ids[place], new_size=size, new_name=name)
        events.append(related_event(begun, "split", shared[:, place], old.ids))
    for place in (p for p, cluster in enumerate(was) if cluster not in ids):
        size, name = int(old.sizes[place]), old.names[place] if old.names else ""
        ended = Event("died", was[place], old_size=size, old_name=name)
        events.append(related_event(ended, "merged", shared[place], published.ids))
    return [*events, *renamed_events(old, new, shared, published)]
