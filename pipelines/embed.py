"""A corpus to embeddings, streamed by Ray Data, resumable at any moment, no row lost.

In: files of documents. Out: a folder with ``embeddings/*.parquet``, ``rejected/*.parquet``,
``encoder.json`` and ``run.json``. The steps, each of which leaves deterministic files under
``_work/`` and does only what is missing there:

plan      find the files, check their columns, cut them into shards
scan      read and check every row; sort texts and ids into partitions by their hashes
ids       find repeated ids, one partition of ids at a time
assemble  each distinct text once, by length, in chunks of equal work
embed     tokenizer tasks feed encoder actors, one file of vectors a chunk
parts     join documents with vectors into the files of the result
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from pipelines.actor_plan import ActorPlan, plan_actors
from pipelines.command_line import JobResult
from pipelines.corpus import Columns, CorpusFile, find_files, inspect_files
from pipelines.dedup import AssembleSettings, assemble_partition, chunk_names, find_repeated_ids
from pipelines.documents import rejected_table
from pipelines.encoder_description import (
    DType,
    EncoderConfig,
    EncoderDescription,
    describe_encoder,
)
from pipelines.errors import InputError
from pipelines.kept_columns import parquet_schema
from pipelines.model_sources import PACKAGED_MODEL
from pipelines.packaged import demo_corpus
from pipelines.pooling import Pooling
from pipelines.progress import Progress, duration, padding_waste
from pipelines.results import (
    ResultSettings,
    plan_parts,
    plan_rejected,
    remove_temporary_files,
    write_part,
    write_rejected,
)
from pipelines.run_record import RunRecord
from pipelines.scan import ScanSettings, scan_shard
from pipelines.segments import table_to_bytes
from pipelines.stages import Receipt, run_stage
from pipelines.storage import default_output, join, make_folder, remove_folder, write_bytes
from pipelines.tokenization import PromptedTokenizer
from pipelines.vectors import EncodeSettings, encode_chunks, find_done_chunks
from pipelines.work_plan import (
    WORK_FOLDER,
    ScanResult,
    WorkPlan,
    check_same_corpus,
    combine_receipts,
    count_partitions,
    listing_digest,
    listing_of,
)

# About half a minute of a 135 M model on two CPU cores, or of a 1 B model on one GPU: what a kill
# can cost an actor.
CPU_CHUNK_TOKENS = 1 << 15
GPU_CHUNK_TOKENS = 1 << 20
SHARD_BYTES = 32 << 20
MOST_SHARDS = 10_000
RESERVED_COLUMNS = ("text_sha256", "embedding")
DEMO_KEPT_COLUMNS = ("text", "label")
MAY_CHANGE = (
    "num_actors",
    "cpus_per_actor",
    "gpus_per_actor",
    "max_rejected_fraction",
    "skip_unreadable_files",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedConfig:
    """Embed a corpus."""

    corpus: str = ""
    """File, folder or glob of documents, local or remote; empty is the demo corpus."""
    output: str = field(default_factory=lambda: default_output("embed_corpus"))
    """Folder of the result, local or remote; an unfinished run in it is gone on with."""
    text_column: str = "text"
    """Column of the text."""
    id_column: str | None = None
    """Column of the id; by default `id` where a file has it, else the text's SHA-256 is the id."""
    keep_columns: tuple[str, ...] = ()
    """Columns to carry along, such as text or a label."""
    model: str = PACKAGED_MODEL
    """Base model: a packaged name, a folder, a GGUF file, a hub id or an s3:// folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    adapter: str | None = None
    """PEFT adapter to merge into the weights: a folder, local or remote, or a hub id."""
    prompt: str = "one-word"
    """Name of a prompt, or a template with {text}."""
    pooling: Pooling = "last"
    """How token states become one vector."""
    layer: int | tuple[int, ...] = -1
    """States after which layer: 0 the token embeddings, -1 the last layer; several are averaged."""
    max_tokens: int = 256
    """Tokens of the text itself that are read; the prompt comes on top."""
    normalize: bool = True
    """Scale vectors to length 1."""
    dtype: DType = "auto"
    """Precision of the forward pass; auto is bfloat16 where the hardware has it, else float32."""
    append_eos: bool = False
    """Put the end-of-sequence token after the prompt."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for models whose author you trust."""
    num_actors: str = ""
    """Encoder actors: N, or MIN:MAX; found from the Ray cluster by default."""
    cpus_per_actor: float | None = None
    """CPUs, and so threads, of one encoder actor."""
    gpus_per_actor: float | None = None
    """GPUs of one encoder actor; 1 by default where the Ray cluster has any."""
    max_rejected_fraction: float = 0.5
    """Fail where a larger share of the documents is rejected."""
    skip_unreadable_files: bool = False
    """Go on without files that cannot be read, and list them in rejected/."""
    target_file_mib: int = 128
    """About how large a file of the result should be, in MiB."""
    float16: bool = False
    """Store vectors in half precision."""
    chunk_tokens: int = 0
    """Tokens of a unit of work, which a kill can cost; 0 suits the hardware."""
    dry_run: bool = False
    """Print what would be done, and how long it would take; write nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_rejected_fraction <= 1:
            raise InputError(
                f"max_rejected_fraction is {self.max_rejected_fraction}; it must be from 0 to 1"
            )
        if self.target_file_mib < 1 or self.chunk_tokens < 0:
            raise InputError("target_file_mib must be at least 1, and chunk_tokens not negative")
        taken = {*RESERVED_COLUMNS, "id"} & set(self.keep_columns)
        if taken or len(set(self.keep_columns)) < len(self.keep_columns):
            raise InputError(
                f"keep_columns {list(self.keep_columns)}: each column once, and not id, "
                f"{' or '.join(RESERVED_COLUMNS)}, which the result has by itself"
            )

    @property
    def columns(self) -> Columns:
        """The columns to read."""
        keep = self.keep_columns
        if not self.corpus and not keep:
            keep = DEMO_KEPT_COLUMNS
        return Columns(self.text_column, self.id_column, keep)

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder as asked for."""
        names = EncoderConfig.__dataclass_fields__
        return EncoderConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class EmbedRun:
    """What is known before the first row is read."""

    config: EmbedConfig
    work: str
    files: Sequence[CorpusFile]
    description: EncoderDescription
    tokenizer: PromptedTokenizer
    actors: ActorPlan
    plan: WorkPlan


