"""From what a clustering found to what its page shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from cluster.layout import lay_out
from cluster.outcome import Outcome
from cluster.report_data import Changes, Listing, MappedDocuments, Report
from cluster.tables import OUTLIER_DEVIATIONS, levels_table

_LISTED = 40


def build_report(
    outcome: Outcome,
    settings: Mapping[str, Any],
    *,
    map_documents: int,
    seed: int,
    changes: Changes | None = None,
    linear_map: bool = False,
) -> Report:
    """The content of ``report.html``; ``settings`` are shown as they are."""
    documents = outcome.documents.head(map_documents)
    texts = documents.texts.to_pylist() if documents.texts is not None else None
    mapped = MappedDocuments(
        lay_out(documents.vectors, seed, linear=linear_map),
        outcome.levels[-1].cluster_ids[: len(documents)],
        documents.ids.to_pylist(),
        texts,
    )
    name = str(settings["embeddings"]).rstrip("/").rsplit("/", 1)[-1]
    return Report(
        title=f"Clusters of {name}",
        lead=_lead(outcome, has_texts=texts is not None),
        notices=outcome.notices,
        census=outcome.census,
        clusters=outcome.clusters,
        scores=outcome.scores,
        mapped=mapped,
        facts=_facts(outcome, settings),
        curve=None if outcome.choice is None else [asdict(c) for c in outcome.choice.candidates],
        curve_note="" if outcome.choice is None else outcome.choice.reason,
        levels=_levels(outcome),
        lists=[_outliers(outcome), _duplicates(outcome)],
        has_texts=texts is not None,
        ids=outcome.ids,
        changes=changes,
    )


def _lead(outcome: Outcome, *, has_texts: bool) -> str:
    lead = (
        f"k-means put {outcome.scan.rows:,} documents into {len(outcome.census.sizes):,} clusters. "
        f"Centroids were fitted on {outcome.fitted_on()}; every document was then given to its "
        "nearest centroid."
    )
    if has_texts:
        return f"{lead} Keywords come from {len(outcome.documents):,} documents."
    return f"{lead} The vectors came without texts, so there are no keywords."


def _facts(outcome: Outcome, settings: Mapping[str, Any]) -> dict[str, str]:
    fit = outcome.fit
    found = {
        "vectors": f"{outcome.scan.rows:,} of {fit.centroids.shape[1]:,} numbers each",
        "centroids fitted on": outcome.fitted_on(),
        "iterations": str(fit.iterations),
        "empty clusters re-seeded while fitting": str(fit.reseeded),
        "inertia": f"{outcome.census.inertia:,.6g} (squared distances, all documents)",
        "imbalance": f"{outcome.scores['imbalance']:.2f} (1 when all clusters are equal)",
    }
    if outcome.choice is not None:
        found["why so many clusters"] = outcome.choice.reason
    named = {name.replace("_", " "): str(value) for name, value in settings.items()}
    named = {name: value for name, value in named.items() if value not in ("None", "")}
    return found | {name: value for name, value in named.items() if name not in found}


def _levels(outcome: Outcome) -> list[dict[str, Any]]:
    if len(outcome.levels) < 2:
        return []
    return [
        {**row, "share": f"{row['parent_share']:.0%}"}
        for row in levels_table(outcome.census).to_pylist()[:1_000]
    ]


def _outliers(outcome: Outcome) -> Listing:
    found = outcome.outliers
    return Listing(
        "Outliers",
        f"Documents {OUTLIER_DEVIATIONS:g} or more standard deviations farther from their centroid "
        f"than their cluster's mean: {len(found):,} among the farthest of each cluster."
        + _only_first(found),
        ("Id", "Cluster", "Deviations", "Text"),
        [
            (row["id"], row["cluster_id"], f"{row['deviations']:.1f}", row.get("text") or "")
            for row in found.slice(0, _LISTED).to_pylist()
        ],
    )


def _duplicates(outcome: Outcome) -> Listing:
    if outcome.duplicates is None:
        return Listing("Near-duplicates", "They were not looked for.", (), [])
    search = outcome.scores["near_duplicates"]
    note = (
        f"Documents with a cosine of at least {search['similarity']:g} to an earlier one of their "
        f"cluster: {search['count']:,} among {search['searched']:,} searched."
    )
    if search["sliced_clusters"]:
        note += f" {search['sliced_clusters']} large clusters were searched in slices."
    most_similar = outcome.duplicates.sort_by([("similarity", "descending")])
    return Listing(
        "Near-duplicates",
        note + _only_first(outcome.duplicates),
        ("Id", "Repeats", "Cosine", "Cluster"),
        [
            (row["id"], row["duplicate_of"], f"{row['similarity']:.4f}", row["cluster_id"])
            for row in most_similar.slice(0, _LISTED).to_pylist()
        ],
    )


def _only_first(table: pa.Table) -> str:
    return f" The first {_LISTED} are shown." if len(table) > _LISTED else ""
