"""Nights that leave the clusters as they are: who joined since they were fitted, and who fits in.

A document that joined is *novel* where it lies farther from its centroid than the documents that
the cluster was fitted with: by more than some standard deviations of their distances. Novel
documents that are many and alike are proposed as new clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.nightly.config import NightConfig
from pipelines.runtime.arrow import column_to_vectors
from pipelines.store.candidate import Candidate
from pipelines.store.columns import EMBEDDING
from pipelines.store.index import unit

NOVEL = "novel.parquet"
_LEAST_FITTED = 2
GROUPED_DOCUMENTS = 3_000
"""Novel documents that are compared with each other; memory grows with their square."""


@dataclass(frozen=True)
class Joined:
    """Distances of a shard's documents: who was there when the clusters were fitted, and since."""

    fitted: pa.Table
    """place, documents, sum and squares of their distances."""
    since: pa.Table
    """id, place and distance of each document that joined or changed since, and whether before
    this night."""


def split_joined(
    ids: pa.Array,
    places: np.ndarray,
    distances: np.ndarray,
    fitted: np.ndarray,
    untouched: np.ndarray,
) -> Joined:
    """Of n documents, each with its centroid's place, int32 (n,), and distance, float64 (n,).

    ``fitted``, bool (n,), says which were there when the clusters were fitted, ``untouched`` which
    are as they were before this night.
    """
    count = int(places.max()) + 1 if len(places) else 0
    sums = dict(zip(_SUMS, _sums(places[fitted], distances[fitted], count), strict=True))
    rows = pa.array(np.flatnonzero(~fitted))
    since = {
        "id": ids.take(rows),
        "place": pa.array(places[~fitted], pa.int32()),
        "distance": pa.array(distances[~fitted]),
        "untouched": pa.array(untouched[~fitted]),
    }
    return Joined(pa.table({"place": range(count), **sums}), pa.table(since))


_SUMS = ("documents", "sum", "squares")


def _sums(places: np.ndarray, distances: np.ndarray, count: int) -> np.ndarray:
    """float64 (3, count): by place how many distances, their sum and that of their squares."""
    weights = (None, distances, distances**2)
    return np.stack([np.bincount(places, w, minlength=count) for w in weights])


@dataclass(frozen=True)
class Novelty:
    """What does not fit the clusters that there are."""

    table: pa.Table
    """id, place (of the nearest centroid), distance, group (of those alike; null for others)."""
    centroids: np.ndarray
    """float32 (g, d), the mean of each group that is large enough to be a cluster; by cosine that
    of its vectors' directions, of length 1."""
    sizes: list[int]
    """Documents of each group."""

    def placed(self, joined: Sequence[Joined]) -> Novelty:
        """The same with the documents where other centroids have them."""
        since = pa.concat_tables([part.since for part in joined])
        rows = pc.index_in(self.table["id"], value_set=since["id"].combine_chunks())
        table = self.table
        for name in ("place", "distance"):
            column = table.schema.get_field_index(name)
            table = table.set_column(column, name, since[name].take(rows))
        return replace(self, table=table)

    def artifact(self, ids: np.ndarray) -> pa.Table:
        """``novel.parquet``: id, cluster_id, distance, group; ``ids`` are clusters by place."""
        places = self.table["place"].to_numpy()
        table = self.table.set_column(1, "cluster_id", pa.array(ids[places], pa.int32()))
        return table.set_column(2, "distance", table["distance"].cast(pa.float32()))


def find_novelty(
    config: NightConfig, candidate: Candidate, joined: list[Joined], k: int, pinned: Sequence[Any]
) -> Novelty:
    """The novel documents, and those of them that are many and alike enough to be a cluster.

    ``pinned`` are ids of documents that people have put somewhere: these fit.
    """
    totals = np.zeros((3, k))
    for part in joined:
        places = part.fitted["place"].to_numpy()
        for row, name in enumerate(_SUMS):
            totals[row, places] += part.fitted[name].to_numpy()
    since = pa.concat_tables([part.since for part in joined])
    places, distances = since["place"].to_numpy(), since["distance"].to_numpy()
    # a cluster that novel documents made was not fitted: it is as wide as who is in it by now
    is_young = (totals[0] < _LEAST_FITTED)[places] & since["untouched"].to_numpy()
    totals += _sums(places[is_young], distances[is_young], k)
    count = np.maximum(totals[0], 1)
    mean = totals[1] / count
    spread = np.sqrt(np.maximum(totals[2] / count - mean**2, 0))
    limits = np.where(totals[0] >= _LEAST_FITTED, mean + config.novel_deviations * spread, np.inf)
    placed = pc.is_in(since["id"], value_set=pa.array(pinned, since["id"].type)).to_numpy()
    novel = since.filter(pa.array(~placed & (distances > limits[places]))).combine_chunks()
    return _group(config, candidate, novel.drop_columns("untouched").sort_by("id"))


def _group(config: NightConfig, candidate: Candidate, novel: pa.Table) -> Novelty:
    """Novel documents by how alike they are (average linkage of cosines)."""
    kind, is_cosine = candidate.schema.field(EMBEDDING).type, config.metric == "cosine"
    groups: list[int | None] = [None] * len(novel)
    centroids: list[np.ndarray] = []
    sizes: list[int] = []
    if len(novel) >= max(2, config.novel_documents):
        ids = novel["id"].slice(0, GROUPED_DOCUMENTS).to_pylist()
        table = candidate.take(ids, ["id", EMBEDDING]).sort_by("id")
        vectors = column_to_vectors(table[EMBEDDING])
        directions = unit(vectors)
        from sklearn.cluster import AgglomerativeClustering  # slow to load

        alike = AgglomerativeClustering(
            None, metric="euclidean", linkage="average",
            distance_threshold=float(np.sqrt(2 - 2 * config.novel_similarity)),
        )  # fmt: skip
        labels = alike.fit_predict(directions)
        for label, size in zip(*np.unique(labels, return_counts=True), strict=True):
            if size >= config.novel_documents:
                rows = np.flatnonzero(labels == label)
                for row in rows.tolist():
                    groups[row] = len(sizes)
                centroids.append((directions if is_cosine else vectors)[rows].mean(axis=0))
                sizes.append(int(size))
    found = np.array(centroids, np.float32).reshape(-1, kind.list_size)
    found = unit(found) if is_cosine else found
    return Novelty(novel.append_column("group", pa.array(groups, pa.int32())), found, sizes)
