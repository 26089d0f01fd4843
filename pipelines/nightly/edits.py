"""People's edits applied to a night's clusters, after these have been matched with the old ones.

Splits come before the fit, which starts from two centroids in place of one; merges are a matter of
what parts are published as (:mod:`pipelines.nightly.parts`); names and pinned documents come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.assign import NearestCentroids
from cluster.describe import Description, top_labels
from cluster.identity import Identity
from cluster.kmeans import FitOptions, fit_in_memory
from cluster.outcome import Outcome
from cluster.sample import Sample
from pipelines.nightly.parts import Parts, Published
from pipelines.runtime.arrow import column_to_vectors
from pipelines.store.candidate import Candidate
from pipelines.store.columns import EMBEDDING, TIME
from pipelines.store.documents import Documents
from pipelines.store.edits import (
    SCHEMA,
    Edit,
    Status,
    entry_of,
    home_of,
    merged_into,
    pinned_rows,
    read_applied,
    splits_done,
)
from pipelines.store.version import Version

_LEAST_SPLIT = 2
SPLIT_LATER = "the next night splits it"
"""What ``edits.parquet`` says of a split that this night could not begin and the next one can."""


def split_starts(
    edits: Sequence[Edit],
    base: Version,
    parts: Parts,
    candidate: Candidate,
    sample: Sample,
    when: datetime,
    unit_norm: bool,
) -> dict[int, np.ndarray]:
    """For each edit that splits and has not been applied: (place of the part, two centroids).

    They are those of the sample's documents that changed last before ``when``: what is new tonight
    is not what was to be split. A cluster with fewer than two different vectors of them waits. Keys
    are places of parts, values float32 (2, d), of length 1 with ``unit_norm``, as vectors are then.
    """
    done = splits_done(base)
    waiting = [e for e in edits if e.action == "split" and e.number not in done]
    if parts.centroids is None or not waiting:
        return {}
    nearest = NearestCentroids(parts.centroids).assign(sample.vectors).cluster_ids
    starts = {}
    for edit in waiting:
        own_part = parts.part_ids == edit.clusters[0]  # of clusters that were merged until now
        places = np.flatnonzero(own_part if own_part.any() else parts.ids == edit.clusters[0])
        for place in places[:1].tolist():
            rows = np.flatnonzero(nearest == place)
            ids = sample.ids.take(pa.array(rows))
            found = candidate.take(ids.to_pylist(), ["id", "last_changed"])
            untouched = found.filter(pc.less(found["last_changed"], pa.scalar(when, TIME)))["id"]
            there = pc.is_in(ids, value_set=untouched.combine_chunks()).to_numpy(False)
            own = sample.vectors[rows[there]]
            if len(np.unique(own, axis=0)) >= _LEAST_SPLIT:
                options = FitOptions(restarts=3, unit_norm=unit_norm)
                starts[place] = fit_in_memory(own, 2, options).centroids
    return starts


def describe_published(outcome: Outcome, published: Published, names: Sequence[str]) -> Outcome:
    """The outcome by published clusters; counts and descriptions of the parts of one become one."""
    outcome = outcome.with_ids(published.parts.ids)
    finest = outcome.levels[-1]
    merged: dict[int, Description] = {}
    for description in sorted(finest.clusters, key=lambda d: -d.size):
        first = merged.get(description.cluster_id)
        merged[description.cluster_id] = (
            description if first is None else _join_descriptions(first, description)
        )
    total = max(1, int(published.new.sizes.sum()))
    ids = published.identity.ids
    place_of = {i: place for place, i in enumerate(ids.tolist())}
    places = np.array([place_of[i] for i in published.parts.ids.tolist()])
    census = finest.census.joined(places)
    rows = zip(ids.tolist(), published.new.sizes.tolist(), names, top_labels(census), strict=True)
    clusters = [
        replace(
            merged[i], size=size, share=size / total, name=name, top_label=top, top_label_share=part
        )
        for i, size, name, (top, part) in rows
    ]
    finest = replace(finest, census=census, clusters=clusters)
    return replace(outcome, levels=[*outcome.levels[:-1], finest], ids=ids)


def _join_descriptions(first: Description, second: Description) -> Description:
    """The larger part's, with words and documents of the smaller one between its own."""
    ways = [(d.size, d.mean_distance) for d in (first, second) if d.mean_distance is not None]
    weight = sum(size for size, _ in ways)
    words = dict.fromkeys(_alternate(first.keywords, second.keywords))
    return replace(
        first,
        size=first.size + second.size,
        keywords=list(words)[: max(len(first.keywords), len(second.keywords))],
        central=_alternate(first.central, second.central)[: len(first.central)],
        diverse=_alternate(first.diverse, second.diverse)[: len(first.diverse)],
        mean_distance=sum(n * way for n, way in ways) / weight if weight else None,
    )


