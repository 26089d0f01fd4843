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
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from cluster.drift import Drift, measure_drift
from pipelines.corpus.files import CorpusFile, find_files
from pipelines.embedding.encode import duration
from pipelines.embedding.job import prepare_encoder
from pipelines.encoder.description import EncoderDescription
from pipelines.nightly.changes import Before, Changes, embed_changes, find_changes
from pipelines.nightly.checks import Check, NightFigures, run_checks
from pipelines.nightly.clusters import (
    Earlier,
    NightClusters,
    cluster_candidate,
    write_assignments,
)
from pipelines.nightly.config import NightConfig, decides_clusters
from pipelines.nightly.edits import broken_pairs
from pipelines.nightly.known_files import corpus_digest
from pipelines.nightly.night import Night, Steps
from pipelines.nightly.notify import notify
from pipelines.nightly.parts import moved_by_the_night
from pipelines.nightly.reuse import (
    find_leftovers,
    night_folder,
    other_folders,
    remove_work,
)
from pipelines.nightly.version_files import NEIGHBOURS, write_artifacts
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.logs import mark_lines
from pipelines.runtime.machines import ActorPlan
from pipelines.runtime.packaged import demo_corpus
from pipelines.runtime.run_record import RunRecord, changed_fields
from pipelines.runtime.units import map_on_ray
from pipelines.store.candidate import Candidate
from pipelines.store.compare import compare_neighbours, describe_neighbours
from pipelines.store.edits import EDITS_KEY, read_edits
from pipelines.store.full_text import has_text_index
from pipelines.store.lease import Lease
from pipelines.store.store import Store
from pipelines.store.version import Version

log = logging.getLogger(__name__)


JOB = "nightly_reindex"
_NEXT_ID = "next_cluster_id"
_FITTED_AT = "fitted_at"
_SINCE_FIT = "nights_since_fit"
COMPARED_DOCUMENTS = 200
"""Documents whose neighbours under another encoder are compared with those before."""
_CORPUS = "corpus"


def reindex(config: NightConfig) -> JobResult:
    """Bring the store up to date with its corpus, and publish the new version if all checks pass.

    The result has refusals where a check failed: the new version is then in the store, but not
    published. Raises :class:`InputError` for a corpus or options that do not do, and
    ``LeaseHeldError`` while another run has the store.
    """
    began_ns = time.time_ns()
    files = find_files(config.corpus or str(demo_corpus()), config.reading)
    if config.dry_run:
        from pipelines.nightly.dry_run import forecast  # torch

        there = Store.open_if_there(config.store)
        return forecast(*(prepare(config, there, files)[:3]), files)
    store = Store.open_or_create(config.store)
    steps = Steps()
    steps.begin(1)
    with store.take_lease(JOB) as lease:
        record = RunRecord(
            store.work_folder(), JOB, asdict(config), seed=config.seed, take_over=True
        )
        with record:
            mark_lines(JOB, record.run_id)
            result = run_night(config, store, lease, record, steps, files, began_ns)
    if config.notify:
        notify(config.notify, message_of(config, record, result))
    return result


def message_of(config: NightConfig, record: RunRecord, result: JobResult) -> dict[str, Any]:
    """What a webhook is told of a night."""
    names = [check["name"] for check in record.metrics.get("checks", ()) if not check["passed"]]
    event = "refused" if result.refusals else "published"
    if "version" not in result.summary:
        event = "unchanged"
    return {
        "event": "novel" if "novel" in names else event,
        "published": not result.refusals,
        "store": config.store,
        "version": record.metrics["version"],
        "reasons": list(result.refusals),
        "counts": dict(record.counts),
        "run_id": record.run_id,
    }


