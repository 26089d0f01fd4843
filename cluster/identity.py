"""Which new cluster is which old one: two clusterings of mostly the same documents in, ids out.

Pairs of an old and a new cluster are scored by the documents they share and by how near their
centroids are, and matched so that the scores add up to the most. A matched cluster keeps its id
and, as long as it fits, its name; every other new cluster gets an id that was never given before.
What happened to whom is a list of events, kept as the lineage table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from cluster.distances import squared_lengths

EventKind = Literal["born", "split", "died", "merged", "renamed"]

LEAST_SCORE = 0.2
"""Score, 0 to 1, below which an old and a new cluster are never the same."""
MOST_EVIDENCE = 0.9
"""Share of a score that shared documents decide at most; the centroids' decides among equals."""
NAME_WORDS = 3
_MAJORITY = 0.5
_BLOCK_ROWS = 512

LINEAGE_SCHEMA = pa.schema(
    [
        ("version", pa.int64()),
        ("event", pa.string()),
        ("cluster_id", pa.int32()),
        ("related_cluster_id", pa.int32()),
        ("shared_documents", pa.int64()),
        ("old_size", pa.int64()),
        ("new_size", pa.int64()),
        ("old_name", pa.string()),
        ("new_name", pa.string()),
    ]
)


@dataclass(frozen=True)
class OldClusters:
    """The clusters that a new clustering is compared with, k of them."""

    ids: np.ndarray
    """int (k,), in rising order."""
    centroids: np.ndarray | None
    """float32 (k, d); None where the new vectors come from another encoder."""
    sizes: np.ndarray
    """int64 (k,)."""
    names: Sequence[str] = ()
    """A name each, or none at all."""


@dataclass(frozen=True)
class NewClusters:
    """A new clustering, numbered by place, m clusters."""

    centroids: np.ndarray
    """float32 (m, d)."""
    sizes: np.ndarray
    """int64 (m,)."""
    keywords: Sequence[Sequence[str]] = ()
    """The leading words of each, best first, or none at all."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a cluster between two versions.

    ``born`` and ``split`` begin an id, ``died`` and ``merged`` end one; ``related_cluster_id`` is
    the cluster that it came out of, or went into. ``renamed``: the id lives on under another name.
    """

    event: EventKind
    cluster_id: int
    related_cluster_id: int | None = None
    shared_documents: int | None = None
    old_size: int | None = None
    new_size: int | None = None
    old_name: str | None = None
    new_name: str | None = None


@dataclass(frozen=True)
class Identity:
    """Who is who."""

    ids: np.ndarray
    """int32 (m,), id of each new cluster."""
    old_places: np.ndarray
    """int64 (m,), place of each new cluster among the old ones, -1 where it was not there."""
    next_id: int
    """The first id that was never given."""
    names: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def identify_clusters(
    old: OldClusters | None, new: NewClusters, shared: np.ndarray | None, *, next_id: int
) -> Identity:
    """Give every new cluster its id, and say what happened.

    Args:
        old: the clusters of the version before; None where there is none.
        new: the clusters to identify; those without documents count like any other.
        shared: int64 (k, m), how many documents each old and new cluster share.
        next_id: the first id that no version has ever used.
    """
    if old is None or shared is None or not len(old.ids):
        fresh_names = [name_of(words) for words in new.keywords] or [""] * len(new.sizes)
        ids = np.arange(next_id, next_id + len(new.sizes))
        born = [
            Event("born", int(i), new_size=int(size), new_name=name)
            for i, size, name in zip(ids, new.sizes, fresh_names, strict=True)
        ]
        places = np.full(len(ids), -1, dtype=np.int64)
        return Identity(ids.astype(np.int32), places, next_id + len(ids), fresh_names, born)
    old_places = match(old, new, shared)
    ids = np.empty(len(old_places), dtype=np.int32)
    known = old_places >= 0
    ids[known] = old.ids[old_places[known]]
    ids[~known] = np.arange(next_id, next_id + int((~known).sum()))
    return _identified(old, new, shared, Identity(ids, old_places, next_id + int((~known).sum())))


