"""A night: the store follows its corpus at the cost of what changed, or stays as it was.

In: a corpus and a store (:mod:`pipelines.store.store`). Out: a new version of the store, published
if all checks pass. Until the tag moves, readers see the old version; what a killed night has
embedded, the next one does not embed again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from cluster.drift import Drift, measure_drift
from pipelines.corpus.files import CorpusFile, find_corpus
from pipelines.embedding.encode import EmbeddingStoppedError
from pipelines.embedding.job import describe_beforehand, prepare_encoder
from pipelines.encoder.description import AUTO_ADAPTER, EncoderDescription
from pipelines.encoder.sources import PACKAGED_MODEL
from pipelines.nightly.changes import (
    Before,
    Changes,
    ComparedCorpus,
    embed_changes,
    find_changes,
    in_passages,
    passage_details,
)
from pipelines.nightly.checks import Check, NightFigures, run_checks
from pipelines.nightly.clusters import (
    ACCEPTED_GROUPS,
    Earlier,
    NightClusters,
    accepted_groups,
    cluster_candidate,
    write_assignments,
)
from pipelines.nightly.config import NightConfig
from pipelines.nightly.edits import broken_pairs, has_split_to_do
from pipelines.nightly.fits import (
    changed_share,
    describe_refit,
    fit_details,
    fitted_at,
    has_fit_to_do,
    same_clustering,
    spread_of,
)
from pipelines.nightly.known_files import corpus_digest
from pipelines.nightly.night import Night, Steps
from pipelines.nightly.notify import UNFINISHED, message_of, notify, summarize
from pipelines.nightly.own_vectors import describe_vectors, source_of, vector_takers
from pipelines.nightly.parts import moved_by_the_night
from pipelines.nightly.reuse import (
    begin_backfill,
    clean_up,
    find_leftovers,
    night_folder,
)
from pipelines.nightly.titles import TITLES, check_writer
from pipelines.nightly.version_files import scores_of, stored_counts, write_artifacts
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.logs import mark_lines
from pipelines.runtime.machines import ActorPlan
from pipelines.runtime.packaged import demo_corpus
from pipelines.runtime.run_record import RunRecord
from pipelines.runtime.units import map_on_ray
from pipelines.store.backfill import open_backfills
from pipelines.store.candidate import Candidate
from pipelines.store.edits import EDITS_KEY, Edit, known_edits, read_edits
from pipelines.store.index import has_text_index
from pipelines.store.lease import Lease
from pipelines.store.store import Store
from pipelines.store.version import Version

log = logging.getLogger(__name__)


JOB = "nightly_reindex"
_NEXT_ID = "next_cluster_id"
_CORPUS = "corpus"


def reindex(config: NightConfig, connect: Callable[[], None] = lambda: None) -> JobResult:
    """Bring the store up to date with its corpus, and publish the new version if all checks pass.

    ``connect`` joins or starts a Ray cluster; it is called where one is needed, which a night in
    which nothing changed does not. The result has refusals where a check failed: the new version
    is then in the store, but not published. Raises :class:`InputError` for a corpus or options
    that do not do, and ``LeaseHeldError`` while another run has the store.
    """
    began_ns = time.time_ns()
    listing = find_corpus(config.corpus or str(demo_corpus()), config.reading)
    files = listing.files
    if config.dry_run:
        from pipelines.nightly.dry_run import forecast  # torch

        connect()
        existing = Store.open_if_there(config.store)
        edits = [] if existing is None else read_edits(existing.uri)
        return forecast(*(prepare(config, existing, files)[:3]), listing, edits)
    store = Store.open_or_create(config.store)
    steps = Steps()
    steps.begin(1)
    with store.take_lease(JOB) as lease:
        record = RunRecord(
            store.work_folder(), JOB, asdict(config), seed=config.seed, take_over=True
        )
        with record:
            mark_lines(JOB, record.run_id)
            record.metrics["files_passed_over"] = len(listing.passed_over)
            result = run_night(config, store, lease, record, steps, files, began_ns, connect)
    if config.notify:
        notify(config.notify, message_of(config.store, record, result))
    return result


def run_night(
    config: NightConfig,
    store: Store,
    lease: Lease,
    record: RunRecord,
    steps: Steps,
    files: Sequence[CorpusFile],
    began_ns: int,
    connect: Callable[[], None],
) -> JobResult:
    """The night under its lease; ``began_ns`` is when its files were listed."""
    steps.begin(2)
    config, edits = with_stored_encoder(config, store), read_edits(store.uri)
    base = store.published()
    as_before = base is not None and listed_as_before(config, base, files, began_ns)
    if not config.vector_column:
        known = describe_beforehand(config.embed_config(""))
    else:
        known = describe_vectors(config, files, base) if as_before else None
    if base and known and as_before and is_settled(config, edits, base, known):
        record.counts.update(base.record.details[_CORPUS]["counts"])
        return leave(config, store, record, steps, base)
    connect()
    config, encoder, before, folder = prepare(config, store, files, known)
    source = source_of(config, encoder[1].fingerprint)
    corpus = corpus_digest(config.embed_config(""), files, source, began_ns)
    night = Night(
        config, store, lease, record, steps, before, folder, datetime.now(UTC), edits, corpus
    )
    compared = find_changes(config, folder, files, encoder, before)
    record.counts.update(compared.counts)
    if base is not None and compared.is_empty and is_settled(config, edits, base, encoder[1]):
        return leave(config, store, record, steps, base)
    check_writer(config, base)
    steps.begin(3)
    if config.max_embed_hours or (base is not None and not before.same_encoder):
        log.info("disk: %s", compared.disk(config.store))
    try:
        changes = embed_in_time(night, compared)
    except EmbeddingStoppedError as stopped:
        return leave_unfinished(night, compared, stopped)
    record.counts.update(changes.counts)
    record.metrics.update(changes.metrics)
    steps.begin(4)
    candidate = store.begin(lease)
    write_documents(night, candidate, changes)
    return cluster_and_publish(night, candidate, changes)


def embed_in_time(night: Night, compared: ComparedCorpus) -> Changes:
    """The changes embedded; with a limit of time the vectors gather for the next night."""
    if night.config.max_embed_hours:
        known = compared.settled.known
        begin_backfill(
            night.store, compared.run.description.fingerprint, night.folder, night.before.leftovers,
            texts=known + compared.settled.distinct, known=known,
        )  # fmt: skip
    return embed_changes(night.config, compared)


def leave_unfinished(
    night: Night, compared: ComparedCorpus, stopped: EmbeddingStoppedError
) -> JobResult:
    """The result of a night whose time for embedding was over; nothing of the store has changed."""
    night.steps.end()
    known, base = compared.settled.known, night.before.base
    fingerprint = compared.run.description.fingerprint
    embedded, texts = known + stopped.texts, known + compared.settled.distinct
    under_way = [b for b in open_backfills(night.store) if b.fingerprint == fingerprint]
    for backfill in under_way:
        backfill.extended((), texts=texts, embedded=embedded, nights=0).save(night.store)
    night.record.counts.update(
        {"embedded": stopped.texts, "reused": known, "written": 0, "clusters": 0}
    )
    number = None if base is None else base.number
    night.record.metrics.update(
        {"version": number, "published": False, "step_seconds": night.steps.seconds}
        | stopped.figures
    )
    nights = math.ceil((texts - embedded) / max(1, stopped.added))
    summary = {
        UNFINISHED: f"{embedded:,} of {texts:,} texts have a vector of encoder {fingerprint[:12]}",
        "published": "no version yet" if number is None else f"version {number}, as before",
        "next": f"the same command goes on; about {nights:,} more nights of --max-embed-hours "
        f"{night.config.max_embed_hours:g}",
        "disk": compared.disk(night.config.store),
        "store": night.config.store,
    }
    return JobResult(summary=summary)


def listed_as_before(
    config: NightConfig, base: Version, files: Sequence[CorpusFile], began_ns: int
) -> bool:
    """Whether files and options are those that a version was made from; no file is opened."""
    corpus = base.record.details.get(_CORPUS)
    if corpus is None or config.reread:
        return False
    source = source_of(config, base.record.fingerprint)
    listed = corpus_digest(config.embed_config(""), files, source, began_ns)
    return listed is not None and corpus["digest"] == listed


def prepare(
    config: NightConfig,
    store: Store | None,
    files: Sequence[CorpusFile],
    known: EncoderDescription | None = None,
) -> tuple[NightConfig, tuple[ActorPlan, EncoderDescription], Before, str]:
    """Options with what the store decides, the encoder, what the night starts from, its folder.

    Without a store it is a first night. ``known`` is the encoder where it is described already.
    """
    if store is not None:
        config = with_stored_encoder(config, store)
    if config.vector_column:
        published = None if store is None else store.published()
        encoder = vector_takers(), known or describe_vectors(config, files, published)
    else:
        encoder = prepare_encoder(config.embed_config(""), known)
    if store is None:
        return config, encoder, Before(None, [], [], same_encoder=False), ""
    fingerprint = encoder[1].fingerprint
    base, others = store.published(), []
    newest = [v for v in store.versions() if v.record.fingerprint == fingerprint]
    if config.vector_column:
        newest = []
    if newest and (base is None or newest[-1].number != base.number):
        others = newest[-1:]
    compared = [version.number for version in (base, *others) if version is not None]
    root = store.work_folder()
    source = source_of(config, fingerprint)
    folder = night_folder(root, config.embed_config(""), files, source, compared)
    folder = f"{folder}-reread" if config.reread else folder
    leftovers = []
    if not config.vector_column:
        leftovers = find_leftovers(root, folder, fingerprint, float16=config.float16)
    same_encoder = base is not None and base.record.fingerprint == fingerprint
    before = Before(base, others, leftovers, same_encoder, open_backfills(store))
    return config, encoder, before, folder


def with_stored_encoder(config: NightConfig, store: Store) -> NightConfig:
    """``config`` with the published version's dtype, and with no adapter as there, for ``auto``.

    Else a night on another kind of machine, or the first after the default adapter came, would be
    one with another encoder.
    """
    version = store.published()
    if config.vector_column or version is None or "encoder.json" not in version.record.artifacts:
        return config
    stored = version.read_json("encoder.json")
    if config.dtype == "auto":
        config = replace(config, dtype=stored["dtype"])
    if config.adapter == AUTO_ADAPTER and stored.get("adapter_revision", "") is None:
        if config.model == PACKAGED_MODEL:
            log.info(
                "the store's vectors are of the model without an adapter, and so are this night's; "
                "--adapter packaged embeds every document anew"
            )
        config = replace(config, adapter=None)
    return config


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
        changed=changed_share(night),
        when=night.when,
        fitted_at=fitted_at(night),
        next_id=next_cluster_id(night.store),
    )
    steps.begin(6)
    write_assignments(candidate, clusters)
    steps.begin(7)
    index = candidate.update_index(seed=config.seed, full_text=config.full_text)
    steps.begin(8)
    drift = find_drift(earlier, clusters)
    checks = run_checks(config, night_figures(night, changes, clusters, drift))
    night.record.counts["clusters"] = len(clusters.published.new.sizes)
    if clusters.novelty is not None:
        night.record.counts["novel"] = len(clusters.novelty.table)
    write_artifacts(night, candidate, changes, clusters, drift, checks, index.recall_at_10)
    steps.begin(9)
    version = seal(night, candidate, clusters, checks)
    refusals = list(version.record.reasons)
    if not refusals:
        steps.begin(10)
        night.store.publish(
            version.number, night.lease, expected=None if base is None else base.number
        )
    steps.begin(11)
    clean_up(night.store, version.record.fingerprint)
    steps.end()
    night.record.metrics.update(
        {
            "version": version.number,
            "published": not refusals,
            "step_seconds": steps.seconds,
            "recall_at_10": index.recall_at_10,
        }
    )
    due = describe_refit(config, version)
    summary = summarize(night, version, clusters, drift, checks, due)
    return JobResult(summary=summary, refusals=refusals)


def is_settled(
    config: NightConfig, edits: Sequence[Edit], base: Version, encoder: EncoderDescription
) -> bool:
    """Whether a version's encoder, clusters and edits are what this night's would be."""
    prompt = base.read_json("encoder.json").get("query_prompt")
    if encoder.fingerprint != base.record.fingerprint:
        return False
    if prompt != encoder.to_json().get("query_prompt"):
        return False
    if config.full_text and not has_text_index(base.documents):
        return False
    if config.name_model is not None and TITLES not in base.record.artifacts:
        return False
    newest = edits[-1].number if edits else 0
    if (config.warm and has_split_to_do(base)) or has_fit_to_do(config, base):
        return False
    return newest == known_edits(base) and same_clustering(config, base)


def next_counts(night: Night, unchanged: int) -> dict[str, Any]:
    """What the next night counts if it lists the same corpus, with that corpus's digest."""
    names = ("documents", "passages", "repeats", "rejected")
    counts = {name: night.record.counts[name] for name in names if name in night.record.counts}
    none = dict.fromkeys(("new", "changed", "deleted", "retouched"), 0)
    return {"digest": night.corpus, "counts": {**counts, **none, "unchanged": unchanged}}