def embed_corpus(config: EmbedConfig, record: RunRecord) -> JobResult:
    """Embed a corpus into ``config.output``, going on with what an earlier run has left there.

    Raises :class:`InputError` for a corpus, an encoder or a Ray cluster that does not do, for
    files that cannot be read, and where too much was rejected.
    """
    started = time.monotonic()
    corpus = config.corpus or str(demo_corpus())
    files = find_files(corpus)
    if record.previous is not None and record.previous.get("status") == "complete":
        return confirm_complete(config, files, record.previous)
    run = prepare_run(config, files)
    scanned = scan_corpus(run)
    chunks, counts = assemble(run, scanned)
    embedded = embed_chunks(run, chunks, counts)
    result = write_result(run, scanned, chunks, counts)
    metrics = {**result.metrics, **embedded, "corpus_digest": listing_digest(scanned.listing)}
    record.counts.update(result.counts)
    record.metrics.update(metrics)
    record.complete()
    remove_folder(run.work)
    summary = summarize(config, result.counts, metrics, time.monotonic() - started)
    return JobResult(result.counts, metrics, summary)


def confirm_complete(
    config: EmbedConfig, files: Sequence[CorpusFile], previous: Mapping[str, Any]
) -> JobResult:
    """The result of a complete run, where the corpus is still the one it was made from."""
    counts, metrics = previous["counts"], previous["metrics"]
    if listing_digest(listing_of(files)) != metrics.get("corpus_digest"):
        raise InputError(
            f"{config.output} holds the embeddings of this corpus as it was at "
            f"{previous['started_at']}; it has changed since: choose another --output"
        )
    remove_folder(join(config.output, WORK_FOLDER))
    log.info("%s is complete and the corpus unchanged: nothing to do", config.output)
    return JobResult(counts, metrics, summarize(config, counts, metrics, 0.0))


