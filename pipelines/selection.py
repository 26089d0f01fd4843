"""Which prompt, pooling and layer suit a corpus: all tried on a sample of it.

In: a corpus, with labels or without, and a model. Out: ``candidates.parquet`` (a row a candidate,
best first: ``prompt``, ``template``, ``pooling``, ``layer``, ``rank``, ``score``,
``standard_error``, ``behind``, ``behind_error``, ``probability_best``, ``v_measure``,
``half_agreement``, ``partner_rank``, ``dimension``) and the winner's ``encoder.json``, which every
job takes. A unit of work is one prompt: one forward pass over the sample gives all its layers and
poolings. What is done is not done again when a run is repeated after a kill.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from pipelines.command_line import JobResult
from pipelines.embedding.actor_stage import plan_unit_actors, run_actor_stage
from pipelines.embedding.stages import Receipt, configure_ray_data
from pipelines.encoder import EncoderDescription, describe_encoder
from pipelines.encoding.encoder_description import load_model_settings
from pipelines.encoding.tokenization import PromptedTokenizer
from pipelines.errors import InputError
from pipelines.packaged import demo_corpus
from pipelines.ray_nodes import find_nodes
from pipelines.run_record import RunRecord
from pipelines.sampling import Sample, sample_corpus
from pipelines.selecting.candidates import Selection, candidates_table, summarize
from pipelines.selecting.prompt_trial import (
    FEWEST_HALF_TOKENS,
    LoadedModel,
    Trial,
    TrialPlan,
    body_tokens,
    plan_runs,
    try_prompt,
)
from pipelines.selecting.ranking import rank_candidates
from pipelines.selecting.select_config import FEWEST_DOCUMENTS, MAY_CHANGE, SelectConfig
from pipelines.storage import (
    atomic_output,
    join,
    make_folder,
    read_bytes,
    remove_folder,
    write_bytes,
)

__all__ = ["MAY_CHANGE", "SelectConfig", "select_encoder"]

WORK_FOLDER = "_work"


def select_encoder(config: SelectConfig, record: RunRecord) -> JobResult:
    """Rank candidates on a sample and write the winner's ``encoder.json`` to ``config.output``.

    Raises :class:`InputError` for a corpus, a model or layers that do not do, and for a sample
    with too few documents or labels.
    """
    configure_ray_data()
    work = join(config.output, WORK_FOLDER)
    encoders = describe_prompts(config)
    sample = sample_corpus(
        config.corpus or str(demo_corpus()), work, text_column=config.text_column,
        label_column=config.label_column, documents=config.documents, seed=config.seed,
    )  # fmt: skip
    texts, labels = usable_documents(config, sample, next(iter(encoders.values())))
    plan = make_plan(config, len(texts), labels)
    trials = try_prompts(config, work, encoders, texts, plan)
    selection = Selection(
        [name for name in encoders for _ in plan.candidates],
        plan.candidates * len(encoders),
        rank_candidates(trials, labels, seed=config.seed),
        len(texts),
    )
    return write_outcome(config, record, encoders, selection)


def describe_prompts(config: SelectConfig) -> dict[str, EncoderDescription]:
    """The encoder with each prompt, by the prompt as it was given."""
    device = "cuda" if find_nodes().resources()["GPU"] else "cpu"
    return {
        prompt: describe_encoder(config.encoder(prompt), device=device) for prompt in config.prompts
    }


def usable_documents(
    config: SelectConfig, sample: Sample, encoder: EncoderDescription
) -> tuple[list[str], list[str] | None]:
    """Texts, and labels where there are any, that candidates can be told apart by.

    Without labels, texts that are too short to be cut in half are left out.
    """
    if config.label_column is not None:
        labels = sample.labels
        if not 2 <= len(set(labels)) < len(labels) or len(labels) < FEWEST_DOCUMENTS:
            raise InputError(
                f"the sample has {len(labels)} documents with {len(set(labels))} labels in column "
                f"{config.label_column!r}; at least {FEWEST_DOCUMENTS} documents, 2 labels and "
                "more documents than labels are needed"
            )
        return sample.texts, labels
    tokenizer = PromptedTokenizer.load(encoder)
    lengths = [body_tokens(tokenizer, ids) for ids in tokenizer.tokenize(sample.texts)]
    long_enough = [
        text
        for text, length in zip(sample.texts, lengths, strict=True)
        if length >= 2 * FEWEST_HALF_TOKENS
    ]
    if len(long_enough) < FEWEST_DOCUMENTS:
        raise InputError(
            f"{len(long_enough)} of {len(lengths)} documents have {2 * FEWEST_HALF_TOKENS} tokens "
            f"or more; {FEWEST_DOCUMENTS} are needed to score candidates without labels: give "
            "more documents or a --label-column"
        )
    return long_enough, None


def make_plan(config: SelectConfig, documents: int, labels: Sequence[str] | None) -> TrialPlan:
    """Which layers, poolings and clusterings every prompt is tried with."""
    first = describe_encoder(config.encoder(config.prompts[0]))
    count = load_model_settings(first.fetch()[0].folder, config.trust_remote_code).num_hidden_layers
    wanted = config.layers or tuple(range(count + 1))
    for layer in wanted:
        if not -count - 1 <= layer <= count:
            raise InputError(
                f"layer {layer} does not exist: {config.model} has {count} layers, so 0 to "
                f"{count}, or -1 to {-count - 1} counted from the end"
            )
    return TrialPlan(
        layers=tuple(sorted({layer % (count + 1) for layer in wanted})),
        poolings=tuple(dict.fromkeys(config.poolings)),
        runs=plan_runs(
            documents,
            num_clusters=config.num_clusters,
            labels=None if labels is None else len(set(labels)),
            seed=config.seed,
        ),
        halves=labels is None,
        normalize=config.normalize,
    )


def try_prompts(
    config: SelectConfig,
    work: str,
    encoders: Mapping[str, EncoderDescription],
    texts: Sequence[str],
    plan: TrialPlan,
) -> list[Trial]:
    """What every prompt gave, in their order."""
    content = json.dumps(list(texts)).encode()
    write_bytes(join(work, "texts.json"), content)
    make_folder(join(work, "trials"))
    state = hashlib.sha256(content + repr(plan).encode()).hexdigest()[:12]
    units = {
        f"{e.fingerprint[:24]}-{state}": {"description": e.to_json()} for e in encoders.values()
    }
    count, cpus = plan_unit_actors(
        len(units), num_actors=config.num_actors, cpus=config.cpus_per_actor
    )
    any_prompt = next(iter(encoders.values())).to_json()
    run_actor_stage(
        work,
        "try",
        units,
        functools.partial(try_unit, work, plan),
        functools.partial(LoadedModel, any_prompt, max(1, round(cpus))),
        num_actors=count,
        cpus=cpus,
    )
    return [Trial.from_bytes(read_bytes(join(work, "trials", f"{name}.npz"))) for name in units]


def try_unit(
    work: str, plan: TrialPlan, name: str, unit: Mapping[str, Any], loaded: LoadedModel
) -> Receipt:
    """Try one prompt and write what it gave as one file."""
    texts = json.loads(read_bytes(join(work, "texts.json")))
    tokenizer = PromptedTokenizer.load(EncoderDescription.from_json(unit["description"]))
    trial = try_prompt(loaded, tokenizer, texts, plan)
    path = join(work, "trials", f"{name}.npz")
    write_bytes(path, trial.to_bytes(), create_folder=False)
    return {"candidates": len(plan.candidates)}


def write_outcome(
    config: SelectConfig,
    record: RunRecord,
    encoders: Mapping[str, EncoderDescription],
    selection: Selection,
) -> JobResult:
    """Write the candidates and the winner; the job's short table."""
    table = candidates_table(selection, encoders)
    with atomic_output(join(config.output, "candidates.parquet")) as sink:
        pq.write_table(table, sink)
    best = table.slice(0, 1).to_pylist()[0]
    winner = config.candidate(best["prompt"], best["pooling"], best["layer"])
    description = describe_encoder(
        winner, device="cuda" if find_nodes().resources()["GPU"] else "cpu"
    )
    description.save(config.output)
    as_good = selection.ranking.as_good
    counts = {"documents": selection.documents, "candidates": len(table)}
    metrics = {
        "scored_by": "labels" if config.label_column else "the texts alone",
        "winner": best,
        "fingerprint": description.fingerprint,
        "as_good": as_good,
    }
    record.counts.update(counts)
    record.metrics.update(metrics)
    record.complete()
    remove_folder(join(config.output, WORK_FOLDER))
    return JobResult(counts, metrics, summarize(table, metrics, config.output))
