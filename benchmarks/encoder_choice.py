"""Prompts, poolings and layers under mteb's scoring: ``python benchmarks/encoder_choice.py``.

On test documents of 20 Newsgroups and Reuters R8, cut to 64 tokens:

* the paper's table: prompt × pooling of the last layer, untuned and, with ``--adapter FOLDER``,
  tuned, beside TF-IDF and all-MiniLM-L6-v2 on the same cut texts; every score is mteb's own;
* what selection without labels chooses among all prompts, poolings and layers, what V-measure
  mteb gives to its choice and to the paper's default (clustering prompt, last token, last layer),
  and how its ranking of the candidates agrees with the one by V-measure (Spearman).

States of a prompt are computed once and kept below ``$SHOAL_HOME/outputs/encoder_choice``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import scipy.stats

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.evaluation.config import DEFAULT_POOLINGS
from pipelines.evaluation.contestants import MINILM, TF_IDF, load_contestant, parse_contestant
from pipelines.evaluation.mteb import MtebEncoder
from pipelines.evaluation.ranking import rank_candidates
from pipelines.evaluation.tasks import LabelledCorpusTask, packaged_task, score_of
from pipelines.evaluation.trial import (
    FEWEST_HALF_TOKENS,
    AllLayersPooler,
    LoadedModel,
    PooledStates,
    Trial,
    TrialPlan,
    body_tokens,
    plan_runs,
    try_prompt,
)
from pipelines.runtime.command import configure_logging
from pipelines.runtime.files import shoal_home

CORPORA = ("20newsgroups", "reuters-r8")
PROMPTS = ("none", "one-word", "cluster")
TABLE_POOLINGS = ("last", "mean", "last+mean")
PAPER_DEFAULT = ("cluster", "last")
LAYERS = 30
DOCUMENTS = 300
CUT_TOKENS = 64
RESULTS = Path(__file__).parent / "results" / "encoder_choice.json"


class Precomputed:
    """Vectors that are there already, as an mteb encoder's embedder."""

    def __init__(self, texts: list[str], vectors: np.ndarray) -> None:
        self.name, self.revision = "benchmark/precomputed", "none"
        self.dimension: int | None = vectors.shape[1]
        self.max_tokens: int | None = CUT_TOKENS
        self._places = {text: place for place, text in enumerate(texts)}
        self._vectors = vectors

    def embed(self, texts: list[str], task: Any, prompt_type: str | None) -> np.ndarray:
        """The vectors of these texts."""
        return self._vectors[[self._places[text] for text in texts]]


def mteb_score(task: LabelledCorpusTask, encoder: MtebEncoder) -> dict[str, Any]:
    """mteb's score of an encoder; a fresh task, so that all get the same draws."""
    fresh = LabelledCorpusTask(task.display_name, task.texts, task.labels)
    result = mteb.evaluate(encoder, fresh, cache=None, co2_tracker=False, show_progress_bar=False)
    found = score_of(result.task_results[0], fresh)
    return {"v_measure": round(found["score"], 4), "draws": [round(d, 4) for d in found["draws"]]}


def config_of(prompt: str, adapter: str | None) -> EncoderConfig:
    return EncoderConfig(prompt=prompt, adapter=adapter, max_tokens=CUT_TOKENS)


def states_of(
    model: LoadedModel, prompt: str, corpus: str, texts: list[str], revision: str
) -> PooledStates:
    """Pooled states of whole texts of all layers, from the cache where they are there."""
    path = cache_path("states", prompt, corpus, revision)
    if path.exists():
        with np.load(path, allow_pickle=False) as arrays:
            parts = {tuple(name.split(" ")): arrays[name] for name in arrays.files}
        return PooledStates({(int(layer), part): v for (layer, part), v in parts.items()})
    tokenizer = PromptedTokenizer.load(config_of(prompt, None))
    pooler = AllLayersPooler(model.model, range(LAYERS + 1), DEFAULT_POOLINGS, model.budget_tokens)
    states = pooler.pool(tokenizer.tokenize(texts), tokenizer)
    named: dict[str, Any] = {f"{layer} {part}": v for (layer, part), v in states.parts.items()}
    np.savez(path, **named)
    return states


