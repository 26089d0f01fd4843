"""Pairs to a LoRA adapter that makes a decoder-only LLM a better encoder of such texts.

In: pairs, or a corpus to crop them from. Out: a PEFT adapter with ``encoder.json``,
``history.parquet``, ``history.svg``, a model card and ``run.json``. The steps:

batches  which pairs are trained on in which step, and which are held out, settled in files
train    workers of Ray Train, one checkpoint a measure; the best adapter by a held-out measure
result   the best adapter with all that says how it was made
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from pipelines.corpus.files import find_files, listing_digest, listing_of
from pipelines.encoder import sentence_transformers
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import (
    AUTO_ADAPTER,
    DType,
    EncoderConfig,
    EncoderDescription,
    require_as_trained,
)
from pipelines.encoder.precision import resolve_device
from pipelines.encoder.sources import PACKAGED_ADAPTER, fetch_adapter
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    exists,
    join,
    make_folder,
    read_bytes,
    remove_folder,
    write_bytes,
)
from pipelines.runtime.run_record import RunRecord, require_complete, require_unchanged
from pipelines.training.adapter import SETTINGS, require_plain, require_quantization
from pipelines.training.batches import (
    MOST_HELDOUT,
    BatchPlan,
    choose_heldout,
    write_batches,
)
from pipelines.training.config import FinetuneConfig
from pipelines.training.loop import LoopSettings, TrainingState, read_state
from pipelines.training.on_ray import (
    TrainingTask,
    WorkerPlan,
    plan_workers,
    train_in_process,
    train_on_workers,
)
from pipelines.training.pair_files import list_pair_files, read_pairs
from pipelines.training.pairs import find_corpus, make_pairs, training_corpus
from pipelines.training.result import measure_run, summarize, write_result

log = logging.getLogger(__name__)


WORK_FOLDER = "_work"
_COUNTS = "counts.json"
_INPUTS = {
    "pairs_digest": "pairs or corpus",
    "model_revision": "base model",
    "start_revision": "first adapter",
    "teacher_revision": "teacher",
}


def finetune_adapter(config: FinetuneConfig, record: RunRecord) -> JobResult:
    """Tune an adapter into ``config.output``, going on with what an earlier run has left there.

    Raises :class:`InputError` for pairs, an encoder or a Ray cluster that does not do, for an
    adapter to go on from that is of another base model or prompt, and for a loss that diverges.
    """
    started = time.monotonic()
    work = join(config.output, WORK_FOLDER)
    plan = None
    if config.workers != (0, 0):
        plan = plan_workers(
            config.workers, config.cpus_per_worker, config.gpus_per_worker, config.max_failures
        )
    device = "auto" if plan is None else "cuda" if plan.gpus else "cpu"
    require_quantization(config.quantize, resolve_device(device).type)
    description, start = describe_base(config, device=device)
    check_settings(config, description, start)
    teacher = None
    if config.teacher is not None:
        kind = resolve_device(device).type
        teacher = describe_teacher(
            config.teacher, description.dtype, kind, trust=config.trust_remote_code
        )
    digests = digest_inputs(config, description, start, teacher)
    previous = record.previous or {}
    if previous.get("status") == "complete":
        require_same_inputs(config.output, previous, digests)
        counts, metrics = previous["counts"], previous["metrics"]
        return JobResult(counts, metrics, summarize(config, counts, metrics))
    counts, made_by = prepare_batches(config, work, previous, digests)
    state = train_adapter(config, description, start, teacher, plan, work)
    metrics = measure_run(state, time.monotonic() - started) | digests
    metrics["start_adapter"] = start
    if teacher is not None:
        metrics["teacher_fingerprint"] = teacher.fingerprint
    if made_by:
        metrics["made_by"] = made_by
    write_result(config, description, state, counts, metrics)
    record.complete(counts, metrics)
    remove_folder(work)
    return JobResult(counts, metrics, summarize(config, counts, metrics))


def digest_inputs(
    config: FinetuneConfig,
    description: EncoderDescription,
    start: str | None,
    teacher: EncoderDescription | None,
) -> dict[str, str | None]:
    """What tells the state of all that training reads, by the metrics' names in ``run.json``.

    Of encoders their files and not their precision, which is this machine's where it is ``auto``.
    """
    if config.pairs:
        listing = list_pair_files(config.pairs)
    else:
        corpus = config.corpus or str(training_corpus())
        listing = listing_of(find_files(corpus, config.reading))
    return {
        "pairs_digest": listing_digest(listing),
        "model_revision": description.model_revision,
        "start_revision": None if start is None else fetch_adapter(start).revision,
        "teacher_revision": None
        if teacher is None
        else f"{teacher.model_revision} {teacher.adapter_revision}",
    }


def require_same_inputs(
    folder: str, previous: Mapping[str, Any], digests: Mapping[str, str | None]
) -> None:
    """Raise :class:`InputError` unless an earlier run read what is there now."""
    for name, digest in digests.items():
        require_unchanged(folder, previous, name, digest, what=_INPUTS[name])


def describe_base(config: FinetuneConfig, *, device: str) -> tuple[EncoderDescription, str | None]:
    """The encoder to tune, without an adapter, and the adapter to go on from, None for a new one.

    What the flags leave open is as in the adapter.
    """
    encoder = config.encoder
    all_layers = config.lora_targets == ("all-linear",)
    if encoder.adapter == AUTO_ADAPTER and (
        not all_layers or unlike_shape(config, PACKAGED_ADAPTER)
    ):
        encoder = replace(encoder, adapter=None)
    described = describe_encoder(encoder, device=device)
    return replace(described, adapter=None, adapter_revision=None), described.adapter


def describe_teacher(
    name: str, dtype: str, device: str, *, trust: bool = False
) -> EncoderDescription:
    """The encoder of a teacher: a model's, in the given precision, or a folder's own.

    Raises :class:`InputError` for a name that is no encoder here, and for vectors made elsewhere.
    """
    if not exists(join(name, "encoder.json")):
        encoder = EncoderConfig(model=name, dtype=cast(DType, dtype), trust_remote_code=trust)
        return describe_encoder(encoder, device=device)
    description = EncoderDescription.load(name)
    if description.is_elsewhere:
        raise InputError(
            f"--teacher {name} describes vectors of {description.model!r} that were made "
            "elsewhere, and a teacher must embed the texts of training: give a model, or a folder "
            "whose encoder.json is of one"
        )
    return description


def train_adapter(
    config: FinetuneConfig,
    description: EncoderDescription,
    start: str | None,
    teacher: EncoderDescription | None,
    plan: WorkerPlan | None,
    work: str,
) -> TrainingState:
    """Train on the batches in ``work``, in this process where there is no plan of workers.

    ``start`` is the adapter to go on from.
    """
    task = TrainingTask(
        config.trainer,
        LoopSettings(
            work, config.max_steps, config.batch_pairs, config.measure_every, config.patience
        ),
        description.to_json(),
        start,
        None if teacher is None else teacher.to_json(),
        work,
    )
    if plan is None:
        state_folder = Path(work).expanduser().absolute() / "state"
        train_in_process(task, state_folder)
        return read_state(state_folder)
    with tempfile.TemporaryDirectory() as folder:
        train_on_workers(task, plan, Path(folder))
        return read_state(Path(folder))


def check_settings(
    config: FinetuneConfig, description: EncoderDescription, start: str | None
) -> None:
    """Refuse settings that do not go together with the encoder, and an adapter of another one."""
    too_long = [d for d in config.dimensions if d >= description.dimension]
    if too_long:
        raise InputError(
            f"dimensions has {too_long[0]}, but vectors have {description.dimension}: give "
            "shorter lengths only; the full one is always trained"
        )
    if description.projections:
        raise InputError(
            f"{config.model} projects its vectors by Dense layers, which are not tuned: take a "
            "model without, or give --pooling to leave them out"
        )
    if config.sentence_transformers:
        check_export(config, description)
    if config.workers == (0, 0) and "://" in config.output:
        raise InputError("--num-workers 0 trains in this process and writes to local folders only")
    if start is not None:
        check_start_adapter(config, description, start)


def check_export(config: FinetuneConfig, description: EncoderDescription) -> None:
    """Refuse now, not after hours of training, an encoder that cannot be exported."""
    if "://" in config.output:
        raise InputError("--sentence-transformers writes to local folders only; leave it out here")
    sentence_transformers.check_export(description)


def check_start_adapter(
    config: FinetuneConfig, description: EncoderDescription, start: str
) -> None:
    """Refuse to go on from an adapter of another base model, prompt, pooling, layer or shape.

    One that acts otherwise than a fresh one of its shape is refused too.
    """
    require_plain(read_lora(start), start)
    option, theirs = unlike_shape(config, start) or ("", None)
    if option:
        raise InputError(
            f"adapter {start} has {option} {theirs}, here it is {getattr(config, option)}: pass "
            f"--{option.replace('_', '-')} {theirs}"
        )
    require_as_trained(description, start)


def unlike_shape(config: FinetuneConfig, adapter: str) -> tuple[str, Any] | None:
    """The option by which this run's adapter cannot have the weights of another, and its value."""
    lora = read_lora(adapter)
    for option, key in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
        if lora.get(key) != getattr(config, option):
            return option, lora.get(key)
    return None


