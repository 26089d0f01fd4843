"""What belongs to a night's version beside its documents: tables, scores, checks and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.document_map import join_maps, lay_out
from cluster.drift import Drift, changes_section
from cluster.identity import lineage_table
from cluster.report import build_report, render_report
from cluster.report_data import Changes as ChangesSection
from cluster.report_data import Listing
from cluster.roll_up import (
    ASSIGNED,
    FILE_NAME,
    count_passages,
    join_counts,
    part_of,
    partitions_of,
)
from cluster.tables import clusters_table
from pipelines.nightly.changes import Changes
from pipelines.nightly.checks import Check
from pipelines.nightly.clusters import NightClusters, vanished_texts
from pipelines.nightly.config import NightConfig
from pipelines.nightly.edits import applied_table
from pipelines.nightly.fits import fitted_at
from pipelines.nightly.night import Night
from pipelines.nightly.novelty import NOVEL
from pipelines.nightly.parts import CENTROIDS, CLUSTERS
from pipelines.nightly.titles import TITLES, titles_table
from pipelines.runtime.files import join, json_bytes, list_files, make_folder, read_bytes
from pipelines.runtime.units import map_on_ray
from pipelines.store.candidate import Candidate
from pipelines.store.compare import Side, compare, describe_neighbours, figures_of, summary_rows
from pipelines.store.documents import FragmentRef, read_fragment
from pipelines.store.edits import EDITS, Edit
from pipelines.store.version import Version

LINEAGE = "lineage.parquet"
COMPARED = "compare.json"
COMPARED_DOCUMENTS = 200
"""Documents whose neighbours under another encoder are compared with those before."""
_REASONS = {
    "edit": "people",
    "text": "another text",
    "encoder": "another encoder",
    "centroid": "centroids that moved",
}
NEIGHBOURS = "neighbours"
"""In a run's metrics: how many neighbours documents keep under another encoder."""
_LISTED_FLOWS = 25


def write_artifacts(
    night: Night,
    candidate: Candidate,
    changes: Changes,
    clusters: NightClusters,
    drift: Drift | None,
    checks: Sequence[Check],
    recall: float,
) -> None:
    """Write what belongs to the version beside its documents; ``recall`` is that of its search."""
    outcome, published = clusters.outcome, clusters.published
    lineage = lineage_table(published.identity.events, candidate.number)
    candidate.put("encoder.json", json_bytes(changes.compared.run.description.to_json()))
    candidate.put_table(CENTROIDS, published.parts.table())
    candidate.put_table(CLUSTERS, clusters_table(outcome.clusters, outcome.documents.ids.type))
    if clusters.titles or night.config.name_model is not None:  # also none is an answer
        identity = published.identity
        by_keywords = dict(zip(identity.ids.tolist(), identity.names, strict=True))
        candidate.put_table(TITLES, titles_table(clusters.titles, by_keywords))
    applied = applied_table(
        night.active, night.edits, night.before.base, candidate.number, clusters.published,
        clusters.pins, clusters.split, night.before.same_encoder,
    )  # fmt: skip
    if len(applied):
        candidate.put_table(EDITS, applied)
    if clusters.novelty is not None:
        candidate.put_table(NOVEL, clusters.novelty.artifact(published.parts.ids))
    candidate.put_table(LINEAGE, _grown_lineage(night.before.base, lineage))
    candidate.put("scores.json", json_bytes(outcome.scores))
    candidate.put("checks.json", json_bytes([asdict(check) for check in checks]))
    if night.config.passages:
        candidate.put(FILE_NAME, roll_up_version(candidate, join(night.folder, "documents")))
    rejected = join(night.folder, "rejected")
    for name in list_files(rejected):
        candidate.put(f"rejected/{name}", read_bytes(join(rejected, name)))
    settings = {"embeddings": night.config.store, **asdict(night.config)}
    settings["clusters_fitted_at"] = fitted_at(night)  # None, and so not shown, where tonight
    layout = lay_out(
        outcome.documents.head(night.config.map_documents).vectors,
        night.config.seed,
        linear=night.config.map_method == "pca",
    )
    comparison = None
    if night.before.base is not None:
        comparison = compare_candidate(night, candidate, changes, clusters, checks, recall, applied)
        candidate.put(COMPARED, json_bytes(comparison))
    about = describe_changes(night, changes, clusters, drift, applied, comparison)
    report = build_report(outcome, settings, layout, changes=about)
    candidate.put("report.html", render_report(report).encode())


def roll_up_version(candidate: Candidate, folder: str) -> bytes:
    """``documents.parquet`` of a candidate of passages, as :func:`cluster.roll_up.roll_up` has it.

    ``folder`` is for unfinished work; what an earlier try left there is written over.
    """
    make_folder(folder)
    partitions = partitions_of(candidate.count())
    fragments = [ref for ref in candidate.fragments() if ref.rows]
    list(map_on_ray(partial(_count_fragment, folder, partitions), fragments))
    names = [str(ref.fragment) for ref in fragments]
    list(map_on_ray(partial(join_counts, folder, names), range(partitions)))
    joined = join(folder, FILE_NAME)
    join_maps([part_of(folder, number) for number in range(partitions)], joined)
    return read_bytes(joined)


def _count_fragment(folder: str, partitions: int, ref: FragmentRef) -> int:
    batches = read_fragment(ref, ASSIGNED)
    return count_passages(pa.Table.from_batches(batches), folder, partitions, str(ref.fragment))


