"""What a night would read and do, told before anything is written to the store.

The corpus is read and compared as in a night, on this machine's temporary folder; nothing is
embedded but a sample, to measure how quick the actors are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence

from pipelines.corpus.detected import describe_corpus
from pipelines.corpus.files import CorpusListing
from pipelines.embedding.estimate import estimate_run
from pipelines.embedding.progress import duration
from pipelines.encoder.description import EncoderDescription
from pipelines.nightly.changes import Before, ComparedCorpus, find_changes, in_passages
from pipelines.nightly.checks import early_checks
from pipelines.nightly.config import NightConfig
from pipelines.runtime.command import JobResult
from pipelines.runtime.machines import ActorPlan
from pipelines.store.edits import Edit, known_edits

_KINDS = ("new", "changed", "deleted", "unchanged", "retouched", "rejected")


def forecast(
    config: NightConfig,
    encoder: tuple[ActorPlan, EncoderDescription],
    before: Before,
    listing: CorpusListing,
    edits: Sequence[Edit],
) -> JobResult:
    """What was detected, what changed, what embedding it would take, what checks say by now.

    ``edits`` are people's, undone ones among them. Raises :class:`InputError` where the night
    itself would, for a corpus that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-dry-run-") as folder:
        compared = find_changes(config, folder, listing.files, encoder, before)
        run = compared.run
        seen = describe_corpus(run.files, run.config.columns, listing.passed_over)
        summary = seen | _summary(config, compared, before, edits)
    return JobResult(counts=dict(compared.counts), summary=summary)


def _summary(
    config: NightConfig, compared: ComparedCorpus, before: Before, edits: Sequence[Edit]
) -> dict[str, str]:
    """The table that a person sees."""
    texts, known = compared.settled.distinct, compared.settled.known
    base = before.base
    rows = {
        "version before": "none" if base is None else f"{base.number}, published",
        **in_passages(compared.counts),
        "changes": ", ".join(f"{compared.counts[k]:,} {k}" for k in _KINDS if compared.counts[k]),
        "texts to embed": f"{texts:,}, and {known:,} known ones to reuse",
    }
    fresh = [] if base is None else [e for e in edits if e.number > known_edits(base)]
    if fresh:
        rows["edits"] = f"{len(fresh):,} by people since then, which the night applies"
    if config.vector_column:
        rows["vectors to take"] = f"{texts:,}"
    elif texts:
        run = compared.run
        cut = run.scan.cut
        estimate = estimate_run(run.files, run.config.columns, run.description, run.actors, cut)
        tokens = round(estimate.tokens * texts / max(1, estimate.texts))
        speed = estimate.tokens_per_second
        loading = estimate.seconds - estimate.tokens / (speed * run.actors.largest)
        rows["tokens"] = f"about {tokens:,}, prompts included"
        rows["actors"] = f"{run.actors}, {speed:,.0f} tokens a second each, measured on a sample"
        seconds = tokens / (speed * run.actors.largest)
        rows["embedding"] = f"about {duration(loading + seconds)}"
        if config.max_embed_hours:
            nights = math.ceil(seconds / (3600 * config.max_embed_hours))
            rows["embedding"] += f", in {max(1, nights):,} nights"
    if compared.rewrite:
        rows["disk"] = compared.disk(config.store)
    documents = 0 if base is None else base.count()
    other = base is not None and not before.same_encoder
    encoder_before = base.record.fingerprint if base is not None and other else None
    failed = [
        check
        for check in early_checks(config, compared.counts, documents, encoder_before)
        if not check.passed
    ]
    for number, check in enumerate(failed, 1):
        rows[f"check {number}"] = check.says + (" (accepted)" if check.accepted else "")
    refusing = sum(check.refuses for check in failed)
    rows["checks"] = (
        f"{refusing} of those that are known by now would refuse; score, drift, imbalance and "
        "novel are known after clustering"
    )
    return rows | {"dry run": f"nothing was written to {config.store}"}