def run_night(
    config: NightConfig,
    store: Store,
    lease: Lease,
    record: RunRecord,
    steps: Steps,
    files: Sequence[CorpusFile],
    began_ns: int,
) -> JobResult:
    """The night under its lease; ``began_ns`` is when its files were listed."""
    steps.begin(2)
    config, encoder, before, folder = prepare(config, store, files)
    base = before.base
    corpus = corpus_digest(config.embed_config(""), files, encoder[1].fingerprint, began_ns)
    edits = read_edits(store.uri)
    night = Night(
        config, store, lease, record, steps, before, folder, datetime.now(UTC), edits, corpus
    )
    if corpus is not None and base is not None and not config.reread:
        told = base.record.details.get(_CORPUS) or {}
        if told.get("digest") == corpus and is_settled(night, base, encoder[1]):
            record.counts.update(told["counts"])
            return leave(night, base)
    compared = find_changes(config, folder, files, encoder, before)
    record.counts.update(compared.counts)
    if base is not None and compared.is_empty and is_settled(night, base, encoder[1]):
        return leave(night, base)
    steps.begin(3)
    changes = embed_changes(config, compared)
    record.counts.update(changes.counts)
    record.metrics.update(changes.metrics)
    steps.begin(4)
    candidate = store.begin(lease)
    write_documents(night, candidate, changes)
    return cluster_and_publish(night, candidate, changes)


def prepare(
    config: NightConfig, store: Store | None, files: Sequence[CorpusFile]
) -> tuple[NightConfig, tuple[ActorPlan, EncoderDescription], Before, str]:
    """Options with what the store decides, the encoder, what the night starts from, its folder.

    Without a store it is a first night.
    """
    if store is not None:
        config = with_stored_dtype(config, store)
    encoder = prepare_encoder(config.embed_config(""))
    if store is None:
        return config, encoder, Before(None, [], [], same_encoder=False), ""
    fingerprint = encoder[1].fingerprint
    base, others = store.published(), []
    newest = [v for v in store.versions() if v.record.fingerprint == fingerprint]
    if newest and (base is None or newest[-1].number != base.number):
        others = newest[-1:]
    compared = [version.number for version in (base, *others) if version is not None]
    root = store.work_folder()
    folder = night_folder(root, config.embed_config(""), files, fingerprint, compared)
    folder = f"{folder}-reread" if config.reread else folder
    leftovers = find_leftovers(root, folder, fingerprint, float16=config.float16)
    same_encoder = base is not None and base.record.fingerprint == fingerprint
    return config, encoder, Before(base, others, leftovers, same_encoder), folder


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
    earlier = None if base is None else Earlier.read(base, same_encoder=same_encoder)
    clusters = cluster_candidate(
        config,
        candidate,
        earlier,
        night.active,
        changed=changed_share(night, changes),
        when=night.when,
        fitted_at=fitted_at(night),
        next_id=next_cluster_id(night.store),
    )
    steps.begin(6)
    write_assignments(candidate, clusters)
    steps.begin(7)
    if base is not None and not same_encoder:
        night.record.metrics[NEIGHBOURS] = compare_neighbours(
            base.documents, candidate.documents, sample=COMPARED_DOCUMENTS, seed=config.seed
        )
    drift = find_drift(earlier, clusters)
    checks = run_checks(config, night_figures(night, changes, clusters, drift))
    write_artifacts(night, candidate, changes, clusters, drift, checks)
    steps.begin(8)
    index = candidate.update_index(seed=config.seed, full_text=config.full_text)
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
    earlier = {**asdict(NightConfig()), **json.loads(base.read("run.json"))["config"]}
    return not set(changed_fields(earlier, asdict(config))) & decides_clusters()


def is_settled(night: Night, base: Version, encoder: EncoderDescription) -> bool:
    """Whether a version's clusters, edits and prompt of queries are what this night's would be."""
    prompt = json.loads(base.read("encoder.json")).get("query_prompt")
    if prompt != encoder.to_json().get("query_prompt"):
        return False
    if night.config.full_text and not has_text_index(base.documents):
        return False
    newest = night.edits[-1].number if night.edits else 0
    seen = base.record.details.get(EDITS_KEY, 0)
    return newest == seen and same_clustering(night.config, base)


def fitted_at(night: Night) -> datetime | None:
    """When the clusters were fitted that documents join this night; None where they are fitted.

    A version of an earlier release was fitted in its own night.
    """
    config, base = night.config, night.before.base
    if config.clusters == "refit" or base is None or not night.before.same_encoder:
        return None
    if not same_clustering(config, base) or refit_due_in(config, base) == 0:
        return None
    return datetime.fromisoformat(base.record.details.get(_FITTED_AT, base.record.created_at))


