"""What tunes an encoder on one-liners: ``python benchmarks/short_texts.py``.

The packaged LLM is tuned on the first ten words of training documents of Reuters R8, without
labels, by pairs of each kind that so short a text offers, and scored on the first ten words of test
documents: V-measure of k-means with as many clusters as labels, a mean over five seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sklearn.cluster
import sklearn.metrics

from pipelines.encoder.encoder import Encoder, EncoderConfig
from pipelines.runtime.command import configure_logging
from pipelines.runtime.packaged import load_labelled_corpus
from pipelines.runtime.run_record import RunRecord
from pipelines.training.config import FinetuneConfig
from pipelines.training.job import finetune_adapter
from pipelines.training.pairs import document_generator, noise_pair

WORDS = 10
KINDS = ("noise", "dropout", "halves")
RESULTS = Path(__file__).parent / "results" / "short_texts.json"


def one_liners(split: Literal["train", "test"], most: int) -> tuple[list[str], list[str]]:
    """Different beginnings of documents of Reuters R8, those that hash lowest, and their labels."""
    table = load_labelled_corpus("reuters-r8", split)
    rows = zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True)
    short = {" ".join(text.split()[:WORDS]): label for text, label in rows}
    kept = sorted(short, key=lambda text: hashlib.sha256(text.encode()).digest())[:most]
    return kept, [short[text] for text in kept]


def make_pairs(kind: str, texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of one kind."""
    pairs = []
    for text in texts:
        words, generator = text.split(), document_generator(0, text)
        if kind == "halves":
            pairs.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
        elif kind == "noise":
            pairs.append(noise_pair(text, generator, 0.1) or (text, text))
        else:
            pairs.append((text, text))
    return pairs


def score(encoder: Encoder, texts: list[str], labels: list[str]) -> float:
    """V-measure, a mean over five seeds of k-means."""
    vectors = encoder.encode(texts)
    runs = [
        sklearn.cluster.KMeans(len(set(labels)), n_init=1, random_state=seed).fit_predict(vectors)
        for seed in range(5)
    ]
    return float(np.mean([sklearn.metrics.v_measure_score(labels, run) for run in runs]))


def main() -> None:
    """Score each kind of pairs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    options = parser.parse_args()
    configure_logging()
    texts, labels = one_liners("test", options.documents)
    settings: dict[str, Any] = {
        "adapter": None, "pooling": "last+mean", "max_tokens": 32, "dtype": "float32",
    }  # fmt: skip
    found = {"untuned": score(Encoder.load(EncoderConfig(**settings)), texts, labels)}
    training, _ = one_liners("train", 32 * options.steps + 64)
    for kind in options.kinds:
        anchors, positives = zip(*make_pairs(kind, training), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            pairs = f"{folder}/pairs.parquet"
            pq.write_table(pa.table({"anchor": anchors, "positive": positives}), pairs)
            config = FinetuneConfig(
                **settings, pairs=pairs, output=f"{folder}/out", max_steps=options.steps,
                batch_pairs=32, heldout_pairs=64, num_workers="0", lora_dropout=0.1,
                warmup_steps=5, measure_every=10, temperature=0.1,
            )  # fmt: skip
            with RunRecord(config.output, "finetune_adapter", asdict(config)) as record:
                finetune_adapter(config, record)
            found[kind] = score(Encoder.from_folder(config.output), texts, labels)
        print(json.dumps(found), flush=True)
        options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
