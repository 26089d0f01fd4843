"""k-means against scikit-learn, on disk, over growing n, and in two levels.

Run ``python benchmarks/kmeans.py``; figures go to ``benchmarks/results/kmeans.json``. Vectors are
drawn around 1,000 random centres and scaled to length 1, so that clusters overlap as those of texts
do. ``--only NAME`` runs one part and keeps the figures of the others.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from sklearn.cluster import KMeans, MiniBatchKMeans

from cluster.assign import NearestCentroids
from cluster.census import CensusPlan
from cluster.kmeans import FitOptions, fit_in_memory, refine_on_all
from cluster.shard_assignment import assign_shard
from cluster.vectors import Columns, open_vectors
from cluster.workers import RayVectors

RESULTS = Path(__file__).parent / "results" / "kmeans.json"


def draw_vectors(n: int, d: int, seed: int = 0) -> np.ndarray:
    """float32 (n, d), unit length, around 1,000 centres of uneven weight."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((1_000, d)).astype(np.float32)
    weights = random.exponential(size=1_000)
    members = random.choice(1_000, n, p=weights / weights.sum())
    vectors = random.standard_normal((n, d), dtype=np.float32)
    vectors *= 1.5
    for start in range(0, n, 100_000):
        vectors[start : start + 100_000] += centres[members[start : start + 100_000]]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    started = time.perf_counter()
    result = function()
    return round(time.perf_counter() - started, 2), result


def inertia(vectors: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest of ``centroids``."""
    blocks = np.array_split(vectors, max(1, len(vectors) // 50_000))
    return float(sum(faiss.knn(b, centroids, 1)[0].sum(dtype=np.float64) for b in blocks))


def against_scikit_learn() -> dict[str, Any]:
    """200,000 × 576 into 256 clusters: time and inertia of four ways."""
    vectors, k = draw_vectors(200_000, 576), 256

    def sampled() -> np.ndarray:
        found = fit_in_memory(vectors[: 160 * k], k, FitOptions(max_iterations=15)).centroids
        NearestCentroids(found).nearest(vectors)
        return found

    ways: dict[str, Callable[[], np.ndarray]] = {
        "shoal_sample": sampled,
        "shoal_all": lambda: fit_in_memory(vectors, k, FitOptions()).centroids,
        "minibatch_kmeans": lambda: (
            MiniBatchKMeans(k, n_init=1, random_state=0).fit(vectors).cluster_centers_
        ),
        "kmeans": lambda: KMeans(k, n_init=1, random_state=0).fit(vectors).cluster_centers_,
    }
    rows = {}
    for name, way in ways.items():
        seconds, centroids = timed(way)
        rows[name] = {
            "seconds": seconds,
            "inertia": inertia(vectors, centroids.astype(np.float32)),
        }
        print(name, rows[name], flush=True)
    return rows


def assign_blocks(vectors: np.ndarray, centroids: np.ndarray) -> None:
    """Assign all rows, a block at a time."""
    nearest = NearestCentroids(centroids)
    for start in range(0, len(vectors), 65_536):
        nearest.assign(vectors[start : start + 65_536])


def growth() -> dict[str, Any]:
    """Seconds to fit 256 clusters on all n × 128 vectors (10 iterations) and to assign them."""
    rows = {}
    vectors = draw_vectors(2_000_000, 128)
    for n in (100_000, 400_000, 2_000_000):
        options = FitOptions(max_iterations=10)
        fit_seconds, fit = timed(partial(fit_in_memory, vectors[:n], 256, options))
        assign_seconds, _ = timed(partial(assign_blocks, vectors[:n], fit.centroids))
        rows[str(n)] = {"fit_seconds": fit_seconds, "assign_seconds": assign_seconds}
        print(n, rows[str(n)], flush=True)
    return rows


def two_levels() -> dict[str, Any]:
    """10,000 clusters of 400,000 × 128 vectors, directly and in two levels, 10 iterations."""
    vectors, rows = draw_vectors(400_000, 128), {}
    for name, two_level in (("two_levels", True), ("direct", False)):
        options = FitOptions(two_level=two_level, max_iterations=10)
        seconds, fit = timed(partial(fit_in_memory, vectors, 10_000, options))
        rows[name] = {"seconds": seconds, "inertia": fit.inertia}
        print(name, rows[name], flush=True)
    return rows


def on_disk() -> dict[str, Any]:
    """2 million × 128 from Parquet: fit on all (5 iterations) and assign; memory a process."""
    n, d, k = 2_000_000, 128, 256
    with tempfile.TemporaryDirectory() as folder:
        for i in range(8):
            part = draw_vectors(n // 8, d, seed=i)
            ids = np.arange(i * len(part), (i + 1) * len(part))
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), d)
            pq.write_table(
                pa.table({"id": ids, "embedding": column}),
                f"{folder}/{i}.parquet",
                row_group_size=50_000,
            )
        start = fit_in_memory(part[:20_000], k, FitOptions(max_iterations=5))
        source = open_vectors(folder, Columns())
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        reading, vectors = timed(
            lambda: RayVectors(source, count=n, largest=1.0, num_workers=2, num_cpus=1)
        )
        seconds, fit = timed(
            lambda: refine_on_all(vectors, start, FitOptions(max_iterations=5), keep_order=False)
        )
        holders = vectors.peak_memory_bytes()
        vectors.close()
        plan = CensusPlan((k,), 5, n, 4.0)

        @ray.remote(num_cpus=1)
        def assign(shards: list[Any]) -> int:
            for shard in shards:
                path = f"{folder}/out/{shard.name}.parquet"
                assign_shard(source, shard, {k: fit.centroids}, plan, path, seed=0)
            return peak_memory()

        assigning, peaks = timed(
            lambda: ray.get([assign.remote(source.shards[i::2]) for i in range(2)])
        )
        ray.shutdown()
    row = {
        "fit_seconds_with_reading": round(reading + seconds, 2),
        "assign_seconds": assigning,
        "fit_peak_bytes_a_process": max(holders),
        "assign_peak_bytes_a_process": max(peaks),
    }
    print(row, flush=True)
    return row


def peak_memory() -> int:
    """Most resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "on_disk": on_disk,
    "growth": growth,
    "two_levels": two_levels,
    "against_scikit_learn": against_scikit_learn,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=PARTS)
    only = parser.parse_args().only
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["machine"] = {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "faiss": faiss.__version__,
    }
    for name, part in PARTS.items():
        if only in (None, name):
            print(f"== {name}", flush=True)
            found[name] = part()
            found[name]["load_average"] = os.getloadavg()[0]
            RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