def keep_clusters(
    old: OldClusters, new: NewClusters, shared: np.ndarray, ids: np.ndarray, *, next_id: int
) -> Identity:
    """Give clusters whose centroids stood still the ids that they had, and say what happened.

    The first of the new ones are those of ``ids``, the others get ids that were never given. Other
    arguments are as in :func:`identify_clusters`.
    """
    added = np.arange(next_id, next_id + len(new.sizes) - len(ids))
    every = np.concatenate([ids, added]).astype(np.int32)
    places = np.searchsorted(old.ids, every)
    there = old.ids[np.minimum(places, len(old.ids) - 1)] == every
    kept = Identity(every, np.where(there, places, -1), next_id + len(added))
    return _identified(old, new, shared, kept)


def _identified(
    old: OldClusters, new: NewClusters, shared: np.ndarray, identity: Identity
) -> Identity:
    """The identity with names and what happened."""
    names = [name_of(words) for words in new.keywords] or [""] * len(new.sizes)
    named = replace(identity, names=names)
    named = replace(named, names=lasting_names(old, new, named))
    return replace(named, events=list(_events(old, new, shared, named)))


def match(old: OldClusters, new: NewClusters, shared: np.ndarray) -> np.ndarray:
    """int64 (m,): for each new cluster its place among the old ones, or -1.

    The matching of the highest total score in which every pair scores :data:`LEAST_SCORE` or
    more. Pairs that score less tie nothing together, so that each group of clusters that others
    connect is matched alone (linear sum assignment, Crouse 2016).
    """
    scores = pair_scores(old, new, shared)
    k, m = scores.shape
    rows, columns = scores.coords
    places = np.full(m, -1, dtype=np.int64)
    graph = coo_array((np.ones(len(rows)), (rows, columns + k)), shape=(k + m, k + m))
    _, groups = connected_components(graph, directed=False)
    order = np.argsort(groups[rows], kind="stable")
    bounds = np.flatnonzero(np.diff(groups[rows][order])) + 1
    for pairs in np.split(order, bounds) if len(order) else []:
        i, i_of = np.unique(rows[pairs], return_inverse=True)
        j, j_of = np.unique(columns[pairs], return_inverse=True)
        dense = np.zeros((len(i), len(j)))
        dense[i_of, j_of] = scores.data[pairs]
        chosen_rows, chosen_columns = linear_sum_assignment(dense, maximize=True)
        real = dense[chosen_rows, chosen_columns] > 0
        places[j[chosen_columns[real]]] = i[chosen_rows[real]]
    return places


def pair_scores(old: OldClusters, new: NewClusters, shared: np.ndarray) -> coo_array:
    """Scores from :data:`LEAST_SCORE` to 1 of pairs of an old and a new cluster, sparse (k, m).

    Documents that both clusterings hold vote by the Jaccard index of the two clusters among them;
    how much that counts is the share of the two clusters' documents that both clusterings hold.
    For the rest the centroids speak: 1 at the same place, 0.37 at half the distance at which the
    old centroids have their nearest neighbour.
    """
    k, m = shared.shape
    from_old, to_new = shared.sum(axis=1), shared.sum(axis=0)
    reach = _reach(old.centroids)
    blocks: list[coo_array] = []
    for start in range(0, k, _BLOCK_ROWS):
        block = slice(start, min(k, start + _BLOCK_ROWS))
        both = shared[block]
        known = from_old[block, None] + to_new - both
        documents = old.sizes[block, None] + new.sizes - both
        jaccard = both / np.maximum(known, 1)
        evidence = np.minimum(known / np.maximum(documents, 1), MOST_EVIDENCE)
        if old.centroids is None:
            scores = jaccard
        else:
            squared = _squared_distances(old.centroids[block], new.centroids)
            scores = evidence * jaccard + (1 - evidence) * np.exp(-squared / reach)
        rows, columns = np.nonzero(scores >= LEAST_SCORE)
        blocks.append(coo_array((scores[rows, columns], (rows + start, columns)), shape=(k, m)))
    joined = sum((csr_array(part) for part in blocks), start=csr_array((k, m)))
    return coo_array(joined)