def refit_due_in(config: NightConfig, base: Version) -> int | None:
    """In how many nights, this one counted as 0, clusters are fitted anew; None for never."""
    if not config.refit_every:
        return None
    return max(0, config.refit_every - 1 - int(base.record.details.get(_SINCE_FIT, 0)))


def next_counts(night: Night) -> dict[str, Any]:
    """What the next night counts if it lists the same corpus, with that corpus's digest."""
    counts = {name: night.record.counts[name] for name in ("documents", "repeats", "rejected")}
    unchanged = 2 * counts["documents"] - sum(counts.values())
    none = dict.fromkeys(("new", "changed", "deleted", "retouched"), 0)
    return {"digest": night.corpus, "counts": {**counts, **none, "unchanged": unchanged}}


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
    if changes.compared.rewrite:
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


def find_drift(earlier: Earlier | None, clusters: NightClusters) -> Drift | None:
    """How far the clusters moved; None on the first night."""
    published = clusters.published
    if earlier is None or published.shared is None:
        return None
    scores = json.loads(earlier.version.read("scores.json"))
    radius = math.sqrt(scores["inertia"] / max(1, scores["documents"]))
    old, new, identity, shared = moved_by_the_night(
        published, earlier.clusters, earlier.parts, clusters.split
    )
    return measure_drift(old, new, identity, shared, radius=radius)


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
        novel_groups=[] if clusters.novelty is None else clusters.novelty.sizes,
        broken_edits=[
            edit.describe() for edit in broken_pairs(night.active, clusters.published.identity)
        ],
    )


def seal(
    night: Night, candidate: Candidate, clusters: NightClusters, checks: Sequence[Check]
) -> Version:
    """Make the candidate a version, with the reasons that speak against publishing it."""
    reasons = [check.reason for check in checks if check.refuses]
    outcome, record = clusters.outcome, night.record
    record.counts["clusters"] = len(clusters.published.new.sizes)
    if clusters.novelty is not None:
        record.counts["novel"] = len(clusters.novelty.table)
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
            _NEXT_ID: clusters.published.identity.next_id,
            "checks": [asdict(check) for check in checks],
            EDITS_KEY: night.edits[-1].number if night.edits else 0,
            **fit_details(night),
            "seconds": round(sum(night.steps.seconds.values()), 1),
            **({} if night.corpus is None else {_CORPUS: next_counts(night)}),
        },
    )


def fit_details(night: Night) -> dict[str, Any]:
    """When the clusters were fitted, and how many versions ago."""
    base, standing = night.before.base, fitted_at(night)
    if standing is None or base is None:
        return {_FITTED_AT: night.when.isoformat(), _SINCE_FIT: 0}
    return {
        _FITTED_AT: standing.isoformat(),
        _SINCE_FIT: int(base.record.details.get(_SINCE_FIT, 0)) + 1,
    }


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
    events = [event.event for event in clusters.published.identity.events]
    rows = {
        "version": f"{version.number}, "
        + ("NOT published" if version.record.reasons else "published"),
        "documents": f"{version.count():,}",
        "changes": ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds if counts[kind]),
        "texts embedded": f"{counts['embedded']:,}, and {counts['reused']:,} known ones reused",
        "clusters": f"{len(clusters.published.new.sizes):,}"
        + "".join(f", {events.count(kind)} {kind}" for kind in dict.fromkeys(events)),
    }
    if clusters.novelty is not None:
        due = refit_due_in(night.config, version)
        when = "--refit-every is 0" if due is None else f"a fit is due in {due + 1} nights"
        rows["novel"] = f"{len(clusters.novelty.table):,} documents fit nowhere; {when}"
    near = night.record.metrics.get(NEIGHBOURS)
    if near is not None:
        rows[f"same {near['neighbours']} nearest"] = describe_neighbours(near)
    if drift is not None:
        moved = "–" if drift.assignments is None else f"{drift.assignments:.2%}"
        rows["drift"] = f"{moved} of {drift.untouched:,} untouched documents changed clusters"
    for number, check in enumerate([c for c in checks if not c.passed], 1):
        rows[f"check {number}"] = check.says + (" (accepted)" if check.accepted else "")
    took = duration(sum(night.steps.seconds.values()))
    return rows | {"took": took, "report": version.path("report.html")}
