"""The demo's comparison: the default encoder, the model without its adapter, and two others.

Run by ``make demo`` after the jobs it reads from:
``python benchmarks/demo.py --demo ~/.cache/shoal/outputs/demo``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import v_measure_score

from cluster.assign import NearestCentroids
from cluster.kmeans import FitOptions, fit_in_memory
from pipelines.runtime.errors import InputError
from pipelines.runtime.packaged import minilm_folder
from pipelines.runtime.run_record import require_complete

SEEDS = range(5)
RUNS = {
    "no-prompt": "SmolLM2-135M, last token, no prompt",
    "prompt-alone": "SmolLM2-135M, last token, one-word prompt",
    "default": "SmolLM2-135M with its adapter (our default)",
}
"""Embedding runs that are compared, by their folders."""


def main() -> None:
    """Score every way, print the table and write it beside the demo's outputs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="folder of the demo's outputs")
    folder: Path = parser.parse_args().demo
    runs = {name: require_complete(str(folder / name)) for name in RUNS}
    report = folder / "report" / "report.html"
    require_complete(str(report.parent))

    documents = read_embeddings(folder / "default")
    labels, texts = documents["label"].to_pylist(), documents["text"].to_pylist()
    k = len(set(labels))
    rows = {"TF-IDF": score_tf_idf(texts, labels, k)}
    for name, title in RUNS.items():
        rows[title] = score_vectors(read_vectors(folder / name), labels, k)
    peer = encode_with_minilm(texts)
    if peer is not None:
        rows["all-MiniLM-L6-v2, for comparison"] = score_vectors(peer, labels, k)
    show(rows, len(labels), k)
    result = {
        "documents": len(labels),
        "num_clusters": k,
        "v_measure": {
            name: {"mean": float(np.mean(scores)), "std": float(np.std(scores)), "scores": scores}
            for name, scores in rows.items()
        },
        "embedding": {name: {**run["counts"], **run["metrics"]} for name, run in runs.items()},
    }
    (folder / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    print(describe_speed(runs["default"]))
    print(f"Open the report: {report}")


def read_embeddings(folder: Path) -> pa.Table:
    """A finished embedding run's table, in the order of its ids."""
    return pq.read_table(folder / "embeddings").sort_by("id")


def read_vectors(folder: Path) -> np.ndarray:
    """Vectors of a finished embedding run, float32 (n, d), in the order of their ids."""
    column = read_embeddings(folder)["embedding"].combine_chunks()
    return column.values.to_numpy().reshape(-1, column.type.list_size)


def encode_with_minilm(texts: list[str]) -> np.ndarray | None:
    """Vectors of the sentence encoder that most people take; None where it cannot be had."""
    try:
        folder = minilm_folder()
    except InputError as error:
        print(f"all-MiniLM-L6-v2 is left out: {error}")
        return None
    from sentence_transformers import SentenceTransformer  # slow

    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(texts, normalize_embeddings=True)


def score_vectors(vectors: np.ndarray, labels: list[str], k: int) -> list[float]:
    """V-measure of k-means for each seed."""
    scores = []
    for seed in SEEDS:
        centroids = fit_in_memory(vectors, k, FitOptions(seed=seed)).centroids
        clusters = NearestCentroids(centroids).assign(vectors).cluster_ids
        scores.append(float(v_measure_score(labels, clusters)))
    return scores


def score_tf_idf(texts: list[str], labels: list[str], k: int) -> list[float]:
    """V-measure of scikit-learn's k-means over TF-IDF of whole texts, for each seed."""
    weights = TfidfVectorizer(stop_words="english", min_df=2, sublinear_tf=True).fit_transform(
        texts
    )
    return [
        float(v_measure_score(labels, KMeans(k, n_init=1, random_state=seed).fit_predict(weights)))
        for seed in SEEDS
    ]


def show(rows: dict[str, list[float]], documents: int, k: int) -> None:
    """Print the comparison."""
    title = f"20 Newsgroups: {documents} documents, k-means with k = {k}, {len(SEEDS)} seeds"
    table = Table("encoder", "V-measure", "± over seeds", title=title, title_justify="left")
    for name, scores in rows.items():
        table.add_row(name, f"{np.mean(scores):.3f}", f"{np.std(scores):.3f}")
    Console().print(table)


def describe_speed(run: dict) -> str:
    """One line on what embedding took."""
    counts = run["counts"]
    seconds = run["metrics"].get("embed_seconds", run["seconds"])
    return (
        f"Embedded {counts['embedded']:,} documents, {counts['tokens']:,} tokens in {seconds:.0f} s"
        f" ({counts['tokens'] / seconds:,.0f} tokens/s, {counts['embedded'] / seconds:.1f}"
        " documents/s)"
    )


if __name__ == "__main__":
    main()
