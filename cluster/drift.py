"""How far a clustering has moved from the one before: two figures, and a list of what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.describe import Description
from cluster.identity import Identity, NewClusters, OldClusters
from cluster.report_data import Changes, Listing

ChangeKind = Literal["grew", "shrank", "appeared", "vanished"]

LEAST_CHANGE = 0.05
"""Share of a cluster's documents below which it neither grew nor shrank."""
_LISTED = 25
_TITLES: dict[ChangeKind, str] = {
    "grew": "Grew",
    "shrank": "Shrank",
    "appeared": "Appeared",
    "vanished": "Vanished",
}


@dataclass(frozen=True)
class ClusterChange:
    """A cluster that is not what it was."""

    kind: ChangeKind
    cluster_id: int
    name: str
    old_size: int
    new_size: int


@dataclass(frozen=True)
class Drift:
    """How far a clustering has moved."""

    assignments: float | None
    """Share, 0 to 1, of the documents that themselves did not change and whose cluster's id did;
    None where there is no such document."""
    untouched: int
    """Those documents."""
    centroids: float | None
    """Mean way, 0 to 1, of the old centroids, each counted by its size, in parts of the old
    clusters' radius; 1 for a centroid that went as far as that or vanished. None where the
    vectors come from another encoder."""
    changes: list[ClusterChange]


def measure_drift(
    old: OldClusters,
    new: NewClusters,
    identity: Identity,
    shared: np.ndarray,
    *,
    radius: float,
) -> Drift:
    """Compare two clusterings whose clusters have been identified.

    Args:
        old: the clusters before, k of them.
        new: the clusters now, m of them.
        identity: who is who.
        shared: int64 (k, m), untouched documents by old and new cluster.
        radius: root of the mean squared distance of a document to its old centroid.
    """
    known = np.flatnonzero(identity.old_places >= 0)
    untouched = int(shared.sum())
    stayed = int(shared[identity.old_places[known], known].sum())
    way = np.ones(len(old.ids))
    centroids = None
    if old.centroids is not None:
        places = identity.old_places[known]
        moved = np.linalg.norm(
            new.centroids[known].astype(np.float64) - old.centroids[places], axis=1
        )
        way[places] = np.minimum(1.0, moved / max(radius, 1e-12))
        weights = np.maximum(old.sizes, 0) / max(1, int(old.sizes.sum()))
        centroids = float(way @ weights)
    return Drift(
        1 - stayed / untouched if untouched else None,
        untouched,
        centroids,
        list(_changes(old, new, identity)),
    )


def _changes(old: OldClusters, new: NewClusters, identity: Identity) -> list[ClusterChange]:
    changes: list[ClusterChange] = []
    old_names = list(old.names) or [""] * len(old.ids)
    for place, old_place in enumerate(identity.old_places):
        name, size = identity.names[place], int(new.sizes[place])
        cluster_id = int(identity.ids[place])
        if old_place < 0:
            changes.append(ClusterChange("appeared", cluster_id, name, 0, size))
            continue
        before = int(old.sizes[old_place])
        if abs(size - before) >= max(1, LEAST_CHANGE * before):
            kind: ChangeKind = "grew" if size > before else "shrank"
            changes.append(ClusterChange(kind, cluster_id, name, before, size))
    for old_place in np.setdiff1d(np.arange(len(old.ids)), identity.old_places):
        size = int(old.sizes[old_place])
        old_id = int(old.ids[old_place])
        changes.append(ClusterChange("vanished", old_id, old_names[old_place], size, 0))
    return sorted(changes, key=lambda c: (-abs(c.new_size - c.old_size), c.cluster_id))


def changes_section(
    drift: Drift,
    clusters: Sequence[Description],
    vanished_texts: Mapping[int, str],
    *,
    since: str,
    figures: str,
) -> Changes:
    """The report's section about what changed, with an example of each cluster.

    ``vanished_texts`` has a text of each cluster that is no longer there; ``since`` names the
    earlier result, ``figures`` is shown as it is.
    """
    texts = {c.cluster_id: c.central[0].text or "" for c in clusters if c.central}
    lists = []
    for kind, title in _TITLES.items():
        some = [change for change in drift.changes if change.kind == kind]
        rows = [
            (
                change.cluster_id,
                change.name,
                f"{change.old_size:,} → {change.new_size:,}",
                (vanished_texts if kind == "vanished" else texts).get(change.cluster_id, ""),
            )
            for change in some[:_LISTED]
        ]
        note = f"{len(some):,} clusters." if some else "None."
        if len(some) > _LISTED:
            note += f" The first {_LISTED} are shown."
        lists.append(Listing(title, note, ("Cluster", "Name", "Documents", "Example"), rows))
    moved = "–" if drift.assignments is None else f"{drift.assignments:.1%}"
    note = (
        f"{figures} Of {drift.untouched:,} documents that did not change, {moved} are in another "
        "cluster."
    )
    if drift.centroids is not None:
        note += f" Centroids moved by {drift.centroids:.1%} of the clusters' radius."
    return Changes(f"Since {since}", note, lists)
