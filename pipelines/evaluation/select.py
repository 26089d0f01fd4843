"""Which prompt, pooling and layer suit a corpus: all tried on a sample of it.

In: a corpus, with labels or without, and a model. Out: ``candidates.parquet`` (a row a candidate,
best first: ``prompt``, ``adapter``, ``template``, ``pooling``, ``layer``, ``rank``, ``score``,
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
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import pyarrow as pa

from pipelines.corpus.passages import Cuts, TokenReader, cut_texts
from pipelines.corpus.sample import Sample, sample_corpus, text_digest
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import (
    POOLINGS,
    EncoderDescription,
    Pooling,
)
from pipelines.encoder.prompts import PROMPTS, PromptTemplate
from pipelines.encoder.sources import load_model_settings
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.evaluation.config import FEWEST_DOCUMENTS, SelectConfig
from pipelines.evaluation.contestants import worker_device
from pipelines.evaluation.ranking import Ranking, rank_candidates
from pipelines.evaluation.trial import (
    FEWEST_HALF_TOKENS,
    LoadedModel,
    Trial,
    TrialPlan,
    body_tokens,
    plan_runs,
    try_prompt,
)
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    join,
    make_folder,
    read_bytes,
    remove_folder,
    write_bytes,
    write_table,
)
from pipelines.runtime.packaged import demo_corpus
from pipelines.runtime.run_record import RunRecord
from pipelines.runtime.units import Receipt, configure_ray_data, plan_unit_actors, run_actor_stage

_OPTIONAL_SCORES = ("v_measure", "half_agreement", "partner_rank")
_TRIAL = 2
"""What a trial's file holds: another number where that has changed, so that none is taken over."""
Name: TypeAlias = "tuple[Literal['prompt', 'adapter'], str]"
"""What an encoder is tried for, as it was given: a prompt may be called as an adapter is."""


@dataclass(frozen=True)
class Selection:
    """What was tried on what, and how it came out: the name of each candidate's encoder first."""

    names: list[Name]
    candidates: list[tuple[int, Pooling]]
    dimensions: np.ndarray
    ranking: Ranking
    documents: int


def candidates_table(
    selection: Selection,
    encoders: Mapping[Name, EncoderDescription],
    prompts: Sequence[str] = (),
) -> pa.Table:
    """Every candidate with its scores, best first: the content of ``candidates.parquet``.

    ``prompts`` are those asked for, by the names they were given.
    """
    ranking = selection.ranking
    order = np.argsort(-ranking.score, kind="stable")
    tried = [encoders[selection.names[place]] for place in order]
    layers, poolings = zip(*(selection.candidates[place] for place in order), strict=True)
    known = {str(PromptTemplate.parse(name)): name for name in (*PROMPTS, *prompts)}
    score = ranking.score[order]
    optional = {name: getattr(ranking, name) for name in _OPTIONAL_SCORES}
    return pa.table(
        {
            "prompt": [known.get(encoder.prompt, encoder.prompt) for encoder in tried],
            "adapter": pa.array([encoder.adapter for encoder in tried], pa.string()),
            "template": [encoder.prompt for encoder in tried],
            "pooling": poolings,
            "layer": layers,
            "rank": np.arange(1, len(order) + 1),
            "score": score,
            "standard_error": ranking.standard_error[order],
            "behind": score[0] - score,
            "behind_error": ranking.behind_error[order],
            "probability_best": ranking.probability_best[order],
            **{
                name: pa.nulls(len(order), pa.float64()) if values is None else values[order]
                for name, values in optional.items()
            },
            "dimension": selection.dimensions[order],
        }
    )