def _alternate(first: Sequence, second: Sequence) -> list:
    mixed = [item for pair in zip(first, second, strict=False) for item in pair]
    shorter = min(len(first), len(second))
    return [*mixed, *first[shorter:], *second[shorter:]]


class AssignIds:
    """Vectors to cluster ids and distances; the index of centroids is built where it is used."""

    def __init__(self, centroids: np.ndarray, ids: np.ndarray, unit_norm: bool) -> None:
        self._centroids, self._ids, self._unit_norm = centroids, ids, unit_norm
        self._index: NearestCentroids | None = None

    def among(self, places: np.ndarray) -> AssignIds:
        """The same with these centroids alone, int (j,), called by their places."""
        return AssignIds(self._centroids[places], places, self._unit_norm)

    def __call__(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cluster ids int32 (n,) and distances float32 (n,) of float32 (n, d)."""
        self._index = self._index or NearestCentroids(self._centroids)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if self._unit_norm:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        assigned = self._index.assign(vectors)
        return self._ids[assigned.cluster_ids], assigned.distances.astype(np.float32)


@dataclass(frozen=True)
class Pins:
    """Documents that people put into clusters, with the parts they go from and to."""

    table: pa.Table | None = None
    """``id``, ``cluster_id``, ``distance``, as the store's documents have them."""
    moves: dict[int, str] = field(default_factory=dict)
    """By number of the edit: the cluster that the document, or the clusters that its passages,
    would be in."""
    missing: frozenset[int] = frozenset()
    """Numbers of edits whose document is not there."""


def place_pins(
    edits: Sequence[Edit],
    candidate: Candidate,
    published: Published,
    assign: AssignIds,
) -> tuple[Pins, Published]:
    """Where pinned documents go, and the clusters' sizes with them there.

    ``assign`` finds parts by their places.
    """
    parts = published.parts
    wanted, missing = pinned_documents(edits, candidate, parts)
    if not wanted:
        return Pins(missing=missing), published
    table = candidate.take(list(wanted), ["id", EMBEDDING])
    vectors = column_to_vectors(table[EMBEDDING])
    nearest, distances = assign(vectors)
    own = {i: np.flatnonzero(parts.ids == i) for i in set(parts.ids.tolist())}
    sizes, clusters = parts.sizes.copy(), []
    moves: dict[int, dict[str, None]] = {}
    for row, row_id in enumerate(table["id"].to_pylist()):
        edit, cluster = wanted[row_id]
        clusters.append(cluster)
        moves.setdefault(edit.number, {})[str(int(parts.ids[nearest[row]]))] = None
        if parts.ids[nearest[row]] == cluster:
            continue
        to, distances[row : row + 1] = assign.among(own[cluster])(vectors[row : row + 1])
        sizes[nearest[row]] -= 1
        sizes[to] += 1
    pinned = pa.table(
        {
            "id": table["id"],
            "cluster_id": pa.array(clusters, pa.int32()),
            "distance": pa.array(distances, pa.float32()),
        }
    )
    resized = np.array([sizes[parts.ids == i].sum() for i in published.identity.ids], np.int64)
    moved = replace(
        published, parts=replace(parts, sizes=sizes), new=replace(published.new, sizes=resized)
    )
    overrode = {number: ", ".join(clusters) for number, clusters in moves.items()}
    return Pins(pinned, overrode, missing), moved


def pinned_documents(
    edits: Sequence[Edit], candidate: Candidate, parts: Parts
) -> tuple[dict[str | int, tuple[Edit, int]], frozenset[int]]:
    """By id of a row the edit that pins it, and in which cluster, only those that live.

    And the numbers of edits whose document is not there.
    """
    wanted: dict[str | int, tuple[Edit, int]] = {}
    merged, homes = merged_into(edits), parts.published()
    pins = [(e, home_of(e.clusters[0], merged, homes)) for e in edits if e.action == "pin"]
    living = [(edit, cluster) for edit, cluster in pins if cluster is not None]
    rows = pinned_rows([edit.document for edit, _ in living], candidate.documents)
    for edit, cluster in living:
        wanted |= dict.fromkeys(rows[edit.document], (edit, cluster))
    return wanted, frozenset(edit.number for edit, _ in living if not rows[edit.document])


def pinned_before(base: Version, documents: Documents) -> list[str | int]:
    """Ids of those ``documents`` that a version has where people pinned them."""
    applied = (row for row in read_applied(base).to_pylist() if row["status"] == "applied")
    names = [row["document_id"] for row in applied if row["action"] == "pin"]
    return [row_id for rows in pinned_rows(names, documents).values() for row_id in rows]


def released_clusters(edits: Sequence[Edit], base: Version) -> set[int]:
    """Clusters that a version has as part of others by merges that people have taken back."""
    holds = {edit.number for edit in edits}
    return {
        row["cluster_ids"][1]
        for row in read_applied(base).to_pylist()
        if row["action"] == "merge" and row["status"] == "applied" and row["edit"] not in holds
    }


def has_split_to_do(base: Version) -> bool:
    """Whether a version left a split to the next night."""
    return any(row["says"] == SPLIT_LATER for row in read_applied(base).to_pylist())


def names_given(edits: Sequence[Edit]) -> dict[int, str]:
    """By cluster id the name that a person gave it."""
    return {e.clusters[0]: e.text for e in edits if e.action == "name"}


def broken_pairs(edits: Sequence[Edit], identity: Identity) -> list[Edit]:
    """Edits that keep two clusters apart of which one has gone into the other this night."""
    merged = {
        frozenset((e.cluster_id, e.related_cluster_id))
        for e in identity.events
        if e.event == "merged"
    }
    return [e for e in edits if e.action == "forbid" and frozenset(e.clusters) in merged]


def applied_table(
    edits: Sequence[Edit],
    every: Sequence[Edit],
    base: Version | None,
    number: int,
    published: Published,
    pins: Pins,
    split: Mapping[int, int],
    same_encoder: bool,
) -> pa.Table:
    """``edits.parquet``: what became of each edit in version ``number``.

    ``every`` are all edits of the journal, ``edits`` those that hold; ``split`` has, by cluster,
    the new one that came out of it this night, which another encoder's centroids cannot start.
    """
    earlier = {} if base is None else {r["edit"]: r for r in read_applied(base).to_pylist()}
    holds, left, merged = {edit.number for edit in edits}, dict(split), merged_into(edits)
    rows = []
    for edit in (e for e in every if e.action != "undo"):
        before = earlier.get(edit.number)
        if edit.number not in holds:
            status, overrode, says = "undone", None, ""
        else:
            status, overrode, says = _became(edit, merged, before, published, pins, left)
            if status == "waiting" and edit.action == "split":
                put_off = not same_encoder or edit.clusters[0] in split
                says = SPLIT_LATER if put_off else says
        since = number if status == "applied" else None
        if before is not None and before["since_version"] is not None:
            since = before["since_version"]
        rows.append(
            {
                **entry_of(edit),
                "status": status,
                "since_version": since,
                "overrode": overrode,
                "says": says,
            }
        )
    return pa.Table.from_pylist(rows, SCHEMA)


def _became(
    edit: Edit,
    merged: Mapping[int, int],
    before: Mapping | None,
    published: Published,
    pins: Pins,
    split: dict[int, int],
) -> tuple[Status, str | None, str]:
    """Status of an edit that holds, what it overrode, and a word about it.

    Of ``split``, by cluster the new one that came out of it, each goes to one edit.
    """
    if edit.action == "note":
        return "applied", None, ""
    if edit.action == "split" and before is not None and before["status"] == "applied":
        return "applied", before["overrode"], before["says"]
    identity, parts = published.identity, published.parts.published()
    there = [home_of(cluster, merged, parts) is not None for cluster in edit.clusters]
    if edit.action == "name":
        there = [edit.clusters[0] in identity.ids]
    if edit.action == "merge":
        there = [there[0], edit.clusters[1] in parts]
    if not all(there):
        return "lost", None, f"cluster {edit.clusters[there.index(False)]} is no more"
    if edit.action == "name":
        place = identity.ids.tolist().index(edit.clusters[0])
        return "applied", identity.names[place], ""
    if edit.action == "pin":
        if edit.number in pins.missing:
            return "waiting", None, "the document is not in the corpus"
        return "applied", pins.moves.get(edit.number), ""
    if edit.action == "split":
        if edit.clusters[0] in split:
            return "applied", None, f"cluster {split.pop(edit.clusters[0])} came out of it"
        return "waiting", None, "it could not be split yet"
    return "applied", None, ""
