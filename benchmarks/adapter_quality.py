"""Quality of tuned adapters on unseen documents: ``python benchmarks/adapter_quality.py``.

The packaged LLM is tuned on crops of the training documents of 20 Newsgroups, without labels,
then clusters 600 test documents of 20 Newsgroups and of Reuters R8 (never trained on). Scores are
V-measures of k-means with k = number of labels, on texts cut to 64 tokens, as a mean over five
k-means seeds; all-MiniLM-L6-v2 is scored on the same texts in the same way.

Recipes are compared on other documents: ``--variants`` tunes its rows with one seed and scores
them on training documents of both corpora that no pair is made of. Scores of runs that are already
in the result file are kept while the recipe is the same, so the script can be stopped and started.

``--encoders none packaged FOLDER gemma3-270m:none ...`` scores the packaged model without an
adapter, with its own and with those in folders, and other models by MODEL:ADAPTER, beside
all-MiniLM-L6-v2, on four more corpora too (``labelled_corpora.py``), 600 documents each that no
recipe was chosen by; ``--seeds`` with nothing after it leaves out the tuning. ``--own-text FOLDER``
writes what each corpus has beside the documents that score, without labels, to tune on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sklearn.cluster
import sklearn.metrics
import torch
from labelled_corpora import CORPORA as OTHER_CORPORA  # type: ignore[import-not-found]

from pipelines.encoder.encoder import Encoder, EncoderConfig
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.command import configure_logging
from pipelines.runtime.files import shoal_home
from pipelines.runtime.packaged import CorpusName, load_labelled_corpus, minilm_folder
from pipelines.runtime.run_record import RunRecord
from pipelines.training.config import FinetuneConfig, PairsConfig
from pipelines.training.job import finetune_adapter
from pipelines.training.pairs import SourceText, plain_pairs

CORPORA: tuple[CorpusName, ...] = ("20newsgroups", "reuters-r8")
DOCUMENTS = 600
DEVELOPMENT_DOCUMENTS: dict[CorpusName, int] = {"20newsgroups": 400, "reuters-r8": 600}
CUT_TOKENS = 64
PEER = "all-MiniLM-L6-v2"
KMEANS_SEEDS = 5
RESULTS = Path(__file__).parent / "results" / "adapter_quality.json"
# The recipe whose three seeds are the claim, and what each variant changes in it.
RECIPE: dict[str, Any] = {
    "crop_words": (32, 64),
    "pooling": "last+mean",
    "lora_rank": 32,
    "lora_alpha": 64.0,
    "max_steps": 80,
    "batch_pairs": 32,
    "temperature": 0.1,
    "learning_rate": 6e-4,
    "warmup_steps": 5,
    "heldout_pairs": 64,
    "measure_every": 20,
    "dtype": "float32",
    "activation_tokens": 4096,
}
# What the recipe before it had, at which some variants were measured.
EARLIER_RECIPE: dict[str, Any] = {"crop_words": (16, 32), "lora_rank": 16, "lora_alpha": 32.0}
SHORT_RUN: dict[str, Any] = {**EARLIER_RECIPE, "max_steps": 20}
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "40 steps": {"max_steps": 40},
    "40 steps, crops of 48 to 96 words": {"max_steps": 40, "crop_words": (48, 96)},
    "40 steps, mean of all tokens": {"max_steps": 40, "pooling": "mean"},
    "40 steps, rank 64, crops of 16 to 32 words": {
        "max_steps": 40, "crop_words": (16, 32), "lora_rank": 64, "lora_alpha": 128.0,
    },
    "rank 16, crops of 16 to 32 words": EARLIER_RECIPE,
    "20 steps, rank 16, crops of 16 to 32 words": SHORT_RUN,
    "20 steps, rank 16, crops of 16 to 32 words, last token only": {
        **SHORT_RUN, "pooling": "last",
    },
    "20 steps, rank 16, crops of 16 to 32 words, prompt topic": {
        **SHORT_RUN, "prompt": "topic",
    },
    "20 steps, rank 16, crops of 16 to 32 words, temperature 0.05": {
        **SHORT_RUN, "temperature": 0.05,
    },
    "20 steps, rank 16, crops of 16 to 32 words, temperature 0.2": {
        **SHORT_RUN, "temperature": 0.2,
    },
    "20 steps, rank 4, crops of 16 to 32 words": {**SHORT_RUN, "lora_rank": 4, "lora_alpha": 8.0},
    "20 steps, rank 16, crops of 8 to 16 words": {**SHORT_RUN, "crop_words": (8, 16)},
    "20 steps, rank 16, whole documents with noise": {**SHORT_RUN, "method": "noise"},
}  # fmt: skip

Encode = Callable[[list[str]], np.ndarray]
Texts = dict[str, tuple[list[str], list[str]]]


def by_hash(name: CorpusName, split: Literal["train", "test"], salt: str) -> list[dict[str, str]]:
    """All documents of a corpus, in the order of their texts' hashes."""
    rows = load_labelled_corpus(name, split).to_pylist()
    rows.sort(key=lambda row: hashlib.sha256((salt + row["text"]).encode()).digest())
    return rows