def _reach(centroids: np.ndarray | None) -> float:
    """Square of half the typical distance of a centroid to its nearest other one."""
    if centroids is None or len(centroids) < 2:
        return 0.25 * float(np.square(centroids).sum()) if centroids is not None else 1.0
    nearest = []
    for start in range(0, len(centroids), _BLOCK_ROWS):
        squared = _squared_distances(centroids[start : start + _BLOCK_ROWS], centroids)
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        nearest.append(squared.min(axis=1))
    return max(0.25 * float(np.median(np.concatenate(nearest))), float(np.finfo(np.float32).tiny))


def _squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 (a, b) between the rows of two matrices."""
    products = left.astype(np.float64) @ right.astype(np.float64).T
    lengths = squared_lengths(left)[:, None] + squared_lengths(right)
    return np.maximum(lengths - 2 * products, 0)


def name_of(keywords: Sequence[str]) -> str:
    """A cluster's name: its leading words."""
    return ", ".join(keywords[:NAME_WORDS])


def lasting_names(old: OldClusters, new: NewClusters, identity: Identity) -> list[str]:
    """A matched cluster keeps its name while at least half of it is among its leading words."""
    names = list(identity.names)
    if not old.names or not new.keywords:
        return names
    for place, old_place in enumerate(identity.old_places):
        if old_place >= 0:
            words = [word for word in old.names[old_place].split(", ") if word]
            lasting = sum(word in new.keywords[place] for word in words)
            if words and lasting >= _MAJORITY * len(words):
                names[place] = old.names[old_place]
    return names


def _events(
    old: OldClusters, new: NewClusters, shared: np.ndarray, identity: Identity
) -> Iterator[Event]:
    old_names = list(old.names) or [""] * len(old.ids)
    for place in np.flatnonzero(identity.old_places < 0).tolist():
        begun = Event(
            "born",
            int(identity.ids[place]),
            new_size=int(new.sizes[place]),
            new_name=identity.names[place],
        )
        yield related_event(begun, "split", shared[:, place], old.ids)
    for old_place in np.setdiff1d(np.arange(len(old.ids)), identity.old_places).tolist():
        ended = Event(
            "died",
            int(old.ids[old_place]),
            old_size=int(old.sizes[old_place]),
            old_name=old_names[old_place],
        )
        yield related_event(ended, "merged", shared[old_place], identity.ids)
    yield from renamed_events(old, new, shared, identity)


def renamed_events(
    old: OldClusters, new: NewClusters, shared: np.ndarray, identity: Identity
) -> Iterator[Event]:
    """An event for each cluster that lives on under another name."""
    for place, before in enumerate(identity.old_places.tolist()):
        if before >= 0 and old.names and identity.names[place] != old.names[before]:
            yield Event(
                "renamed",
                int(identity.ids[place]),
                None,
                int(shared[before, place]),
                int(old.sizes[before]),
                int(new.sizes[place]),
                old.names[before],
                identity.names[place],
            )


def related_event(event: Event, kind: EventKind, shared: np.ndarray, ids: np.ndarray) -> Event:
    """The event as a split or merge where most of the documents say so."""
    total, place = int(shared.sum()), int(shared.argmax())
    if not total or shared[place] < _MAJORITY * total:
        return event
    return replace(
        event,
        event=kind,
        related_cluster_id=int(ids[place]),
        shared_documents=int(shared[place]),
    )


def lineage_table(events: Sequence[Event], version: int) -> pa.Table:
    """Events as rows of :data:`LINEAGE_SCHEMA`."""
    rows = [{"version": version, **asdict(event)} for event in events]
    return pa.Table.from_pylist(rows, schema=LINEAGE_SCHEMA)