def summarize(table: pa.Table, metrics: Mapping[str, Any], output: str) -> dict[str, str]:
    """The table that a person sees at the end: the first five, and how sure it is."""
    summary = {"candidates": f"{len(table):,}", "scored by": metrics["scored_by"]}
    for row in table.slice(0, 5).to_pylist():
        adapter = f"{row['adapter']}, " if row["adapter"] else ""
        what = f"{adapter}{row['prompt']}, {row['pooling']}, layer {row['layer']}"
        measured = (
            f"V-measure {row['v_measure']:.3f}"
            if row["v_measure"] is not None
            else f"halves agree {row['half_agreement']:.3f}, "
            f"partner's rank {row['partner_rank']:.1f}"
        )
        summary[f"{row['rank']}. {what}"] = measured
    sure = metrics["winner"]["probability_best"]
    summary["how sure"] = (
        f"first in {sure:.0%} of resamples; {metrics['as_good']} candidates are within two "
        "standard errors of the first"
    )
    return {**summary, "output": output}


WORK_FOLDER = "_work"


def select_encoder(config: SelectConfig, record: RunRecord) -> JobResult:
    """Rank candidates on a sample and write the winner's ``encoder.json`` to ``config.output``.

    Raises :class:`InputError` for a corpus, a model or layers that do not do, and for a sample
    with too few documents or labels.
    """
    configure_ray_data()
    work = join(config.output, WORK_FOLDER)
    encoders = describe_candidates(config)
    sample = sample_corpus(
        config.corpus or str(demo_corpus()), work, text_column=config.text_column,
        label_column=config.label_column, documents=config.documents, seed=config.seed,
        options=config.reading,
    )  # fmt: skip
    first = next(iter(encoders.values()))
    if (cuts := config.cuts(config.max_tokens)) is not None:
        reader = PromptedTokenizer.load(first)
        sample = draw_passages(sample, cuts, reader, config.documents, config.seed)
    texts, labels = usable_documents(config, sample, first)
    plan = make_plan(config, len(texts), labels)
    plans = plans_of(encoders, plan)
    encoders = {name: encoders[name] for name in plans}
    trials = try_prompts(config, work, encoders, texts, plans)
    selection = Selection(
        [name for name, own in plans.items() for _ in own.candidates],
        [candidate for own in plans.values() for candidate in own.candidates],
        np.concatenate([trial.dimensions for trial in trials if trial.dimensions is not None]),
        rank_candidates(trials, labels, seed=config.seed),
        len(texts),
    )
    return write_outcome(config, record, encoders, selection)


def describe_candidates(config: SelectConfig) -> dict[Name, EncoderDescription]:
    """The encoder with each prompt and with each adapter.

    Raises :class:`InputError` for an adapter of averaged layers, which are not tried here.
    """
    device = worker_device()
    encoders: dict[Name, EncoderDescription] = {
        ("prompt", prompt): describe_encoder(config.encoder(prompt), device=device)
        for prompt in config.prompts
    }
    as_trained = replace(config.encoder(config.prompts[0]), prompt=None, pooling=None, layer=None)
    for adapter in config.tried_adapters:
        encoder = describe_encoder(replace(as_trained, adapter=adapter), device=device)
        if len(encoder.layers) > 1 or encoder.pooling not in POOLINGS:
            raise InputError(
                f"adapter {adapter} has pooling {encoder.pooling} of layers "
                f"{list(encoder.layers)}: only one layer and one of {', '.join(POOLINGS)} can be "
                "tried beside others"
            )
        encoders["adapter", adapter] = encoder
    return encoders


def plans_of(encoders: Mapping[Name, EncoderDescription], plan: TrialPlan) -> dict[Name, TrialPlan]:
    """What each encoder is tried with: an adapter with what it was trained with.

    An encoder all of whose candidates are those of encoders before it is left out: an adapter that
    is there twice, and one that a prompt is tried with in all layers and poolings.
    """
    plans: dict[Name, TrialPlan] = {}
    seen: set[str] = set()
    for name, encoder in encoders.items():
        own = plan
        if name[0] == "adapter":
            own = replace(plan, layers=encoder.layers, poolings=(cast(Pooling, encoder.pooling),))
        found = {
            replace(encoder, layers=(layer,), pooling=pooling).fingerprint
            for layer, pooling in own.candidates
        }
        if not found <= seen:
            plans[name] = own
            seen |= found
    return plans


