"""The number of clusters, read off one tree or found by a k-means for each number that is tried.

Run ``python benchmarks/num_clusters.py``; figures go to ``benchmarks/results/num_clusters.json``.
On labelled texts (TF-IDF in 60 dimensions) and on blobs, four seeds each: the number that is
chosen, V-measure of k-means with that number, and CPU seconds of the choice on one thread.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other would count as work

import numpy as np
from kmeans import labelled_vectors, show  # type: ignore[import-not-found]
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, silhouette_score, v_measure_score

from cluster.assign import NearestCentroids
from cluster.kmeans import FitOptions, fit_in_memory
from cluster.num_clusters import TRIED_VECTORS, Candidate, choose_num_clusters, in_order_of_score

RESULTS = Path(__file__).parent / "results" / "num_clusters.json"
SEEDS = 4


def labelled_sets() -> Iterator[tuple[str, np.ndarray, list[Any]]]:
    """A name, float32 (n, d) and the labels of each."""
    yield "20 Newsgroups", *labelled_vectors("20newsgroups", 7_500)
    yield "20 Newsgroups, passages of 60 words", *labelled_vectors("20newsgroups", 8_000, words=60)
    yield "Reuters R8", *labelled_vectors("reuters-r8", 2_189)
    for centers in (30, 60):
        vectors, labels = make_blobs(8_000, 32, centers=centers, random_state=centers)
        yield f"{centers} blobs", vectors.astype(np.float32), list(labels)


def choose_by_fits(vectors: np.ndarray, seed: int) -> int:
    """A number whose clusters are fitted, as are those of two halves, two times.

    2 to 10, a quarter more each step, then eight numbers around the best: the same three measures.
    """
    vectors = vectors[:TRIED_VECTORS]
    most = int(np.clip(np.sqrt(len(vectors)), 20, 150))
    numbers = list(range(2, 11))
    while round(numbers[-1] * 1.25) < most:
        numbers.append(round(numbers[-1] * 1.25))
    tried = {k: try_number(vectors, k, seed) for k in [*numbers, most]}
    place = sorted(tried).index(in_order_of_score([*tried.values()])[0].k)
    near = sorted(tried)[max(0, place - 1) : place + 2]
    inside = [k for k in range(near[0], near[-1]) if k not in tried]
    tried |= {k: try_number(vectors, k, seed) for k in inside[:: -(-len(inside) // 8) or 1]}
    return in_order_of_score([*tried.values()])[0].k


def try_number(vectors: np.ndarray, k: int, seed: int) -> Candidate:
    options = FitOptions(seed=seed, restarts=2)

    def fitted(rows: np.ndarray) -> tuple[float, np.ndarray]:
        fit = fit_in_memory(rows, k, options)
        return fit.inertia, NearestCentroids(fit.centroids).nearest(vectors)[:, 0]

    inertia, ids = fitted(vectors)
    silhouette = silhouette_score(vectors[:3_000].astype(np.float64), ids[:3_000])
    agreements = []
    for resample in range(2):
        order = np.random.default_rng([seed, resample]).permutation(len(vectors))
        halves = [fitted(vectors[half])[1] for half in np.array_split(order, 2)]
        agreements.append(adjusted_rand_score(*halves))
    return Candidate(k, inertia, silhouette, 0.0, float(np.mean(agreements)))


def main() -> None:
    ways = {
        "tree": lambda vectors, seed: choose_num_clusters(vectors, FitOptions(seed=seed)).k,
        "fits": choose_by_fits,
    }
    rows: dict[str, Any] = {}
    for name, vectors, labels in labelled_sets():
        found: dict[str, list[tuple[int, float, float]]] = {way: [] for way in ways}
        for seed in range(SEEDS):
            order = np.random.default_rng(seed).permutation(len(vectors))
            drawn, true = np.ascontiguousarray(vectors[order]), np.array(labels)[order]
            for way, choose in ways.items():
                started = time.process_time()
                k = choose(drawn, seed)
                seconds = time.process_time() - started
                fit = fit_in_memory(drawn, k, FitOptions(seed=seed, restarts=3))
                ids = NearestCentroids(fit.centroids).nearest(drawn)[:, 0]
                found[way].append((k, v_measure_score(true, ids), seconds))
        for way, chosen in found.items():
            numbers, scores, seconds_of = zip(*chosen, strict=True)
            rows[f"{name}, {way}"] = {
                "labels": len({*labels}),
                "least_chosen": min(numbers),
                "most_chosen": max(numbers),
                "v_measure": round(float(np.mean(scores)), 3),
                "cpu_seconds": round(float(np.mean(seconds_of)), 1),
            }
            print(f"{name}, {way}", rows[f"{name}, {way}"], flush=True)
    show(rows)
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
