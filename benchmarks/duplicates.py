"""Near-duplicates among vectors with 5% planted copies: recall, precision, CPU time and memory.

Run ``python benchmarks/duplicates.py --documents 200000 --peers faiss``; figures go to
``benchmarks/results/duplicates.json``. The search's stages run one after the other in one process,
without Ray, so that its CPU time and memory are its own. ``--peers semhash`` needs the interpreter
of an environment with SemHash (``--semhash-python``), which is no dependency.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import faiss
import numpy as np
import pyarrow as pa
from peak_memory import peak_bytes  # type: ignore[import-not-found]
from rich.console import Console
from rich.table import Table

from cluster.duplicate_search import SearchPlan
from cluster.duplicates import exact_cosines
from cluster.vector_duplicates import search_vectors
from cluster.vectors import Columns, open_vectors
from pipelines.runtime import units

RESULTS = Path(__file__).parent / "results" / "duplicates.json"
SEMHASH = """
import json, sys, time
import numpy as np
from semhash import SemHash
vectors = np.load(sys.argv[1])
started = time.process_time()
hashed = SemHash.from_embeddings(vectors, [str(i) for i in range(len(vectors))], model=None)
result = hashed.self_deduplicate(threshold=float(sys.argv[2]))
seconds = time.process_time() - started
removed = [int(found.record) for found in result.filtered]
peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
json.dump({"cpu_seconds": seconds, "removed": removed, "peak_bytes": peak}, sys.stdout)
"""


def draw(documents: int, dimension: int, similarity: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 (n, d) around 200 centres, with a spectrum that falls as that of texts does.

    The last 5% are copies of the first, at cosines from ``similarity`` to 1, which come second.
    """
    random = np.random.default_rng(0)
    scale = ((1 + np.arange(dimension)) ** -0.5).astype(np.float32)
    centres = random.standard_normal((200, dimension), dtype=np.float32) * scale
    vectors = 0.8 * random.standard_normal((documents, dimension), dtype=np.float32) * scale
    vectors += centres[random.integers(0, 200, documents)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    copies = documents // 20
    noise = random.standard_normal((copies, dimension), dtype=np.float32) * scale
    noise -= np.einsum("ij,ij->i", noise, vectors[:copies])[:, None] * vectors[:copies]
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosines = random.uniform(similarity + 1e-4, 1, copies)[:, None].astype(np.float32)
    vectors[-copies:] = cosines * vectors[:copies] + np.sqrt(1 - cosines**2) * noise
    return vectors, exact_cosines(vectors[:copies], vectors[-copies:])


class _Here:
    """As much of a Ray dataset as stages use, in this process."""

    def __init__(self, rows: Iterator[pa.Table]) -> None:
        self._rows = rows

    def map_batches(self, function: Callable[..., Any], **_: Any) -> "_Here":
        return _Here(function(row) for row in self._rows)

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        return self._rows


def _units_here(found: dict[str, Any]) -> _Here:
    return _Here(pa.table({"name": [n], "unit": [json.dumps(u)]}) for n, u in found.items())


def run_own(path: str, similarity: float) -> dict[str, Any]:
    """This project's search."""
    units.unit_dataset = _units_here  # type: ignore[assignment]
    source = open_vectors(path, Columns())
    with tempfile.TemporaryDirectory() as work:
        started = time.process_time()
        found = search_vectors(source, SearchPlan(similarity), work)
        seconds = time.process_time() - started
        disk = sum(file.stat().st_size for file in Path(work).rglob("*") if file.is_file())
    assert found.checked is not None
    removed = np.flatnonzero(found.decisions.keepers >= 0)
    return {
        "cpu_seconds": seconds,
        "peak_bytes": peak_bytes(),
        "disk_bytes": disk,
        "removed": removed.tolist(),
        "keepers": found.decisions.keepers[removed].tolist(),
        "checked": found.checked.recall(found.decisions),
        "cells": found.cells,
    }


def run_faiss(path: str, similarity: float) -> dict[str, Any]:
    """Range search over IVF with as many cells, probing more until it finds 99% of the copies."""
    vectors = np.load(path)
    copies = len(vectors) // 20
    faiss.omp_set_num_threads(1)
    probes = 1
    started = time.process_time()
    k = int(2 * np.sqrt(len(vectors)))
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], k, faiss.METRIC_INNER_PRODUCT
    )
    index.train(vectors[: 40 * k])
    index.add(vectors)
    built = time.process_time() - started
    while True:
        index.nprobe = probes
        started = time.process_time()
        ends, _, found = index.range_search(vectors, similarity)
        seconds = built + time.process_time() - started
        rows = np.repeat(np.arange(len(vectors)), np.diff(ends.astype(np.int64)))
        removed = np.unique(rows[found < rows])
        if (removed >= len(vectors) - copies).sum() >= 0.99 * copies or probes >= k:
            break
        probes *= 2
    peak = peak_bytes()
    return {
        "cpu_seconds": seconds,
        "peak_bytes": peak,
        "removed": removed.tolist(),
        "probes": probes,
    }


def measure(name: str, path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contestant in a process of its own."""
    if name == "semhash":
        command = [arguments.semhash_python, "-c", SEMHASH, path, str(arguments.similarity)]
    else:
        told = ["--similarity", str(arguments.similarity)]
        command = [sys.executable, __file__, "--child", name, "--vectors", path, *told]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(found: dict[str, Any], vectors: np.ndarray, cosines: np.ndarray, least: float) -> None:
    """Add recall of the planted copies, and precision where keepers are named; drop the lists."""
    copies = len(vectors) // 20
    removed = np.array(found.pop("removed"), dtype=np.int64)
    planted = len(vectors) - copies + np.flatnonzero(cosines >= np.float32(least))
    found["removed"] = len(removed)
    found["recall"] = float(np.isin(planted, removed).mean())
    if "keepers" in found:
        keepers = np.array(found.pop("keepers"))
        near = exact_cosines(vectors[removed], vectors[keepers]) >= np.float32(least)
        kept = ~np.isin(keepers, removed)
        found["precision"] = float((near & kept).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[200_000])
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--similarity", type=float, default=0.95)
    parser.add_argument("--peers", nargs="*", choices=("faiss", "semhash"), default=[])
    parser.add_argument("--semhash-python", default=sys.executable)
    parser.add_argument("--child", choices=("own", "faiss"))
    parser.add_argument("--vectors")
    arguments = parser.parse_args()
    if arguments.child:
        run = {"own": run_own, "faiss": run_faiss}[arguments.child]
        print(json.dumps(run(arguments.vectors, arguments.similarity)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table = Table("documents", "search", "CPU s", "recall", "precision", "removed", "peak MiB")
    for documents in arguments.documents:
        vectors, cosines = draw(documents, arguments.dimension, arguments.similarity)
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "vectors.npy")
            np.save(path, vectors)
            for name in ("own", *arguments.peers):
                found = measure(name, path, arguments)
                judge(found, vectors, cosines, arguments.similarity)
                results[f"{name} {documents} x {arguments.dimension}"] = {
                    **found,
                    "similarity": arguments.similarity,
                }
                table.add_row(
                    f"{documents:,}", name, f"{found['cpu_seconds']:.1f}",
                    f"{found['recall']:.4f}", str(found.get("precision", "–")),
                    f"{found['removed']:,}", f"{found['peak_bytes'] / 2**20:,.0f}",
                )  # fmt: skip
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