def cut_documents(rows: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """Texts, cut, and labels."""
    tokenizer = PromptedTokenizer.load(EncoderConfig(prompt="none", max_tokens=CUT_TOKENS))
    ids = tokenizer.tokenize([row["text"] for row in rows])
    return [tokenizer.tokenizer.decode(row) for row in ids], [row["label"] for row in rows]


def test_documents() -> Texts:
    """What the claim is about."""
    return {name: cut_documents(by_hash(name, "test", "")[:DOCUMENTS]) for name in CORPORA}


def reach_documents() -> Texts:
    """What the packaged adapter is measured by; corpora that cannot be had here are left out."""
    others = {name: load()[-DOCUMENTS:] for name, load in OTHER_CORPORA.items()}
    for name in [name for name, rows in others.items() if not rows]:
        print(f"{name}: left out, Debian's package index is not to be had here")
        del others[name]
    return test_documents() | {name: cut_documents(rows) for name, rows in others.items()}


def write_own_text(folder: Path) -> None:
    """A Parquet file ``text`` of each corpus: training documents, or all that do not score."""
    texts = {name: by_hash(name, "train", "") for name in CORPORA}
    texts |= {name: load()[:-DOCUMENTS] for name, load in OTHER_CORPORA.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in texts.items():
        table = pa.table({"text": [row["text"] for row in rows]})
        pq.write_table(table, folder / f"{name}.parquet")


def without_folders(name: str) -> str:
    """ADAPTER or MODEL:ADAPTER with a folder's own name alone, as results name it."""
    model, colon, adapter = name.rpartition(":")
    return f"{model}{colon}{Path(adapter).name}"


def score_encoder(name: str, corpora: Texts) -> dict[str, Any]:
    """Scores of an ADAPTER of the packaged model, of MODEL:ADAPTER, or of the peer."""
    if name == PEER:
        return {"v_measure": score(encode_with_minilm, corpora)}
    model, _, adapter = name.rpartition(":")
    named: dict[str, Any] = {"model": model} if model else {}
    encoder = Encoder.load(EncoderConfig(adapter=adapter, max_tokens=CUT_TOKENS, **named))
    started = time.process_time()
    found = {
        "fingerprint": encoder.fingerprint,
        "dtype": encoder.description.dtype,
        "pooling": encoder.description.pooling,
        "v_measure": score(encoder.encode, corpora),
    }
    return found | {"cpu_minutes": round((time.process_time() - started) / 60, 1)}


def development_documents() -> Texts:
    """What recipes are chosen by."""
    return {
        name: cut_documents(by_hash(name, "train", "dev")[:count])
        for name, count in DEVELOPMENT_DOCUMENTS.items()
    }


def score(encode: Encode, corpora: Texts) -> dict[str, float]:
    """V-measure of each corpus, a mean over k-means seeds."""
    scores = {}
    for name, (texts, labels) in corpora.items():
        vectors = encode(texts)
        values = []
        for seed in range(KMEANS_SEEDS):
            means = sklearn.cluster.KMeans(len(set(labels)), n_init=10, random_state=seed)
            found = means.fit_predict(vectors)
            values.append(sklearn.metrics.v_measure_score(labels, found))
        scores[name] = round(float(np.mean(values)), 4)
    return scores


def encode_with_minilm(texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    return model.encode(texts, normalize_embeddings=True)


def write_pairs(config: PairsConfig, path: Path) -> None:
    """A pair of each training document of 20 Newsgroups that is long enough; no label is read."""
    rows = by_hash("20newsgroups", "train", "dev")[DEVELOPMENT_DOCUMENTS["20newsgroups"] :]
    documents = [SourceText(str(row["id"]), row["text"]) for row in rows]
    pairs = [asdict(pair) for pair in plain_pairs(config, documents, Counter())]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(pairs).select(["anchor", "positive", "id"]), path)


def tune(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Tune one adapter, or find it tuned; its folder, and what it cost if it was tuned just now."""
    folder = shoal_home() / "outputs" / "adapter_quality"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    made = {key: settings.pop(key) for key in ("method", "crop_words") if key in settings}
    parts = (made.get("method", "crop"), *made.get("crop_words", ()), seed)
    pairs = folder / f"{'-'.join(map(str, parts))}.parquet"
    write_pairs(PairsConfig(seed=seed, **made), pairs)
    output = folder / f"{name.replace(' ', '-')}-{digest}-{seed}"
    config = FinetuneConfig(
        pairs=str(pairs), output=str(output), adapter=None, seed=seed, num_workers="0", **settings
    )
    started, cpu = time.perf_counter(), time.process_time()
    with RunRecord(
        config.output, "finetune_adapter", asdict(config), seed=seed, keep_complete=True
    ) as record:
        metrics = finetune_adapter(config, record).metrics
    run: dict[str, Any] = {"folder": str(output)}
    if record.previous is None:
        run |= {
            "threads": torch.get_num_threads(),
            "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
            "wall_minutes": round((time.perf_counter() - started) / 60, 1),
        }
    return run | {k: metrics[k] for k in ("best_step", "training_tokens", "before", "best")}


def summarize(results: dict[str, Any]) -> None:
    """Add mean, spread and the lead over the peer of the recipe's seeds."""
    runs = [run for key, run in results["runs"].items() if key.startswith("recipe ")]
    if not runs:
        return
    summary = {}
    for name in CORPORA:
        values = [run["v_measure"][name] for run in runs]
        mean = statistics.mean(values)
        summary[name] = {
            "mean": round(mean, 4),
            "standard_deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None,
            "lead_over_minilm": round(mean - results["baselines"][PEER][name], 4),
        }
    results["summary"] = {"seeds": len(runs), **summary}


def begin_again(results: dict[str, Any]) -> dict[str, Any]:
    """Results of another recipe put aside: what was scored on the test documents is not hidden."""
    kept = ("baselines", "development_baselines", "reach")
    earlier = results.get("earlier", [])
    if "summary" in results:
        earlier = [*earlier, {key: results[key] for key in ("recipe", "runs", "summary")}]
    return {**{key: results[key] for key in kept if key in results}, "earlier": earlier}


def run_variant(name: str, seed: int, corpora: Texts) -> dict[str, Any]:
    """Tune one adapter and score it."""
    run = tune(name, seed, {**RECIPE, **VARIANTS.get(name, {})})
    encoder = Encoder.from_folder(run.pop("folder"))
    return {**run, "v_measure": score(encoder.encode, corpora)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=[], choices=list(VARIANTS))
    parser.add_argument("--encoders", nargs="*", default=[], help="none, packaged, folders")
    parser.add_argument("--own-text", type=Path)
    arguments = parser.parse_args()
    configure_logging()
    if arguments.own_text is not None:
        write_own_text(arguments.own_text)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    recipe = json.loads(json.dumps(RECIPE))
    if results.get("recipe") != recipe:
        results = begin_again(results)
    results |= {
        "command": "python benchmarks/adapter_quality.py",
        "documents": DOCUMENTS,
        "cut_tokens": CUT_TOKENS,
        "recipe": recipe,
    }
    sets = {"test": test_documents, "development": development_documents}
    wanted = ["test"] * bool(arguments.seeds) + ["development"] * bool(arguments.variants)
    corpora = {name: sets[name]() for name in wanted}

    def keep(section: str, name: str, make: Callable[[], Any]) -> None:
        found = results.setdefault(section, {})
        if name not in found:
            found[name] = make()
            summarize(results)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(section, name, json.dumps(found[name]), flush=True)

    if arguments.encoders:
        reached = reach_documents()
        named = {without_folders(name): name for name in arguments.encoders}
        for title in named:
            results.get("reach", {}).pop(title, None)
        for title, name in {PEER: PEER, **named}.items():
            keep("reach", title, functools.partial(score_encoder, name, reached))
    for name, texts in corpora.items():
        section = "baselines" if name == "test" else "development_baselines"
        keep(section, PEER, functools.partial(score, encode_with_minilm, texts))
    for seed in arguments.seeds:
        run = functools.partial(run_variant, "recipe", seed, corpora["test"])
        keep("runs", f"recipe {seed}", run)
    for name in arguments.variants:
        run = functools.partial(run_variant, name, 0, corpora["development"])
        keep("development", name, run)
    print(json.dumps(results.get("summary", {})))


if __name__ == "__main__":
    main()
