"""The store of 100,000 vectors: search, its index against FAISS, and thirty nights of 1%.

Run ``python benchmarks/search_store.py``; figures go to ``benchmarks/results/search_store.json``.
Vectors (576 numbers) are drawn around 300 centres in 64 uneven directions, as those of texts lie,
and scaled to length 1; queries are drawn alike and are no documents. A night changes 500 documents,
adds 250 and deletes 250, and in the end the last version is compared with the first. A million of
384: ``--documents 1000000 --dimension 384 --nights 1 --no-faiss``.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import faiss
import numpy as np
import peak_memory  # type: ignore[import-not-found]
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines.store.candidate import Candidate
from pipelines.store.columns import document_schema
from pipelines.store.documents import assign_fragment
from pipelines.store.index import find_words, fuse
from pipelines.store.lease import Lease
from pipelines.store.store import Store
from pipelines.store.verify import verify_store
from pipelines.store.version import Version

RESULTS = Path(__file__).parent / "results" / "search_store.json"
DIMENSION, DIRECTIONS, CENTRES, QUERIES, NEIGHBOURS = 576, 64, 300, 500, 10
SCHEMA = document_schema(pa.string(), {"label": pa.string()}, DIMENSION, pa.float32(), "00" * 32)
START = datetime(2026, 1, 1, 3, tzinfo=UTC)


def set_dimension(dimension: int) -> None:
    """Numbers of a vector, from here on."""
    global DIMENSION, SCHEMA
    DIMENSION = dimension
    SCHEMA = document_schema(
        pa.string(), {"label": pa.string()}, dimension, pa.float32(), "00" * 32
    )


def draw_vectors(count: int, seed: int) -> np.ndarray:
    """float32 (n, 576), unit length."""
    shape = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(DIRECTIONS, dtype=np.float32))
    directions = shape.standard_normal((DIRECTIONS, DIMENSION), dtype=np.float32) * scale[:, None]
    centres = shape.standard_normal((CENTRES, DIRECTIONS), dtype=np.float32)
    random = np.random.default_rng(seed)
    places = centres[random.integers(0, CENTRES, count)]
    places = places + 0.7 * random.standard_normal((count, DIRECTIONS), dtype=np.float32)
    vectors = places @ directions
    vectors += 0.05 * random.standard_normal((count, DIMENSION), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def documents(first: int, count: int, seed: int) -> pa.Table:
    """Documents ``d<first>``… with texts of about 400 characters."""
    vectors = draw_vectors(count, seed)
    random = np.random.default_rng(seed)
    words = random.integers(0, 30_000, (count, 60))
    texts = [" ".join(f"w{word}" for word in row) for row in words]
    return pa.table(
        {
            "id": [f"d{number}" for number in range(first, first + count)],
            "text": texts,
            "label": [f"label {number % 20}" for number in range(first, first + count)],
            "text_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMENSION),
        }
    )


def assign(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A stand-in for clustering: two columns for every row, as a night writes them."""
    found = vectors[:, :32]
    return found.argmax(axis=1).astype(np.int32), found.max(axis=1)