def trial_of(
    model: LoadedModel, prompt: str, corpus: str, texts: list[str], revision: str
) -> tuple[Trial, float | None]:
    """What selection makes of a prompt, from the cache where it is there; and the seconds."""
    path = cache_path("trial", prompt, corpus, revision)
    if path.exists():
        return Trial.from_bytes(path.read_bytes()), None
    runs = plan_runs(len(texts), num_clusters=0, labels=None, seed=0)
    plan = TrialPlan(tuple(range(LAYERS + 1)), DEFAULT_POOLINGS, runs, True, True)
    started = time.perf_counter()
    trial = try_prompt(model, PromptedTokenizer.load(config_of(prompt, None)), texts, plan)
    path.write_bytes(trial.to_bytes())
    return trial, time.perf_counter() - started


def cache_path(kind: str, prompt: str, corpus: str, revision: str) -> Path:
    folder = shoal_home() / "outputs" / "encoder_choice"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{kind}-{prompt}-{corpus}-{DOCUMENTS}-{revision.removeprefix('sha256:')[:12]}"
    return folder / f"{name}.npz"


def load_model(adapter: str | None) -> tuple[LoadedModel, str]:
    """The model, adapter merged, and what tells the two together from others."""
    description = describe_encoder(config_of("none", adapter))
    revision = description.adapter_revision or description.model_revision
    import torch

    return LoadedModel(description.to_json(), torch.get_num_threads()), revision


def prompt_table(
    model: LoadedModel, revision: str, tasks: dict[str, LabelledCorpusTask]
) -> dict[str, Any]:
    """mteb's score of prompt × pooling of the last layer, by corpus."""
    table: dict[str, Any] = {}
    for corpus, task in tasks.items():
        for prompt in PROMPTS:
            states = states_of(model, prompt, corpus, task.texts, revision)
            for pooling in TABLE_POOLINGS:
                vectors = states.vectors(LAYERS, pooling)  # type: ignore[arg-type]
                found = mteb_score(task, MtebEncoder(Precomputed(task.texts, vectors)))
                table.setdefault(corpus, {}).setdefault(prompt, {})[pooling] = found
                print(corpus, prompt, pooling, found["v_measure"], flush=True)
    return table


def baselines(tasks: dict[str, LabelledCorpusTask]) -> dict[str, Any]:
    """TF-IDF and the peer on the same cut texts."""
    tokenizer = PromptedTokenizer.load(config_of("none", None))
    found: dict[str, Any] = {}
    for corpus, task in tasks.items():
        cut = [tokenizer.tokenizer.decode(ids) for ids in tokenizer.tokenize(task.texts)]
        for name in (TF_IDF, MINILM):
            contestant = parse_contestant(name, EncoderConfig(), {}, "cpu")
            encoder = load_contestant(contestant, device="cpu", threads=None)
            vectors = encoder.embedder.embed(cut, None, None)
            score = mteb_score(task, MtebEncoder(Precomputed(task.texts, vectors)))
            found.setdefault(name, {})[corpus] = score
            print(corpus, name, score["v_measure"], flush=True)
    return found


