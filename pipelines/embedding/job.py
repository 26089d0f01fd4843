"""A corpus to embeddings, streamed by Ray Data, resumable at any moment, no row lost.

In: files of documents. Out: a folder with ``embeddings/*.parquet``, ``rejected/*.parquet``,
``encoder.json`` and ``run.json``. The steps, each of which leaves deterministic files under
``_work/`` and does only what is missing there:

plan      find the files, check their columns, cut them into shards
keys      read and check every row; digests of its id and text, in partitions by their hashes
ids       find repeated ids, one partition of ids at a time
settled   which document owns a text and which repeat it, one partition of texts at a time
read      the rows again, without those that repeat, cut into chunks and tokenized: tasks ...
vectors   ... that feed encoder actors, which write a file a chunk
lent      repeats, with the vectors of those they repeat
parts     files of the result, of even size
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from pipelines.corpus.detected import describe_corpus
from pipelines.corpus.documents import EXCERPT_CHARACTERS
from pipelines.corpus.files import (
    CorpusFile,
    find_corpus,
    listing_digest,
    listing_of,
)
from pipelines.corpus.given_vectors import GivenVectors
from pipelines.corpus.kept_columns import parquet_schema
from pipelines.corpus.passages import passage_types
from pipelines.corpus.readers import inspect_files
from pipelines.embedding.chunks import Groups, ReadSettings, plan_groups
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.encode import (
    ChunkEncoder,
    EncoderCuts,
    EncodeSettings,
    Workers,
    embed_chunks,
    read_adapter_effect,
    tokenize_chunk,
)
from pipelines.embedding.keys import (
    ENCODE,
    ScanSettings,
    Settled,
    SettleSettings,
    scan_corpus,
    settle_corpus,
)
from pipelines.embedding.plan import (
    WORK_FOLDER,
    ScanResult,
    WorkPlan,
    count_partitions,
    short_digest,
)
from pipelines.embedding.progress import duration
from pipelines.embedding.write import ResultSettings, write_result
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderDescription, require_as_trained
from pipelines.encoder.sources import fetch_model
from pipelines.encoder.tokenization import text_limits
from pipelines.runtime.arrow import plain_type
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    exists,
    join,
    list_files,
    remove_files,
    remove_folder,
)
from pipelines.runtime.machines import ActorPlan, find_nodes, plan_actors
from pipelines.runtime.packaged import demo_corpus
from pipelines.runtime.run_record import RunRecord, require_unchanged
from pipelines.runtime.units import configure_ray_data

log = logging.getLogger(__name__)


# About half a minute of a 135 M model on two CPU cores, or of a 1 B model on one GPU: what a kill
# can cost an actor.
CPU_CHUNK_TOKENS = 1 << 15
GPU_CHUNK_TOKENS = 1 << 20
SHARD_BYTES = 32 << 20
MOST_SHARDS = 10_000
WORKERS = Workers(tokenize_chunk, ChunkEncoder)


@dataclass(frozen=True)
class EmbedRun:
    """What is known before the first row is read."""

    config: EmbedConfig
    work: str
    files: Sequence[CorpusFile]
    description: EncoderDescription
    actors: ActorPlan
    plan: WorkPlan
    scan: ScanSettings


def embed_corpus(
    config: EmbedConfig, record: RunRecord, connect: Callable[[], None] = lambda: None
) -> JobResult:
    """Embed a corpus into ``config.output``, going on with what an earlier run has left there.

    ``connect`` joins or starts a Ray cluster; it is called once corpus and model are there.
    Raises :class:`InputError` for a corpus, an encoder or a Ray cluster that does not do, for
    files that cannot be read, and where too much was rejected.
    """
    started = time.monotonic()
    listing = find_corpus(config.corpus or str(demo_corpus()), config.reading)
    files = listing.files
    if record.previous is not None and record.previous.get("status") == "complete":
        return confirm_complete(config, files, record.previous)
    fetch_model(config.model, config.revision)
    connect()
    run = settle_run(config, files, *prepare_encoder(config))
    if config.dry_run:
        seen = describe_corpus(run.files, config.columns, listing.passed_over)
        return JobResult(summary=seen | forecast(run))
    run.plan.save(run.work)
    scanned = scan_corpus(run.scan, run.files, skip_unreadable=config.skip_unreadable_files)
    settled = settle_corpus(settle_settings(run, scanned))
    rejected = check_rejected(config, scanned, settled)
    results = result_settings(run, scanned)
    groups = plan_groups(run.files, scanned, settled, run.plan.shard_bytes)
    tokens = expected_tokens(scanned, settled)
    chunks, speed = embed_chunks(
        encode_settings(run, results),
        read_settings(run, scanned, results, groups, tokens),
        WORKERS,
        groups,
        texts=settled.distinct,
        tokens=tokens,
        rejected=rejected,
    )
    written = write_result(results, groups, chunks, rejected_files(run, scanned))
    counts = final_counts(scanned, settled, written)
    check_encoded(config, counts, written["failed_rows"])
    effect = read_adapter_effect(run.work)
    replace(run.description, adapter_effect=effect).save(config.output)
    metrics = {
        "rows": written["rows"],
        "files": written["files"],
        "files_passed_over": len(listing.passed_over),
        **speed,
        "corpus_digest": listing_digest(scanned.listing),
        "encoder_fingerprint": run.description.fingerprint,
    }
    record.complete(counts, metrics)
    remove_folder(run.work)
    return JobResult(summary=summarize(config, record, effect, time.monotonic() - started))


def forecast(run: EmbedRun) -> dict[str, str]:
    """How long a run would take, for people."""
    from pipelines.embedding.estimate import estimate_run, estimate_table  # torch

    columns, cut = run.config.columns, run.scan.cut
    estimate = estimate_run(run.files, columns, run.description, run.actors, cut)
    return estimate_table(estimate, run.actors, run.config.output)


def confirm_complete(
    config: EmbedConfig, files: Sequence[CorpusFile], previous: Mapping[str, Any]
) -> JobResult:
    """The result of a complete run, where the corpus is still the one it was made from."""
    digest = listing_digest(listing_of(files))
    require_unchanged(config.output, previous, "corpus_digest", digest)
    remove_folder(join(config.output, WORK_FOLDER))
    return JobResult(summary={"nothing to do": f"{config.output} is complete, corpus unchanged"})


def describe_beforehand(config: EmbedConfig) -> EncoderDescription | None:
    """The encoder as machines without a GPU run it; None where something speaks against it.

    Asks no Ray cluster. What is wrong will be told by :func:`prepare_encoder`.
    """
    try:
        description = describe_encoder(config.encoder, device="cpu")
        require_as_trained(description, description.adapter)
    except InputError:
        return None
    return description


def prepare_encoder(
    config: EmbedConfig, known: EncoderDescription | None = None
) -> tuple[ActorPlan, EncoderDescription]:
    """Check encoder and Ray cluster; the encoder is that of the actors' kind of machine.

    ``known`` is what :func:`describe_beforehand` found.
    """
    configure_ray_data()
    nodes = find_nodes()
    actors = plan_actors(
        nodes.resources(),
        nodes.count,
        num_actors=config.num_actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )
    if known is not None and not (actors.gpus and config.dtype in ("auto", "int8")):
        return actors, known
    description = describe_encoder(config.encoder, device="cuda" if actors.gpus else "cpu")
    require_as_trained(description, description.adapter)
    return actors, description


def settle_run(
    config: EmbedConfig,
    files: Sequence[CorpusFile],
    actors: ActorPlan,
    description: EncoderDescription,
    vectors: GivenVectors | None = None,
) -> EmbedRun:
    """Check the corpus, and settle the plan or take up an earlier one.

    With ``vectors`` the corpus brings them along, in a column that is read beside the kept ones.
    """
    work = join(config.output, WORK_FOLDER)
    earlier = WorkPlan.load(work)
    if earlier is None and exists(join(work, "plan.json")):
        start_anew(config.output)
    shard_bytes = earlier.shard_bytes if earlier else shard_size(files)
    columns = config.columns
    if vectors is not None:
        columns = replace(columns, keep=(*columns.keep, vectors.column))
    seen = inspect_files(files, columns, shard_bytes=shard_bytes, options=config.reading)
    if earlier is not None and earlier.fingerprint != description.fingerprint:
        raise InputError(
            f"{config.output} was begun with another encoder: the files of the model or the "
            "adapter have changed since. Choose another --output, or delete that folder"
        )
    chunk_tokens = config.chunk_tokens or (GPU_CHUNK_TOKENS if actors.gpus else CPU_CHUNK_TOKENS)
    plan = earlier or WorkPlan(
        description.fingerprint,
        count_partitions(seen),
        chunk_tokens,
        shard_bytes,
        config.float16,
        config.chunk_tokens or chunk_tokens // 8,
    )
    clip, max_tokens, prompt_tokens = EXCERPT_CHARACTERS, 1, 0  # where nothing is encoded
    cuts = None
    if vectors is None:
        clip, prompt_tokens = text_limits(description)
        max_tokens = description.max_tokens
        cuts = config.cuts(max_tokens)
    scan = ScanSettings(
        work=work,
        columns=columns,
        kept_schema=parquet_schema(seen, config.columns.keep, config.text_column),
        partitions=plan.partitions,
        clip_characters=clip,
        max_tokens=max_tokens,
        prompt_tokens=prompt_tokens,
        vectors=vectors,
        has_ids=cuts is not None
        or any(config.columns.id_of(f) is not None for f in seen if not f.problem),
        cut=None if cuts is None else EncoderCuts(cuts, json.dumps(description.to_json())),
    )
    scan = replace(scan, keys=(join(work, short_digest(reading_of(scan, seen))), "keys"))
    return EmbedRun(config, work, seen, description, actors, plan, scan)


def reading_of(scan: ScanSettings, files: Sequence[CorpusFile]) -> list[Any]:
    """All that decides the keys of a shard beside the state of its file, as JSON has it.

    Types of kept columns and dialects come of all ``files``: one that is mended or removed can
    change how the others are read.
    """
    ways = {repr((f.format, f.dialect, f.encoding, f.newline)) for f in files if not f.problem}
    return [
        asdict(scan.columns),
        str(scan.kept_schema),
        [scan.partitions, scan.clip_characters, scan.max_tokens, scan.prompt_tokens, scan.has_ids],
        sorted(ways),
        *([] if scan.vectors is None else [asdict(scan.vectors)]),
        *([] if scan.cut is None else [repr(scan.cut)]),
    ]


def shard_size(files: Sequence[CorpusFile]) -> int:
    """Bytes of a shard; doubled for large corpora, so that few nights cut a file anew."""
    size = SHARD_BYTES
    while sum(file.size_bytes for file in files) > size * MOST_SHARDS:
        size *= 2
    return size


def start_anew(output: str) -> None:
    """Remove the unfinished work of a release that laid it out in another way."""
    log.warning(
        "%s holds unfinished work of another release, which this one cannot go on with: it is "
        "removed, and everything is read and embedded anew",
        output,
    )
    for folder in ("embeddings", "rejected"):
        names = list_files(join(output, folder))
        mine = [name for name in names if name.startswith("part-") and name.endswith(".parquet")]
        remove_files([join(output, folder, name) for name in mine])
    remove_folder(join(output, WORK_FOLDER))


def settle_settings(run: EmbedRun, scanned: ScanResult) -> SettleSettings:
    """What the tasks that look for repeats are told."""
    flushes = tuple((shard, name) for shard, name in scanned.flushes)
    return SettleSettings(run.scan, flushes, len(scanned.shards))


def read_settings(
    run: EmbedRun,
    scanned: ScanResult,
    results: ResultSettings,
    groups: Groups,
    tokens: int,
    *,
    usual: int = ENCODE,
) -> ReadSettings:
    """What the tasks of the second read are told; ``usual`` as in :class:`ReadSettings`.

    ``tokens`` are those of the texts that are to be encoded, about.
    """
    given = {} if run.scan.vectors is None else {run.scan.vectors.column: run.scan.vectors.type}
    return ReadSettings(
        run.scan,
        usual,
        run.plan.size_of_chunks(tokens),
        {name: results.kept_types[name] for name in scanned.kept_kinds},
        {**results.kept_types, **given},
        groups.buckets,
        results.row_bytes,
    )


def rejected_files(run: EmbedRun, scanned: ScanResult) -> list[str]:
    """Files of the rows that the first read rejected."""
    place = run.scan.keys_place()
    return [join(*place, f"{flush}.rejected") for _, flush in scanned.flushes]


def encode_settings(run: EmbedRun, results: ResultSettings) -> EncodeSettings:
    """What the encoder actors are told."""
    description = json.dumps(run.description.to_json())
    vectors = run.scan.vectors
    return EncodeSettings(results, description, run.actors, run.config.compile_model, vectors)


def expected_tokens(scanned: ScanResult, settled: Settled) -> int:
    """About how many tokens the texts hold that are to be encoded."""
    return scanned.tokens * settled.distinct // max(1, scanned.accepted)


def found_types(run: EmbedRun, scanned: ScanResult) -> dict[str, pa.DataType]:
    """Types of the kept columns as the corpus has them; null where it has nothing but nulls."""
    schema = run.scan.kept_schema
    kept = scanned.kept_types() if schema is None else {f.name: f.type for f in schema}
    return {name: kept.get(name, pa.null()) for name in run.config.columns.keep}


def result_settings(run: EmbedRun, scanned: ScanResult) -> ResultSettings:
    """What the last stage is told."""
    config = run.config
    own = {} if run.scan.cut is None else passage_types(scanned.id_type)
    kept = {name: plain_type(kind) for name, kind in found_types(run, scanned).items()}
    return ResultSettings(
        work=run.work,
        output=config.output,
        fingerprint=run.description.fingerprint,
        id_type=pa.string() if own else scanned.id_type,
        kept_types=own | kept,
        value_type=pa.float16() if config.float16 else pa.float32(),
        dimension=run.description.dimension,
        target_bytes=config.target_file_mib << 20,
    )


def check_rejected(config: EmbedConfig, scanned: ScanResult, settled: Settled) -> int:
    """Number of rejected documents; an :class:`InputError`, with the top reasons, if too many."""
    documents = scanned.documents
    rejected = documents - scanned.accepted_documents + settled.repeated_ids
    if rejected > config.max_rejected_fraction * documents:
        reasons = Counter(scanned.reasons)
        reasons["duplicate id"] += settled.repeated_ids
        reasons["unreadable file"] += len(scanned.problems)
        top = ", ".join(f"{why} ({count:,})" for why, count in reasons.most_common(3) if count)
        raise InputError(
            f"{rejected:,} of {documents:,} documents were rejected, more than "
            f"--max-rejected-fraction {config.max_rejected_fraction:g} allows: {top}"
        )
    return rejected


def final_counts(
    scanned: ScanResult, settled: Settled, written: Mapping[str, int]
) -> dict[str, int]:
    """Counts that add up: documents, or documents that were not rejected's passages, as vectors.

    ``documents = embedded + rejected + duplicates`` where they are whole. Where they were cut,
    ``passages = embedded + duplicates +`` those that were rejected as their vector is not finite.
    """
    failed, rejected = written["failed_rows"], written["rejected"]
    counts = {
        "documents": scanned.documents,
        "embedded": settled.distinct - written["failed_texts"],
        "rejected": rejected,
        # of a failed text every document is rejected, and none of them is a duplicate any more
        "duplicates": settled.duplicates + written["failed_texts"] - failed,
        "tokens": written["tokens"],
    }
    rows = scanned.accepted - settled.lost
    if scanned.cut is not None:
        counts = {"documents": counts["documents"], "passages": rows, **counts}
    left = scanned.documents - scanned.accepted_documents + settled.repeated_ids
    if rows != counts["embedded"] + counts["duplicates"] + failed or rejected != left + failed:
        raise RuntimeError(f"the counts do not add up, so rows were lost or doubled: {counts}")
    return counts


def check_encoded(config: EmbedConfig, counts: Mapping[str, int], failed: int) -> None:
    """Raise :class:`InputError` where too few documents got a vector, whenever they lost it.

    ``failed`` rows, documents or passages, were encoded in vain.
    """
    documents, rejected = counts["documents"], counts["rejected"]
    rows, share = counts.get("passages"), config.max_rejected_fraction
    too_many = rejected > share * documents
    if rows is not None:
        too_many = rejected - failed > share * documents or failed > share * rows
    if not counts["embedded"] or too_many:
        raise InputError(
            f"{rejected:,} of {documents:,} documents got no vector, and {counts['embedded']:,} "
            f"texts got one; --max-rejected-fraction is {config.max_rejected_fraction:g}. Why, is "
            f"in {join(config.output, 'rejected')}"
            + ("; vectors may not fit --float16" if config.float16 else "")
        )


def summarize(
    config: EmbedConfig, record: RunRecord, effect: Mapping[str, float] | None, seconds: float
) -> dict[str, str]:
    """The table that a person sees at the end; ``effect`` is what the adapter changed."""
    adapter = {}
    if effect is not None:
        adapter["adapter"] = (
            f"changed {effect['changed_layers']:.0%} of its layers; cosine of vectors with and "
            f"without it {effect['cosine']:.3f}"
        )
    return {
        **{name: f"{count:,}" for name, count in record.counts.items()},
        "tokens a second": f"{record.metrics['tokens_per_second']:,.0f}",
        "padding": f"{record.metrics['padding_waste']:.1%}",
        "took": duration(seconds),
        "output": config.output,
        **adapter,
    }