def prepare_run(config: EmbedConfig, files: Sequence[CorpusFile]) -> EmbedRun:
    """Check corpus, encoder and Ray cluster, and settle the plan or take up an earlier one."""
    work = join(config.output, WORK_FOLDER)
    earlier = WorkPlan.load(work)
    actors = plan_actors(
        ray.cluster_resources(),
        len(ray.nodes()),
        num_actors=config.num_actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )
    size = sum(file.size_bytes for file in files)
    shard_bytes = earlier.shard_bytes if earlier else max(SHARD_BYTES, size // MOST_SHARDS)
    seen = inspect_files(files, config.columns, shard_bytes=shard_bytes)
    description = describe_encoder(config.encoder, device="cuda" if actors.gpus else "cpu")
    if earlier is not None and earlier.fingerprint != description.fingerprint:
        raise InputError(
            f"{config.output} was begun with another encoder: the files of the model or the "
            "adapter have changed since. Choose another --output, or delete that folder"
        )
    chunk_tokens = GPU_CHUNK_TOKENS if actors.gpus else CPU_CHUNK_TOKENS
    plan = earlier or WorkPlan(
        description.fingerprint,
        count_partitions(sum(file.text_bytes for file in seen)),
        config.chunk_tokens or chunk_tokens,
        shard_bytes,
    )
    tokenizer = PromptedTokenizer.load(description)
    return EmbedRun(config, work, seen, description, tokenizer, actors, plan)


def scan_corpus(run: EmbedRun) -> ScanResult:
    """Read every shard; what the corpus holds. Raises :class:`InputError` for unreadable files."""
    configure_ray_data()
    run.plan.save(run.work)
    earlier = ScanResult.load(run.work)
    if earlier is not None:
        check_same_corpus(earlier.listing, listing_of(run.files))
        return earlier
    make_folder(join(run.work, "rejected"))
    shards = {shard.name: shard for file in run.files for shard in file.shards()}
    units = {name: asdict(shard) for name, shard in shards.items()}
    function = functools.partial(scan_shard, scan_settings(run))
    scanned = combine_receipts(run.files, shards, run_stage(run.work, "scan", units, function))
    if scanned.problems and not run.config.skip_unreadable_files:
        path, problem = next(iter(scanned.problems.items()))
        more = f" ({len(scanned.problems)} files are like that)" if scanned.problems else ""
        raise InputError(
            f"{path}: {problem}{more}. The rest was read and is kept: mend or remove the file and "
            "run again, or pass --skip-unreadable-files"
        )
    if not scanned.documents:
        raise InputError(f"{run.config.corpus} holds no document")
    if scanned.problems:
        rows = [(None, f"unreadable file: {why}", path) for path, why in scanned.problems.items()]
        path = join(run.work, "rejected", "files.arrow")
        write_bytes(path, table_to_bytes(rejected_table(rows)))
    scanned.save(run.work)
    return scanned


def scan_settings(run: EmbedRun) -> ScanSettings:
    """What scan tasks are told."""
    return ScanSettings(
        work=run.work,
        columns=run.config.columns,
        kept_schema=parquet_schema(run.files, run.config.columns.keep),
        partitions=run.plan.partitions,
        clip_characters=run.tokenizer.clip_characters,
        max_tokens=run.config.max_tokens,
        prompt_tokens=run.tokenizer.prefix_tokens + run.tokenizer.suffix_tokens,
    )


def assemble(run: EmbedRun, scanned: ScanResult) -> tuple[dict[str, list[int]], Counter[str]]:
    """Distinct texts in chunks: (texts, documents, tokens, bytes) of each; and the counts so far.

    Raises :class:`InputError` where too much was rejected.
    """
    settings = AssembleSettings(
        scan_settings(run),
        tuple(scanned.flushes),
        scanned.kept_types(),
        scanned.chunk_tokens(run.plan),
    )
    for folder in ("texts", "documents"):
        make_folder(join(run.work, folder))
    units = {f"{number:05d}": number for number in range(run.plan.partitions)}
    run_stage(run.work, "ids", units, functools.partial(find_repeated_ids, settings))
    function = functools.partial(assemble_partition, settings)
    receipts = run_stage(run.work, "assemble", units, function)
    chunks = {
        name: chunk
        for partition, receipt in receipts.items()
        for name, chunk in zip(
            chunk_names(partition, receipt["chunks"]), receipt["chunks"], strict=True
        )
    }
    counts = Counter(
        documents=scanned.documents,
        distinct=sum(r["distinct"] for r in receipts.values()),
        duplicates=sum(r["duplicates"] for r in receipts.values()),
    )
    counts["rejected"] = counts["documents"] - counts["distinct"] - counts["duplicates"]
    reasons = Counter(scanned.reasons)
    reasons["duplicate id"] += sum(r["repeated_ids"] for r in receipts.values())
    reasons["unreadable file"] += len(scanned.problems)
    check_rejected(run.config, counts, reasons)
    return chunks, counts


def check_rejected(config: EmbedConfig, counts: Mapping[str, int], reasons: Counter[str]) -> None:
    """Raise :class:`InputError`, with the top reasons, where too much was rejected."""
    share = counts["rejected"] / counts["documents"]
    if share > config.max_rejected_fraction:
        top = ", ".join(
            f"{reason} ({count:,})" for reason, count in reasons.most_common(3) if count
        )
        raise InputError(
            f"{counts['rejected']:,} of {counts['documents']:,} documents were rejected, more than "
            f"--max-rejected-fraction {config.max_rejected_fraction:g} allows: {top}"
        )


def embed_chunks(
    run: EmbedRun, chunks: Mapping[str, Sequence[int]], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Encode every chunk that has no vectors yet; how fast that went."""
    started = time.monotonic()
    done = find_done_chunks(run.work)
    missing = {
        name: (name.split("-")[0], int(name.split("-")[1])) for name in chunks if name not in done
    }
    settings = EncodeSettings(
        run.work, json.dumps(run.description.to_json()), run.actors, run.config.float16
    )
    texts, tokens = (sum(chunks[name][i] for name in missing) for i in (0, 2))
    progress = Progress(texts, tokens, rejected=counts["rejected"])
    log.info("embed: %d of %d chunks to do, actors: %s", len(missing), len(chunks), run.actors)
    if missing:
        for chunk in encode_chunks(settings, missing):
            progress.add(chunk, chunks[chunk["name"]][2])
        log.info("%s", progress.line())
    seconds = time.monotonic() - started
    return {
        "embed_seconds": round(seconds, 3),
        "texts_per_second": round(progress.texts / seconds, 2),
        "tokens_per_second": round(progress.tokens / seconds, 1),
        "padding_waste": round(padding_waste(progress.tokens, progress.padded_tokens), 4),
    }


def write_result(
    run: EmbedRun,
    scanned: ScanResult,
    chunks: Mapping[str, Sequence[int]],
    counts: Mapping[str, int],
) -> JobResult:
    """Join documents with vectors into the files of the result; the final counts."""
    config, output = run.config, run.config.output
    schema = parquet_schema(run.files, config.columns.keep)
    kept = dict(zip(schema.names, schema.types, strict=True)) if schema else scanned.kept_types()
    settings = ResultSettings(
        work=run.work,
        output=output,
        fingerprint=run.description.fingerprint,
        id_type=scanned.id_type,
        kept_types={name: kept.get(name, pa.string()) for name in config.columns.keep},
        value_type=pa.float16() if config.float16 else pa.float32(),
        dimension=run.description.dimension,
    )
    for folder in ("embeddings", "rejected"):
        make_folder(join(output, folder))
    row_bytes = settings.dimension * np.dtype(settings.value_type.to_pandas_dtype()).itemsize
    parts = plan_parts(chunks, row_bytes, config.target_file_mib << 20)
    receipts = run_stage(run.work, "parts", parts, functools.partial(write_part, settings))
    function = functools.partial(write_rejected, run.work, output)
    rejected = run_stage(run.work, "rejects", plan_rejected(run.work), function)
    for folder in ("embeddings", "rejected"):
        remove_temporary_files(join(output, folder))
    run.description.save(output)
    return final_counts(config, counts, receipts, rejected)


def final_counts(
    config: EmbedConfig,
    counts: Mapping[str, int],
    parts: Mapping[str, Receipt],
    rejected: Mapping[str, Receipt],
) -> JobResult:
    """Counts that add up: documents = embedded + rejected + duplicates."""
    total = {
        key: sum(receipt[key] for receipt in parts.values())
        for key in ("rows", "rejected", "failed_texts", "tokens")
    }
    embedded = counts["distinct"] - total["failed_texts"]
    found = {
        "documents": counts["documents"],
        "embedded": embedded,
        "rejected": sum(receipt["rows"] for receipt in rejected.values()),
        "duplicates": counts["duplicates"] + total["failed_texts"] - total["rejected"],
        "tokens": total["tokens"],
    }
    if found["documents"] != embedded + found["rejected"] + found["duplicates"]:
        raise RuntimeError(f"the counts do not add up, so rows were lost or doubled: {found}")
    reasons = Counter({"its vector is not finite": total["rejected"]})
    check_rejected(config, found, reasons)
    return JobResult(found, {"rows": total["rows"], "files": len(parts)})


def summarize(
    config: EmbedConfig, counts: Mapping[str, int], metrics: Mapping[str, Any], seconds: float
) -> dict[str, str]:
    """The table that a person sees at the end."""
    return {
        **{name: f"{counts[name]:,}" for name in counts},
        "tokens a second": f"{metrics['tokens_per_second']:,.0f}",
        "padding": f"{metrics['padding_waste']:.1%}",
        "took": duration(seconds),
        "output": config.output,
    }


def configure_ray_data() -> None:
    """Leave the progress display to :mod:`pipelines.progress`."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
