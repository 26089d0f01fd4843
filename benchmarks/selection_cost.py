"""What choosing an encoder costs: ``python benchmarks/selection_cost.py``.

The packaged model, one prompt, every layer and the default poolings: seconds of one label-free
trial (two halves of each text through all layers, all poolings, k-means, ranks, 100 resamples)
against seconds of embedding the same texts once per candidate with the encoder that each candidate
is. The encoders are loaded before the clock starts, run on the fastest pass the project has, and
run no layer above their own.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.corpus.sample import text_digest
from pipelines.encoder.base_model import load_base_model
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.evaluation.config import DEFAULT_POOLINGS
from pipelines.evaluation.ranking import rank_candidates
from pipelines.evaluation.trial import LoadedModel, TrialPlan, plan_runs, try_prompt
from pipelines.runtime.packaged import load_labelled_corpus

DOCUMENTS = 24
CUT_TOKENS = 64
PROMPT = "one-word"
RESULTS = Path(__file__).parent / "results" / "selection_cost.json"


def seconds_of_selection(texts: list[str], config: EncoderConfig, layers: int) -> float:
    """One trial of a prompt and its ranking."""
    description = describe_encoder(config)
    model = LoadedModel(description.to_json(), torch.get_num_threads())
    tokenizer = PromptedTokenizer.load(config)
    runs = plan_runs(len(texts), num_clusters=0, labels=None, seed=0)
    plan = TrialPlan(tuple(range(layers + 1)), DEFAULT_POOLINGS, runs, True, True)
    started = time.perf_counter()
    rank_candidates([try_prompt(model, tokenizer, texts, plan)], None)
    return time.perf_counter() - started


def seconds_of_embedding(texts: list[str], config: EncoderConfig, layers: int) -> float:
    """Embedding the texts once with each candidate, the encoders' loading left out."""
    description = describe_encoder(config)
    files, _ = description.fetch()
    dtype = getattr(torch, description.dtype)
    tokenizer = PromptedTokenizer.load(config)
    total = 0.0
    for layer in range(layers + 1):
        for pooling in DEFAULT_POOLINGS:
            model = load_base_model(files.folder, dtype=dtype, device=torch.device("cpu"))
            described = describe_encoder(replace(config, layer=layer, pooling=pooling))
            encoder = Encoder(described, tokenizer, model, torch.device("cpu"))
            started = time.perf_counter()
            encoder.encode(texts)
            total += time.perf_counter() - started
        print(f"layer {layer}: {total:.1f} s so far", flush=True)
    return total


def main() -> None:
    config = EncoderConfig(adapter=None, prompt=PROMPT, max_tokens=CUT_TOKENS)
    texts = load_labelled_corpus("20newsgroups", "test")["text"].to_pylist()
    long_enough = [text for text in texts if len(text.split()) >= 8]
    texts = sorted(long_enough, key=text_digest)[:DOCUMENTS]
    layers = describe_encoder(config).layers[0]
    selection = seconds_of_selection(texts, config, layers)
    print(f"selection: {selection:.1f} s", flush=True)
    embedding = seconds_of_embedding(texts, config, layers)
    candidates = (layers + 1) * len(DEFAULT_POOLINGS)
    results = {
        "command": "python benchmarks/selection_cost.py",
        "documents": DOCUMENTS,
        "cut_tokens": CUT_TOKENS,
        "candidates": candidates,
        "threads": torch.get_num_threads(),
        "seconds_selection": round(selection, 2),
        "seconds_embedding_once_per_candidate": round(embedding, 2),
        "times_cheaper": round(embedding / selection, 1),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