def describe_changes(
    night: Night,
    changes: Changes,
    clusters: NightClusters,
    drift: Drift | None,
    applied: pa.Table,
    comparison: Mapping[str, Any] | None,
) -> ChangesSection | None:
    """The report's section about what changed since the version before."""
    base = night.before.base
    if base is None or drift is None or comparison is None:
        return None
    gone = [change.cluster_id for change in drift.changes if change.kind == "vanished"]
    counts = changes.counts
    figures = (
        f"{counts['new']:,} new documents, {counts['changed']:,} changed, "
        f"{counts['deleted']:,} deleted, {counts['unchanged']:,} as they were."
    )
    since = f"version {base.number} of {base.record.created_at}"
    texts = vanished_texts(base, gone)
    section = changes_section(drift, clusters.outcome.clusters, texts, since=since, figures=figures)
    near = night.record.metrics.get(NEIGHBOURS)
    note = section.note
    if near is not None:
        note += (
            f" Share of a document's {near['neighbours']} nearest that are the same under the two "
            f"encoders: {describe_neighbours(near)}."
        )
    lists = [
        *section.lists,
        flows_listing(clusters),
        *compared_listings(base.number, comparison),
        *edits_listing(night.edits, applied),
    ]
    return replace(section, note=note, lists=lists)


def compare_candidate(
    night: Night,
    candidate: Candidate,
    changes: Changes,
    clusters: NightClusters,
    checks: Sequence[Check],
    recall: float,
    applied: pa.Table,
) -> dict[str, Any]:
    """The candidate beside the version before, as ``manage_store.py compare`` has it.

    Neighbours are compared where the encoder is another: under one encoder a document that did not
    change has the vector that it had.
    """
    base = night.before.base
    assert base is not None
    figures = figures_of(
        candidate.number,
        changes.compared.run.description.fingerprint,
        counts={**night.record.counts, **stored_counts(night.config, candidate)},
        scores=scores_of(clusters),
        recall=recall,
        reasons=[check.reason for check in checks if check.refuses],
        seconds=round(sum(night.steps.seconds.values()), 1),
    )
    old, new = Side.of(base), Side(candidate.documents, figures, applied.to_pylist())
    sample = 0 if night.before.same_encoder else COMPARED_DOCUMENTS
    comparison = compare(old, new, sample=sample, seed=night.config.seed)
    if sample:
        night.record.metrics[NEIGHBOURS] = comparison["neighbours"]
    return comparison


def stored_counts(config: NightConfig, candidate: Candidate) -> dict[str, int]:
    """Documents of a version and, where they are cut, passages, which are then its rows."""
    if not config.passages:
        return {"documents": candidate.count()}
    return {"documents": candidate.count("passage = 0"), "passages": candidate.count()}


def scores_of(clusters: NightClusters) -> dict[str, float | None]:
    """The scores that a version's record has."""
    scores = clusters.outcome.scores
    return {
        "silhouette": scores["internal"]["silhouette"],
        "v_measure": (scores["labels"] or {}).get("v_measure"),
        "inertia": scores["inertia"],
        "imbalance": scores["imbalance"],
    }


def compared_listings(number: int, comparison: Mapping[str, Any]) -> list[Listing]:
    """The report's tables of the comparison with version ``number``."""
    rows = [tuple([*row, ""][:3]) for row in summary_rows(comparison)]
    listings = [Listing(f"Compared with version {number}", "", ("", "Before", "After"), rows)]
    for why, moves in comparison["moved"]["first"].items():
        if moves:
            count = comparison["moved"]["reasons"][why]
            note = f"{count:,} documents are in another cluster for this reason; the first of them."
            moved = [(str(move["id"]), str(move["old"]), str(move["new"])) for move in moves]
            columns = ("Document", "Before", "After")
            listings.append(Listing(f"Moved by {_REASONS[why]}", note, columns, moved))
    return listings


def flows_listing(clusters: NightClusters) -> Listing:
    """The report's table of untouched documents that went from one cluster into another."""
    shared, identity = clusters.published.shared, clusters.published.identity
    assert shared is not None
    olds, places = np.nonzero(shared)
    flows = [
        (int(clusters.old_ids[old]), int(identity.ids[place]), int(shared[old, place]))
        for old, place in zip(olds, places, strict=True)
    ]
    moved = sorted((f for f in flows if f[0] != f[1]), key=lambda flow: (-flow[2], flow))
    note = f"{sum(f[2] for f in moved):,} documents that did not change went elsewhere."
    rows = [(f"{old} → {new}", f"{count:,}") for old, new, count in moved[:_LISTED_FLOWS]]
    return Listing("From cluster to cluster", note, ("Clusters", "Documents"), rows)


def edits_listing(edits: Sequence[Edit], applied: pa.Table) -> list[Listing]:
    """The report's table of people's edits, none where there are none."""
    described = {edit.number: edit.describe() for edit in edits}
    rows = [
        (described[row["edit"]], row["status"], row["overrode"] or "", row["says"] or "")
        for row in applied.to_pylist()
    ]
    note = f"{len(rows):,} edits of people, applied after the clusters were matched."
    columns = ("Edit", "Status", "Instead of", "")
    return [Listing("Edits", note, columns, rows)] if rows else []


def _grown_lineage(base: Version | None, added: pa.Table) -> pa.Table:
    """The lineage of a version and what is added to it."""
    if base is None:
        return added
    return pa.concat_tables([base.read_table(LINEAGE), added])