def read_lora(adapter: str) -> dict[str, Any]:
    """The LoRA settings of an adapter."""
    return json.loads(read_bytes(join(str(fetch_adapter(adapter).folder), SETTINGS)))


def prepare_batches(
    config: FinetuneConfig,
    work: str,
    previous: Mapping[str, Any],
    digests: Mapping[str, str | None],
) -> tuple[dict[str, int], dict[str, int]]:
    """Settle all batches in files below ``work``, unless an earlier try has.

    The counts, and for a corpus how many pairs were made by which method. Raises
    :class:`InputError` where an earlier try, of the run ``previous``, read something else.
    """
    settled = join(work, _COUNTS)
    if exists(settled):
        counts, made_by, *read = json.loads(read_bytes(settled))
        require_same_inputs(config.output, {**previous, "metrics": dict(*read)}, digests)
        return counts, made_by
    make_folder(work)
    most = config.max_steps * config.batch_pairs + (config.heldout_pairs or MOST_HELDOUT)
    pairs, made_by = find_pairs(config, work, most)
    if config.lora_dropout == 0 and pairs["anchor"].equals(pairs["positive"]):
        raise InputError(
            "every pair is a text and itself, which only dropout can tell apart: pass "
            "--lora-dropout 0.1, or make pairs by another method"
        )
    heldout = config.heldout_pairs or choose_heldout(len(pairs), most)
    plan = BatchPlan(config.max_steps, config.batch_pairs, heldout, config.seed)
    counts = write_batches(pairs, plan, work)
    write_bytes(settled, json.dumps([counts, made_by, digests]).encode())
    return counts, made_by


def find_pairs(config: FinetuneConfig, work: str, most: int) -> tuple[pa.Table, dict[str, int]]:
    """At most ``most`` pairs of the files or the corpus; how many a corpus gave by which method."""
    if config.pairs:
        if exists(join(config.pairs, "run.json")):
            require_complete(config.pairs)
        return read_pairs(config.pairs, most, config.seed, config.label_column), {}
    source = config.pairs_config
    made = make_pairs(source, find_corpus(source), work, join(work, "crops"))
    made_by = dict(made.made_by.most_common())
    how = ", ".join(f"{count:,} by {method}" for method, count in made_by.items())
    log.info("%d documents gave %d pairs: %s", *made.counts.values(), how)
    label = "label" if config.label_column else None
    return read_pairs(work, most, config.seed, label), made_by
