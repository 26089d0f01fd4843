"""Two clusterings of the same documents side by side: which cluster went where, and what moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.describe import Description
from cluster.known import read_assignments
from cluster.metrics import label_scores
from cluster.report_data import Changes, Listing
from cluster.vectors import hash_ids
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, read_table
from pipelines.runtime.run_record import require_complete

_LISTED = 60
_NAMED = 3
_MOST_CELLS = 5_000_000


@dataclass(frozen=True)
class Comparison:
    """Documents by their cluster here and their cluster in another result."""

    other: str
    shared: np.ndarray
    """int64 (k, m): documents in cluster i here and j there."""
    names: list[str]
    """What the m clusters there are about."""
    only_here: int
    """Documents that the other result lacks."""
    only_there: int

    def agreement(self) -> dict[str, float | None]:
        """AMI and ARI of the two, 1 where they are the same."""
        values = label_scores(self.shared.T).values
        return {name: values[name] for name in ("ami", "ari")}

    def moved(self) -> int:
        """Documents outside the cluster that most of their cluster's documents are in there."""
        return int(self.shared.sum() - self.shared.max(axis=1).sum())


def check_comparable(other: str) -> None:
    """Raise :class:`InputError` unless ``other`` is the folder of a finished clustering."""
    run = require_complete(other)
    if run.get("job") != "cluster_corpus":
        raise InputError(f"--compare {other} holds a run of {run.get('job')!r}, no clustering")


def compare(folder: str, k: int, other: str) -> Comparison:
    """Compare the ``k`` clusters in ``folder`` with those in the output folder ``other``.

    Documents are matched by their ids: 12 bytes of memory each. Raises :class:`InputError` where
    the two have no document in common.
    """
    names = _names(other)
    if k * len(names) > _MOST_CELLS:
        raise InputError(
            f"--compare: {k:,} times {len(names):,} clusters are more than the {_MOST_CELLS:,} "
            "counts that can be kept"
        )
    here, there = _assigned(folder), _assigned(other)
    common, left, right = np.intersect1d(here[0], there[0], assume_unique=True, return_indices=True)
    if not len(common):
        raise InputError(f"--compare {other} and these vectors have no id in common")
    shared = np.zeros((k, len(names)), dtype=np.int64)
    ours, theirs = here[1][left], there[1][right]
    clustered = (ours >= 0) & (theirs >= 0)  # noise is in no cluster
    np.add.at(shared, (ours[clustered], theirs[clustered]), 1)
    return Comparison(other, shared, names, len(here[0]) - len(common), len(there[0]) - len(common))


def _assigned(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of ids, uint64 (n,), and cluster ids, int32 (n,), of all documents."""
    rows = read_assignments(folder, "id", "cluster_id")
    pairs = [(hash_ids(ids, 0), cluster_ids.to_numpy()) for ids, cluster_ids in rows]
    hashes, cluster_ids = zip(*pairs, strict=True)
    return np.concatenate(hashes), np.concatenate(cluster_ids)


def _names(folder: str) -> list[str]:
    """The name, or else the first keywords, of each cluster of a result."""
    table = read_table(join(folder, "clusters.parquet"), ["cluster_id", "name", "keywords"])
    rows = table.sort_by("cluster_id").to_pylist()
    return [row["name"] or ", ".join(row["keywords"][:_NAMED]) for row in rows]


def comparison_section(comparison: Comparison, clusters: list[Description]) -> Changes:
    """The report's section about the other result."""
    shared = comparison.shared
    ours = [c.name or ", ".join(c.keywords[:_NAMED]) for c in clusters]
    total = int(shared.sum())
    figures = ", ".join(
        f"{name.upper()} {value:.3f}"
        for name, value in comparison.agreement().items()
        if value is not None
    )
    note = (
        f"{total:,} documents are in clusters of both ({comparison.only_here:,} are only here, "
        f"{comparison.only_there:,} are only there). "
    )
    if total:
        note += (
            f"{comparison.moved() / total:.1%} are not where most of their cluster is there. "
            f"{figures}; 1 would be the same clusters."
        )
    here = Listing(
        "Clusters here, and where they are there",
        _only_first(len(shared)),
        ("Cluster", "About", "Documents", "Mostly in", "About", "Share"),
        _rows(shared, ours, comparison.names),
    )
    there = Listing(
        "Clusters there, and where they are here",
        _only_first(shared.shape[1]),
        ("Cluster", "About", "Documents", "Mostly in", "About", "Share"),
        _rows(shared.T, comparison.names, ours),
    )
    name = comparison.other.rstrip("/").rsplit("/", 1)[-1]
    return Changes(f"Compared with {name}", note, [here, there])


def _only_first(count: int) -> str:
    return f"The {_LISTED} largest of {count:,}." if count > _LISTED else ""


def _rows(shared: np.ndarray, names: list[str], others: list[str]) -> list[tuple[Any, ...]]:
    sizes = shared.sum(axis=1)
    rows: list[tuple[Any, ...]] = []
    for cluster in np.argsort(-sizes, kind="stable")[:_LISTED]:
        if not sizes[cluster]:
            continue
        best = int(shared[cluster].argmax())
        share = f"{shared[cluster, best] / sizes[cluster]:.0%}"
        rows.append(
            (str(cluster), names[cluster], f"{sizes[cluster]:,}", str(best), others[best], share)
        )
    return rows
