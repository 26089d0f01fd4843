"""Near-duplicates: documents of one cluster whose vectors point almost the same way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.distances import squared_lengths

SLICE = 20_000
"""Documents compared with each other at most, so that cost grows with n and not with n²."""
_ROWS_AT_A_TIME = 1_024


@dataclass(frozen=True)
class Duplicates:
    """Rows that repeat an earlier row of their cluster."""

    rows: np.ndarray
    """int64 (m,)."""
    originals: np.ndarray
    """int64 (m,), the first row that is similar enough."""
    similarities: np.ndarray
    """float32 (m,), cosine of the two."""
    sliced_clusters: int
    """Clusters too large to compare as a whole: repeats across their slices are not found."""


def find_duplicates(
    vectors: np.ndarray, cluster_ids: np.ndarray, distances: np.ndarray, similarity: float
) -> Duplicates:
    """For each row the first earlier row of its cluster with at least that cosine, if any.

    ``vectors`` float32 (n, d), ``cluster_ids`` int (n,), ``distances`` float (n,) to the centroid:
    a cluster of more than 20,000 is cut into slices of similar distance. Zero vectors have no
    direction and are passed over.
    """
    lengths = np.sqrt(squared_lengths(vectors))
    order = np.lexsort((np.arange(len(vectors)), cluster_ids))
    order = order[lengths[order] > 0]
    groups = np.split(order, np.flatnonzero(np.diff(cluster_ids[order])) + 1)
    found = []
    sliced = 0
    for group in groups:
        sliced += len(group) > SLICE
        for part in _slices(group, distances):
            units = vectors[part] / lengths[part, None].astype(np.float32)
            found += _repeats(units, part, similarity)
    rows, originals, similarities = zip(*found, strict=True) if found else ((), (), ())
    sort = np.argsort(rows, kind="stable")
    return Duplicates(
        np.array(rows, dtype=np.int64)[sort],
        np.array(originals, dtype=np.int64)[sort],
        np.array(similarities, dtype=np.float32)[sort],
        sliced,
    )


def _slices(group: np.ndarray, distances: np.ndarray) -> list[np.ndarray]:
    if len(group) <= SLICE:
        return [group]
    by_distance = group[np.argsort(distances[group], kind="stable")]
    return [np.sort(part) for part in np.array_split(by_distance, -(-len(group) // SLICE))]


def _repeats(
    units: np.ndarray, rows: np.ndarray, similarity: float
) -> list[tuple[int, int, float]]:
    """(row, first earlier row that is similar enough, their cosine), in the order of ``rows``."""
    found = []
    for start in range(0, len(units), _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, len(units))
        cosines = units[start:stop] @ units[:stop].T
        similar = np.tril(cosines >= similarity, k=start - 1)
        for i in np.flatnonzero(similar.any(axis=1)):
            j = int(similar[i].argmax())
            found.append((int(rows[start + i]), int(rows[j]), float(cosines[i, j])))
    return found
