"""A night: the store follows its corpus at the cost of what changed, or stays as it was.

In: a corpus and a store (:mod:`pipelines.store.store`). Out: a new version of the store, published
if all checks pass. Until the tag moves, readers see the old version; what a killed night has
embedded, the next one does not embed again.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from cluster.drift import Drift, changes_section, measure_drift
from cluster.identity import OldClusters, lineage_table
from cluster.outcome import centroids_table, clusters_table
from cluster.report import build_report, render_report
from cluster.report_data import Changes as ChangesSection
from pipelines.corpus.files import CorpusFile, find_files
from pipelines.embedding.encode import duration
from pipelines.embedding.job import prepare_encoder
from pipelines.nightly.changes import Before, Changes, embed_changes, find_changes
from pipelines.nightly.checks import Check, NightFigures, run_checks
from pipelines.nightly.clusters import (
    CENTROIDS,
    CLUSTERS,
    NightClusters,
    cluster_candidate,
    clusters_with_names,
    map_on_ray,
    read_lineage,
    read_old_clusters,
    vanished_texts,
    write_assignments,
)
from pipelines.nightly.config import NightConfig, decides_clusters
from pipelines.nightly.reuse import (
    find_leftovers,
    night_folder,
    other_folders,
    remove_work,
)
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, list_files, read_bytes
from pipelines.runtime.logs import mark_lines
from pipelines.runtime.packaged import demo_corpus
from pipelines.runtime.run_record import RunRecord, changed_fields
from pipelines.store.candidate import Candidate
from pipelines.store.lease import Lease
from pipelines.store.store import Store
from pipelines.store.version import Version

log = logging.getLogger(__name__)

STEPS = (
    "take the lease",
    "compare the corpus with the published version",
    "embed what is new or changed",
    "write documents into a candidate",
    "cluster, from the centroids before",
    "write the clusters of all documents",
    "write scores and report",
    "bring the vector index up to date",
    "check and seal",
    "publish",
    "clean up",
)


class Steps:
    """Tells which step begins, and how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._step = ""
        self._began = time.monotonic()

    def begin(self, number: int) -> None:
        """Announce step ``number``, from 1."""
        self.end()
        self._step = STEPS[number - 1]
        announce(number)

    def end(self) -> None:
        """The step that was begun last is done."""
        now = time.monotonic()
        if self._step:
            self.seconds[self._step] = round(now - self._began, 3)
        self._step, self._began = "", now


def announce(number: int) -> None:
    """One line to the log."""
    log.info("step %d of %d: %s", number, len(STEPS), STEPS[number - 1])


__all__ = ["NightConfig", "reindex"]

JOB = "nightly_reindex"
LINEAGE = "lineage.parquet"
_NEXT_ID = "next_cluster_id"


@dataclass
class Night:
    """One run, as its steps share it."""

    config: NightConfig
    store: Store
    lease: Lease
    record: RunRecord
    steps: Steps
    before: Before
    folder: str
    when: datetime


def reindex(config: NightConfig) -> JobResult:
    """Bring the store up to date with its corpus, and publish the new version if all checks pass.

    The result has refusals where a check failed: the new version is then in the store, but not
    published. Raises :class:`InputError` for a corpus or options that do not do, and
    ``LeaseHeldError`` while another run has the store.
    """
    files = find_files(config.corpus or str(demo_corpus()), config.reading)
    store = Store.open_or_create(config.store)
    steps = Steps()
    steps.begin(1)
    with store.take_lease(JOB) as lease:
        record = RunRecord(
            store.work_folder(), JOB, asdict(config), seed=config.seed, take_over=True
        )
        with record:
            mark_lines(JOB, record.run_id)
            return run_night(config, store, lease, record, steps, files)


def run_night(
    config: NightConfig,
    store: Store,
    lease: Lease,
    record: RunRecord,
    steps: Steps,
    files: Sequence[CorpusFile],
) -> JobResult:
    """The night under its lease."""
    steps.begin(2)
    config = with_stored_dtype(config, store)
    encoder = prepare_encoder(config.embed_config(""))
    fingerprint = encoder[1].fingerprint
    base, others = store.published(), []
    newest = [v for v in store.versions() if v.record.fingerprint == fingerprint]
    if newest and (base is None or newest[-1].number != base.number):
        others = newest[-1:]
    compared = [version.number for version in (base, *others) if version is not None]
    root = store.work_folder()
    folder = night_folder(root, config.embed_config(""), files, fingerprint, compared)
    before = Before(
        base,
        others,
        find_leftovers(root, folder, fingerprint),
        base is not None and base.record.fingerprint == fingerprint,
    )
    night = Night(config, store, lease, record, steps, before, folder, datetime.now(UTC))
    found = find_changes(config, folder, files, encoder, before)
    record.counts.update(found.counts)
    if found.is_empty and base is not None and same_clustering(config, base):
        return leave(night, base)
    steps.begin(3)
    changes = embed_changes(config, found)
    record.counts.update(changes.counts)
    record.metrics.update(changes.metrics)
    steps.begin(4)
    candidate = store.begin(lease)
    write_documents(night, candidate, changes)
    return cluster_and_publish(night, candidate, changes)