def bytes_below(folder: str) -> int:
    """Size of every file."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def finish(store: Store, lease: Lease, candidate: Candidate) -> Version:
    """Assignments, index, record, publication."""
    assigned = [assign_fragment(ref, assign) for ref in candidate.fragments()]
    candidate.set_assignments(assigned)
    candidate.update_index()
    version = candidate.seal(counts={}, scores={})
    store.publish(version.number, lease)
    return version


def build(store: Store, folder: str, count: int) -> tuple[float, Version]:
    """The first version, from files of 10,000 documents; (seconds, version)."""
    files = []
    for number, first in enumerate(range(0, count, 10_000)):
        path = f"{folder}/documents-{number}.parquet"
        pq.write_table(documents(first, min(10_000, count - first), 1 + number), path)
        files.append(path)
    started = time.perf_counter()
    with store.take_lease("benchmark") as lease:
        candidate = store.begin(lease)
        candidate.replace(files, schema=SCHEMA, when=START)
        version = finish(store, lease, candidate)
    return time.perf_counter() - started, version


def read_vectors(version: Version) -> tuple[np.ndarray, list[str]]:
    """float32 (n, 576), and the ids."""
    parts, ids = [], []
    for batch in version.batches(["id", "embedding"]):
        parts.append(batch.column("embedding").flatten().to_numpy().reshape(-1, DIMENSION))
        ids += batch.column("id").to_pylist()
    return np.concatenate(parts), ids


def searched(version: Version, label: str) -> dict[str, Any]:
    """Milliseconds and recall of questions to a version, one at a time, after it is loaded."""
    vectors, ids = read_vectors(version)
    queries = draw_vectors(QUERIES, 10_000)
    labelled = np.array([int(row_id[1:]) % 20 == 3 for row_id in ids])
    rows = {"all": np.arange(len(ids)), "filter": np.flatnonzero(labelled)}
    started = time.perf_counter()
    version.load()
    load_seconds = time.perf_counter() - started
    ways: dict[str, dict[str, Any]] = {}
    for way, condition in (("all", None), ("filter", "label = 'label 3'")):
        seconds, found = [], 0
        mine = vectors[rows[way]]
        _, exact = faiss.knn(queries, mine, NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)
        for query, truth in zip(queries, rows[way][exact], strict=True):
            started = time.perf_counter()
            hits = version.search(query, NEIGHBOURS, filter=condition)
            seconds.append(time.perf_counter() - started)
            found += len({ids[row] for row in truth} & set(hits["id"].to_pylist()))
        ways[way] = {
            "p50_ms": round(float(np.median(seconds)) * 1000, 2),
            "p95_ms": round(float(np.quantile(seconds, 0.95)) * 1000, 2),
            "recall_at_10": round(found / exact.size, 4),
        }
    return {"version": label, "load_seconds": round(load_seconds, 3), **ways}


class Words:
    """What BM25 says of texts of equally many words, from lists of who has which."""

    def __init__(self, version: Version) -> None:
        table = pa.Table.from_batches(version.batches(["id", "text"]))
        self.ids = table["id"].to_pylist()
        words = np.array([[int(w[1:]) for w in t.split()] for t in table["text"].to_pylist()])
        rows = np.repeat(np.arange(len(words)), words.shape[1])
        order = np.argsort(words.ravel(), kind="stable")
        self.rows, self.bounds = rows[order], np.searchsorted(words.ravel()[order], range(30_001))

    def scores(self, question: list[int]) -> np.ndarray:
        """float64 (n,): k1 1.2 and b 0.75, as Lance has them."""
        total = np.zeros(len(self.ids))
        for word in question:
            mine = self.rows[self.bounds[word] : self.bounds[word + 1]]
            rows, often = np.unique(mine, return_counts=True)
            rarity = np.log((len(total) - len(rows) + 0.5) / (len(rows) + 0.5) + 1)
            total[rows] += rarity * often * 2.2 / (often + 1.2)
        return total


def searched_by_words(store: Store) -> list[dict[str, Any]]:
    """Words, and words with vectors: milliseconds and recall against ranking all documents."""
    with store.take_lease("benchmark") as lease:
        candidate = store.begin(lease)
        started = time.perf_counter()
        candidate.update_index(full_text=True)
        seconds = time.perf_counter() - started
        version = candidate.seal(counts={}, scores={})
    version.load()
    words, random = Words(version), np.random.default_rng(5)
    vectors, ids = read_vectors(version)
    place, names = {row_id: row for row, row_id in enumerate(ids)}, np.array(ids)
    ways: dict[str, tuple[list[float], list[float]]] = {"words": ([], []), "hybrid": ([], [])}
    for query in draw_vectors(100, 10_000):
        question = random.choice(30_000, 3, replace=False).tolist()
        text = " ".join(f"w{word}" for word in question)
        scores = words.scores(question)
        started = time.perf_counter()
        found = find_words(version.documents, text, NEIGHBOURS)
        ways["words"][0].append(time.perf_counter() - started)
        least = np.sort(scores)[-NEIGHBOURS]
        ways["words"][1].append(np.mean([scores[place[i]] >= least - 1e-6 for i in found]))
        ranked = np.lexsort((names, -np.round(scores, 4)))[:100]  # of equals the lesser id first
        worded = ranked[scores[ranked] > 0]
        near = np.argsort(-(vectors @ query))[:100]
        best = {i for i, _ in fuse([[words.ids[r] for r in rows] for rows in (near, worded)], 10)}
        started = time.perf_counter()
        hits = version.search_hybrid(query, text, NEIGHBOURS)["id"].to_pylist()
        ways["hybrid"][0].append(time.perf_counter() - started)
        ways["hybrid"][1].append(len(best & {*hits}) / NEIGHBOURS)
    return [
        {
            "kind": way,
            "p50_ms": round(float(np.median(times)) * 1000, 2),
            "p95_ms": round(float(np.quantile(times, 0.95)) * 1000, 2),
            "recall_at_10": round(float(np.mean(recalls)), 4),
            "index_seconds": round(seconds, 1),
        }
        for way, (times, recalls) in ways.items()
    ]


def against_faiss(version: Version, night: np.ndarray) -> list[dict[str, Any]]:
    """A FAISS index of the same kind: training, a night's change, its file, searching."""
    vectors, _ = read_vectors(version)
    queries = draw_vectors(QUERIES, 10_000)
    _, exact = faiss.knn(queries, vectors, NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)
    rows = []
    for kind in ("IVF316,SQ8", "IVF316,Flat"):
        started = time.perf_counter()
        index = faiss.index_factory(DIMENSION, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[:: max(1, len(vectors) // 40_000)])
        index.add(vectors)
        train_seconds = time.perf_counter() - started
        faiss.extract_index_ivf(index).nprobe = 16
        seconds, found = [], 0
        for query, truth in zip(queries, exact, strict=True):
            started = time.perf_counter()
            _, hits = index.search(query[None], NEIGHBOURS)
            seconds.append(time.perf_counter() - started)
            found += len(set(truth) & set(hits[0]))
        started = time.perf_counter()
        index.remove_ids(faiss.IDSelectorRange(0, len(night)))
        index.add_with_ids(night, np.arange(len(vectors), len(vectors) + len(night)))
        with tempfile.NamedTemporaryFile() as file:
            faiss.write_index(index, file.name)
            written = Path(file.name).stat().st_size
        rows.append(
            {
                "index": f"FAISS {kind}",
                "train_seconds": round(train_seconds, 2),
                "night_seconds": round(time.perf_counter() - started, 2),
                "night_bytes": written,
                "p50_ms": round(float(np.median(seconds)) * 1000, 2),
                "recall_at_10": round(found / exact.size, 4),
            }
        )
    return rows


def run_nights(store: Store, count: int, nights: int) -> dict[str, Any]:
    """Nights of 1%: how long each took, the recall it measured, and the disk after pruning."""
    seconds, recalls, index_seconds, trained = [], [], [], 0
    quarter = count // 400
    for night in range(1, nights + 1):
        changed = documents(2 * quarter * night, 2 * quarter, 1000 + night)
        new = documents(count + quarter * night, quarter, 2000 + night)
        gone = [f"d{count // 2 + quarter * night + place}" for place in range(quarter)]
        started = time.perf_counter()
        with store.take_lease("benchmark") as lease:
            candidate = store.begin(lease)
            batches = [*changed.to_batches(), *new.to_batches()]
            candidate.upsert(batches, schema=SCHEMA, when=START + timedelta(days=night))
            candidate.delete([pa.array(gone)])
            version = finish(store, lease, candidate)
        seconds.append(time.perf_counter() - started)
        report = version.record.index or {}
        recalls.append(report["recall_at_10"])
        index_seconds.append(report["seconds"])
        trained += report["trained"]
    found: dict[str, Any] = {
        "nights": nights,
        "seconds_median": round(float(np.median(seconds)), 2),
        "seconds_most": round(max(seconds), 2),
        "index_seconds_median": round(float(np.median(index_seconds)), 2),
        "trained_anew": trained,
        "least_recall": min(recalls),
    }
    vectors, _ = read_vectors(store.version())
    texts = sum(b.nbytes for b in store.version().batches(["id", "text", "label", "text_sha256"]))
    found["data_bytes"] = vectors.nbytes + texts
    del vectors
    found |= compared(store)
    found["disk_bytes_unpruned"] = bytes_below(store.uri)
    for keep in (7, 3, 1):
        with store.take_lease("benchmark") as lease:
            store.prune(lease, keep)
        found[f"disk_bytes_keep_{keep}"] = bytes_below(store.uri)
        found[f"disk_ratio_keep_{keep}"] = round(bytes_below(store.uri) / found["data_bytes"], 3)
    return found


def compared(store: Store) -> dict[str, float]:
    """Seconds and memory of a comparison of the last version with the first, in its own process."""
    first, last = store.versions()[0].number, store.version().number
    job = RESULTS.parents[2] / "jobs" / "manage_store.py"
    which = ["--store", store.uri, "--version", str(last), "--with", str(first), "--json"]
    command = [sys.executable, peak_memory.__file__, str(job), "compare", *which]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"the comparison failed: {done.stderr}")
    return {
        "compare_seconds": round(seconds, 1),
        "compare_peak_gib": round(int(done.stderr.splitlines()[-1]) / 2**30, 2),
    }


def first_index(store: Store, version: Version) -> dict[str, Any]:
    """The store's own index, in the columns of :func:`against_faiss`."""
    report = version.record.index or {}
    files = bytes_below(f"{store.uri}/documents.lance/_indices")
    return {"index": f"Lance {report['kind']}", "bytes": files, **report}


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """One column a key of the first row."""
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in rows[0]))
    Console(width=140).print(table)