def draw_passages(
    sample: Sample, cuts: Cuts, reader: TokenReader, wanted: int, seed: int
) -> Sample:
    """``wanted`` passages of a sample's documents: one of each, then a second of each, and so on.

    Passages of one document are near each other under any encoder, and say less of which is better.
    Each text is drawn once.
    """
    cut = zip(sample.texts, cut_texts(sample.texts, cuts, reader), strict=True)
    rounds: list[tuple[int, int, str]] = []
    for place, (text, places) in enumerate(cut):
        passages = {text[start:stop] for start, stop in places.tolist()}
        drawn = sorted(passages, key=lambda passage: text_digest(passage, seed))
        rounds += [(number, place, passage) for number, passage in enumerate(drawn)]
    owners: dict[str, int] = {}
    for _, place, passage in sorted(rounds):
        owners.setdefault(passage, place)
    texts = list(owners)[:wanted]
    table = sample.documents.take([owners[text] for text in texts])
    column = table.column_names.index("text")
    kind = table.schema.field(column).type
    return replace(sample, documents=table.set_column(column, "text", pa.array(texts, kind)))


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
    encoders: Mapping[Name, EncoderDescription],
    texts: Sequence[str],
    plans: Mapping[Name, TrialPlan],
) -> list[Trial]:
    """What every prompt and adapter gave, in their order."""
    content = json.dumps(list(texts)).encode()
    write_bytes(join(work, "texts.json"), content)
    make_folder(join(work, "trials"))
    units = {}
    for name, encoder in encoders.items():
        plan = plans[name]
        state = hashlib.sha256(content + repr((_TRIAL, plan)).encode()).hexdigest()[:12]
        units[f"{encoder.fingerprint[:24]}-{state}"] = {
            "description": encoder.to_json(),
            "layers": plan.layers,
            "poolings": plan.poolings,
        }
    count, cpus = plan_unit_actors(
        len(units), num_actors=config.num_actors, cpus=config.cpus_per_actor
    )
    any_prompt = next(iter(encoders.values())).to_json()
    run_actor_stage(
        work,
        "try",
        units,
        functools.partial(try_unit, work, next(iter(plans.values()))),
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
    plan = replace(plan, layers=tuple(unit["layers"]), poolings=tuple(unit["poolings"]))
    encoder = EncoderDescription.from_json(unit["description"])
    loaded.take(encoder)
    trial = try_prompt(loaded, PromptedTokenizer.load(encoder), texts, plan, encoder)
    path = join(work, "trials", f"{name}.npz")
    write_bytes(path, trial.to_bytes(), create_folder=False)
    return {"candidates": len(plan.candidates)}


def write_outcome(
    config: SelectConfig,
    record: RunRecord,
    encoders: Mapping[Name, EncoderDescription],
    selection: Selection,
) -> JobResult:
    """Write the candidates and the winner; the job's short table."""
    table = candidates_table(selection, encoders, config.prompts)
    write_table(join(config.output, "candidates.parquet"), table)
    best = table.slice(0, 1).to_pylist()[0]
    winner = replace(
        config.encoder(best["prompt"]),
        adapter=best["adapter"],
        pooling=best["pooling"],
        layer=best["layer"],
    )
    description = describe_encoder(winner, device=worker_device())
    description.save(config.output)
    as_good = selection.ranking.as_good
    counts = {"documents": selection.documents, "candidates": len(table)}
    metrics = {
        "scored_by": "labels" if config.label_column else "the texts alone",
        "winner": best,
        "fingerprint": description.fingerprint,
        "as_good": as_good,
    }
    record.complete(counts, metrics)
    remove_folder(join(config.output, WORK_FOLDER))
    return JobResult(counts, metrics, summarize(table, metrics, config.output))