def with_stored_dtype(config: NightConfig, store: Store) -> NightConfig:
    """``config`` with the published version's dtype for ``auto``.

    Else a night on another kind of machine would be one with another encoder.
    """
    version = store.published()
    if config.dtype != "auto" or version is None or "encoder.json" not in version.record.artifacts:
        return config
    return replace(config, dtype=json.loads(version.read("encoder.json"))["dtype"])


def cluster_and_publish(night: Night, candidate: Candidate, changes: Changes) -> JobResult:
    """The second half, once the candidate's documents are written."""
    config, base, steps = night.config, night.before.base, night.steps
    same_encoder = night.before.same_encoder
    steps.begin(5)
    old = None if base is None else read_old_clusters(base, same_encoder=same_encoder)
    clusters = cluster_candidate(
        config,
        candidate,
        old,
        changed=changed_share(night, changes),
        when=night.when,
        next_id=next_cluster_id(night.store),
    )
    steps.begin(6)
    write_assignments(candidate, clusters)
    steps.begin(7)
    drift = find_drift(base, old, clusters)
    checks = run_checks(config, night_figures(night, changes, clusters, drift))
    write_artifacts(night, candidate, changes, clusters, drift, checks)
    steps.begin(8)
    index = candidate.update_index(seed=config.seed)
    steps.begin(9)
    version = seal(night, candidate, clusters, checks)
    refusals = list(version.record.reasons)
    if not refusals:
        steps.begin(10)
        night.store.publish(
            version.number, night.lease, expected=None if base is None else base.number
        )
    steps.begin(11)
    remove_work([night.folder, *other_folders(night.store.work_folder(), night.folder)])
    steps.end()
    night.record.metrics.update(
        {
            "version": version.number,
            "published": not refusals,
            "step_seconds": steps.seconds,
            "recall_at_10": index.recall_at_10,
        }
    )
    summary = summarize(night, version, clusters, drift, checks)
    return JobResult(summary=summary, refusals=refusals)


def changed_share(night: Night, changes: Changes) -> float:
    """Share of the documents that are not as they were; 1 where all are clustered anew."""
    base = night.before.base
    if base is None or not same_clustering(night.config, base):
        return 1.0
    touched = sum(changes.counts[kind] for kind in ("new", "changed", "deleted"))
    return min(1.0, touched / max(1, base.count()))


def same_clustering(config: NightConfig, base: Version) -> bool:
    """Whether a version was clustered as this night would."""
    earlier = json.loads(base.read("run.json"))["config"]
    return not set(changed_fields(earlier, asdict(config))) & decides_clusters()


def leave(night: Night, base: Version) -> JobResult:
    """The result of a night in which nothing had changed."""
    night.steps.begin(11)
    remove_work([night.folder, *other_folders(night.store.work_folder(), night.folder)])
    night.steps.end()
    night.record.counts.update({"embedded": 0, "reused": 0, "written": 0, "tokens": 0})
    night.record.metrics.update(
        {"version": base.number, "published": True, "step_seconds": night.steps.seconds}
    )
    summary = {
        "nothing changed": f"version {base.number} stays published",
        "documents": f"{base.count():,}",
        "store": night.config.store,
    }
    return JobResult(summary=summary)


def write_documents(night: Night, candidate: Candidate, changes: Changes) -> None:
    """Make the candidate's documents those of the corpus."""
    if changes.found.rewrite:
        candidate.replace(changes.paths, schema=changes.schema, when=night.when, run=map_on_ray)
    else:
        if changes.paths:
            candidate.upsert(changes.paths, schema=changes.schema, when=night.when)
        candidate.delete(changes.deleted())
        for table in changes.retouched():
            candidate.update_columns(table)
    if not candidate.count():
        raise InputError("no document of the corpus has a vector: its vectors are not finite")


def next_cluster_id(store: Store) -> int:
    """The first cluster id that no version, published or not, has given."""
    return max((int(v.record.details.get(_NEXT_ID, 0)) for v in store.versions()), default=0)


def find_drift(base: Version | None, old: OldClusters | None, found: NightClusters) -> Drift | None:
    """How far the clusters moved; None on the first night."""
    if base is None or old is None or found.shared is None:
        return None
    scores = json.loads(base.read("scores.json"))
    radius = math.sqrt(scores["inertia"] / max(1, scores["documents"]))
    return measure_drift(old, found.new, found.identity, found.shared, radius=radius)