def selection(
    model: LoadedModel, revision: str, tasks: dict[str, LabelledCorpusTask]
) -> dict[str, Any]:
    """What selection without labels chooses on each corpus, and how well it ranks."""
    found = {}
    tokenizer = PromptedTokenizer.load(config_of("none", None))
    for corpus, task in tasks.items():
        ids = tokenizer.tokenize(task.texts)
        long_enough = [body_tokens(tokenizer, row) >= 2 * FEWEST_HALF_TOKENS for row in ids]
        texts = [text for text, long in zip(task.texts, long_enough, strict=True) if long]
        trials = [trial_of(model, prompt, corpus, texts, revision)[0] for prompt in PROMPTS]
        ranking = rank_candidates(trials, None)
        grid = [
            (prompt, layer, pooling)
            for prompt in PROMPTS
            for layer in range(LAYERS + 1)
            for pooling in DEFAULT_POOLINGS
        ]
        measured = v_measures(model, revision, corpus, task, grid)
        every = {p: states_of(model, p, corpus, task.texts, revision) for p in PROMPTS}

        def score(
            candidate: tuple[str, int, Any],
            every: dict[str, PooledStates] = every,
            task: LabelledCorpusTask = task,
        ) -> dict[str, Any]:
            vectors = every[candidate[0]].vectors(candidate[1], candidate[2])
            found = mteb_score(task, MtebEncoder(Precomputed(task.texts, vectors)))
            return {"candidate": list(candidate), **found}

        chosen, paper = score(grid[ranking.winner]), score((PAPER_DEFAULT[0], LAYERS, "last"))
        found[corpus] = {
            "candidates": len(grid),
            "documents": len(texts),
            "spearman": round(float(scipy.stats.spearmanr(ranking.score, measured)[0]), 3),
            "spearman_half_agreement": spearman(ranking.half_agreement, measured),
            "spearman_partner_rank": spearman(-np.log(ranking.partner_rank), measured),  # type: ignore[arg-type]
            "chosen": chosen,
            "paper_default": paper,
            "our_default": score(("one-word", LAYERS, "last")),
            "best_by_labels": score(grid[int(np.argmax(measured))]),
            "gain_over_paper_default": round(chosen["v_measure"] - paper["v_measure"], 4),
            "probability_best": round(float(ranking.probability_best[ranking.winner]), 3),
            "as_good": ranking.as_good,
        }
        print(corpus, json.dumps(found[corpus]), flush=True)
    return found


def spearman(values: np.ndarray | None, measured: np.ndarray) -> float:
    assert values is not None
    return round(float(scipy.stats.spearmanr(values, measured)[0]), 3)


def v_measures(
    model: LoadedModel,
    revision: str,
    corpus: str,
    task: LabelledCorpusTask,
    grid: list[tuple[str, int, Any]],
) -> np.ndarray:
    """V-measure of every candidate with k-means of three seeds, float64 (candidates,)."""
    from pipelines.evaluation.trial import agreement, cluster_vectors

    labels = np.unique(task.labels, return_inverse=True)[1]
    clusters = len(set(task.labels))
    values = np.empty(len(grid))
    states, of = None, ""
    for place, (prompt, layer, pooling) in enumerate(grid):
        if of != prompt:
            states, of = states_of(model, prompt, corpus, task.texts, revision), prompt
        assert states is not None
        vectors = states.vectors(layer, pooling)
        runs = np.stack([cluster_vectors(vectors, clusters, seed) for seed in range(3)])
        every = np.broadcast_to(labels, runs.shape)
        values[place] = agreement(every, runs, np.ones(len(labels))).mean()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", help="folder of a tuned adapter, for the tuned table")
    parser.add_argument("--parts", nargs="*", default=["baselines", "untuned", "selection"])
    arguments = parser.parse_args()
    configure_logging()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {
        "command": "python benchmarks/encoder_choice.py --adapter FOLDER",
        "documents": DOCUMENTS,
        "cut_tokens": CUT_TOKENS,
        "mteb": mteb.__version__,
    }
    tasks = {name: packaged_task(name, DOCUMENTS) for name in CORPORA}

    def keep(part: str, value: Any) -> None:
        results[part] = value
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")

    if "baselines" in arguments.parts:
        keep("baselines", baselines(tasks))
    if {"untuned", "selection"} & set(arguments.parts):
        model, revision = load_model(None)
        if "untuned" in arguments.parts:
            keep("untuned", prompt_table(model, revision, tasks))
        if "selection" in arguments.parts:
            keep("selection", selection(model, revision, tasks))
    if arguments.adapter:
        model, revision = load_model(arguments.adapter)
        table = prompt_table(model, revision, tasks)
        keep("tuned", {"adapter": revision, "recipe": recipe_of(arguments.adapter), **table})


def recipe_of(adapter: str) -> dict[str, Any]:
    """How an adapter was tuned, from its run record."""
    path = Path(adapter) / "run.json"
    if not path.exists():
        return {}
    config = json.loads(path.read_text())["config"]
    names = ("prompt", "pooling", "max_steps", "batch_pairs", "learning_rate", "temperature")
    return {name: config.get(name) for name in (*names, "lora_rank")}


if __name__ == "__main__":
    main()