def leave(
    config: NightConfig, store: Store, record: RunRecord, steps: Steps, base: Version
) -> JobResult:
    """The result of a night in which nothing had changed."""
    steps.begin(11)
    clean_up(store, base.record.fingerprint)
    steps.end()
    record.counts.update({"embedded": 0, "reused": 0, "written": 0, "tokens": 0})
    record.metrics.update(
        {"version": base.number, "published": True, "step_seconds": steps.seconds}
    )
    summary = {
        "nothing changed": f"version {base.number} stays published",
        "documents": f"{base.record.counts['documents']:,}",
        **in_passages(record.counts),
        "store": config.store,
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
    scores = earlier.version.read_json("scores.json")
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
        scores_before=None if base is None else base.read_json("scores.json"),
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
    record = night.record
    record.metrics["checks"] = [asdict(check) for check in checks]
    accepted = clusters.novelty if "novel" in night.config.accept else None
    groups = 0 if accepted is None else len(accepted.sizes)
    candidate.put("run.json", record.content("complete"))
    return candidate.seal(
        counts={**record.counts, **stored_counts(night.config, candidate)},
        scores=scores_of(clusters),
        reasons=reasons,
        details={
            _NEXT_ID: clusters.published.identity.next_id,
            "checks": [asdict(check) for check in checks],
            EDITS_KEY: night.edits[-1].number if night.edits else 0,
            ACCEPTED_GROUPS: accepted_groups(night.before.base) + groups,
            **fit_details(night, spread_of(scores_of(clusters), candidate.count())),
            "seconds": round(sum(night.steps.seconds.values()), 1),
            **(passage_details(night.config) if night.config.passages else {}),
            **({} if night.corpus is None else {_CORPUS: next_counts(night, candidate.count())}),
        },
    )