def night_figures(
    night: Night, changes: Changes, clusters: NightClusters, drift: Drift | None
) -> NightFigures:
    """What the checks look at."""
    base = night.before.base
    other_encoder = base is not None and not night.before.same_encoder
    return NightFigures(
        counts=changes.counts,
        documents_before=0 if base is None else base.count(),
        scores=clusters.outcome.scores,
        scores_before=None if base is None else json.loads(base.read("scores.json")),
        drift=drift,
        encoder_before=base.record.fingerprint if base is not None and other_encoder else None,
    )


def write_artifacts(
    night: Night,
    candidate: Candidate,
    changes: Changes,
    clusters: NightClusters,
    drift: Drift | None,
    checks: Sequence[Check],
) -> None:
    """Write what belongs to the version beside its documents."""
    outcome, identity = clusters.outcome, clusters.identity
    lineage = lineage_table(identity.events, candidate.number)
    candidate.put("encoder.json", to_json(changes.found.run.description.to_json()))
    candidate.put_table(
        CENTROIDS, centroids_table(clusters.new.centroids, clusters.new.sizes, identity.ids)
    )
    described = clusters_table(outcome.clusters, outcome.documents.ids.type)
    candidate.put_table(CLUSTERS, clusters_with_names(described, identity.names))
    candidate.put_table(LINEAGE, read_lineage(night.before.base, LINEAGE, lineage))
    candidate.put("scores.json", to_json(outcome.scores))
    candidate.put("checks.json", to_json([asdict(check) for check in checks]))
    rejected = join(night.folder, "rejected")
    for name in list_files(rejected):
        candidate.put(f"rejected/{name}", read_bytes(join(rejected, name)))
    settings = {"embeddings": night.config.store, **asdict(night.config)}
    report = build_report(
        outcome,
        settings,
        map_documents=night.config.map_documents,
        seed=night.config.seed,
        changes=describe_changes(night, changes, clusters, drift),
        linear_map=night.config.map_method == "pca",
    )
    candidate.put("report.html", render_report(report).encode())


def describe_changes(
    night: Night, changes: Changes, clusters: NightClusters, drift: Drift | None
) -> ChangesSection | None:
    """The report's section about what changed since the version before."""
    base = night.before.base
    if base is None or drift is None:
        return None
    gone = [change.cluster_id for change in drift.changes if change.kind == "vanished"]
    counts = changes.counts
    figures = (
        f"{counts['new']:,} new documents, {counts['changed']:,} changed, "
        f"{counts['deleted']:,} deleted, {counts['unchanged']:,} as they were."
    )
    since = f"version {base.number} of {base.record.created_at}"
    texts = vanished_texts(base, gone)
    return changes_section(drift, clusters.outcome.clusters, texts, since=since, figures=figures)


def seal(
    night: Night, candidate: Candidate, clusters: NightClusters, checks: Sequence[Check]
) -> Version:
    """Make the candidate a version, with the reasons that speak against publishing it."""
    reasons = [check.reason for check in checks if check.refuses]
    outcome, record = clusters.outcome, night.record
    record.counts["clusters"] = len(clusters.new.sizes)
    record.metrics["checks"] = [asdict(check) for check in checks]
    candidate.put("run.json", record.content("complete"))
    internal = outcome.scores["internal"]
    labels = outcome.scores["labels"] or {}
    return candidate.seal(
        counts={**record.counts, "documents": candidate.count()},
        scores={
            "silhouette": internal["silhouette"],
            "v_measure": labels.get("v_measure"),
            "inertia": outcome.scores["inertia"],
            "imbalance": outcome.scores["imbalance"],
        },
        reasons=reasons,
        details={
            _NEXT_ID: clusters.identity.next_id,
            "checks": [asdict(check) for check in checks],
        },
    )


def summarize(
    night: Night,
    version: Version,
    clusters: NightClusters,
    drift: Drift | None,
    checks: Sequence[Check],
) -> dict[str, str]:
    """The table that a person sees at the end."""
    counts = night.record.counts
    kinds = ("new", "changed", "deleted", "unchanged", "retouched", "rejected")
    events = [event.event for event in clusters.identity.events]
    rows = {
        "version": f"{version.number}, "
        + ("NOT published" if version.record.reasons else "published"),
        "documents": f"{version.count():,}",
        "changes": ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds if counts[kind]),
        "texts embedded": f"{counts['embedded']:,}, and {counts['reused']:,} known ones reused",
        "clusters": f"{len(clusters.new.sizes):,}"
        + "".join(f", {events.count(kind)} {kind}" for kind in dict.fromkeys(events)),
    }
    if drift is not None:
        moved = "–" if drift.assignments is None else f"{drift.assignments:.2%}"
        rows["drift"] = f"{moved} of {drift.untouched:,} untouched documents changed clusters"
    for number, check in enumerate([c for c in checks if not c.passed], 1):
        rows[f"check {number}"] = check.says + (" (accepted)" if check.accepted else "")
    took = duration(sum(night.steps.seconds.values()))
    return rows | {"took": took, "report": version.path("report.html")}


def to_json(content: Any) -> bytes:
    """JSON for people and machines."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