def main() -> None:
    """Run everything and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=DIMENSION)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--no-faiss", action="store_true", help="only the store's own index")
    parser.add_argument("--folder", help="keep the first version here, for another run")
    arguments = parser.parse_args()
    set_dimension(arguments.dimension)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        store = Store.open_or_create(f"{folder}/store")
        build_seconds, version = 0.0, store.published()
        if version is None:
            build_seconds, version = build(store, folder, arguments.documents)
        first = searched(version, "first night")
        own = first_index(store, version)
        faiss_rows = []
        if not arguments.no_faiss:
            faiss_rows = against_faiss(version, draw_vectors(arguments.documents // 100, 77))
        nights = run_nights(store, arguments.documents, arguments.nights)
        last = searched(store.version(), f"after {arguments.nights} nights")
        worded = searched_by_words(store)
        problems = verify_store(store)
    content = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "documents": arguments.documents,
        "dimension": DIMENSION,
        "build_seconds": round(build_seconds, 2),
        "index": own,
        "search": [first, last],
        "words": worded,
        "faiss": faiss_rows,
        "nights": nights,
        "problems": problems,
    }
    print_table("search", [{k: json.dumps(v) for k, v in row.items()} for row in (first, last)])
    print_table("words", worded)
    print_table("the store's index", [own])
    if faiss_rows:
        print_table("FAISS", faiss_rows)
    print_table("nights of 1%", [{"figure": k, "value": v} for k, v in nights.items()])
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[f"{arguments.documents} x {arguments.dimension}"] = content
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
