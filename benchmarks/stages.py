"""What a core does in the stages beside the encoder: read, write, cluster.

Run ``python benchmarks/stages.py``; figures go to ``benchmarks/results/stages.json`` and into
``pipelines/sizing.py``. Documents have 1,000 characters, vectors are random and have 576 numbers,
as the packaged model's do; the stages are the jobs' own, with an encoder that only writes.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.clustering import ClusterConfig, choose_levels, find_source, fit_level, scan_corpus
from cluster.clustering import assign_corpus as assign
from pipelines.command_line import connect_ray
from pipelines.corpus import find_files
from pipelines.embed import EmbedConfig, assemble_settings, prepare_run, result_settings
from pipelines.embedding.dedup import assemble_corpus
from pipelines.embedding.results import write_result
from pipelines.embedding.scan import scan_corpus as scan_texts
from pipelines.embedding.vectors import write_vectors
from pipelines.sizing import MEASURED_CHARACTERS, MEASURED_CLUSTERS, MEASURED_NUMBERS
from pipelines.storage import make_folder

RESULTS = Path(__file__).parent / "results" / "stages.json"
CORES = 2


def write_corpus(folder: Path, documents: int) -> None:
    """Documents of random words, in files of 25,000."""
    random = np.random.default_rng(0)
    words = np.array([f"word{n:04d}" for n in range(5_000)])
    each = MEASURED_CHARACTERS // 9
    folder.mkdir()
    for start in range(0, documents, 25_000):
        ids = np.arange(start, min(documents, start + 25_000))
        texts = [" ".join(row) for row in words[random.integers(0, 5_000, (len(ids), each))]]
        pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"{start}.parquet")


def measure(folder: Path, documents: int) -> dict[str, Any]:
    """Seconds of each stage on :data:`CORES` cores."""
    write_corpus(folder / "corpus", documents)
    config = EmbedConfig(
        corpus=str(folder / "corpus"), output=str(folder / "out"), gpus_per_actor=0
    )
    seconds = {}
    started = time.perf_counter()
    run = prepare_run(config, find_files(config.corpus))
    run.plan.save(run.work)
    scanned = scan_texts(run.scan, run.files, skip_unreadable=False)
    assembled = assemble_corpus(assemble_settings(run, scanned))
    seconds["read"] = time.perf_counter() - started
    work = sum(path.stat().st_size for path in Path(run.work).rglob("*") if path.is_file())
    make_folder(f"{run.work}/vectors")
    random = np.random.default_rng(0)
    for chunk in assembled.chunks:
        vectors = random.standard_normal((chunk.texts, MEASURED_NUMBERS), dtype=np.float32)
        found = {"tokens": chunk.tokens, "padded_tokens": chunk.tokens, "failed": 0}
        write_vectors(run.work, chunk.name, vectors, np.ones(chunk.texts, dtype=bool), found)
    started = time.perf_counter()
    write_result(result_settings(run, scanned), assembled.chunks)
    seconds["write"] = time.perf_counter() - started
    clusters = ClusterConfig(
        embeddings=str(folder / "out" / "embeddings"), output=str(folder / "clusters"),
        num_clusters=str(MEASURED_CLUSTERS), fit="sample:20000",
    )  # fmt: skip
    source = find_source(clusters)
    scan = scan_corpus(source, clusters)
    assert choose_levels(scan, clusters) is None
    fits = {MEASURED_CLUSTERS: fit_level(source, scan, MEASURED_CLUSTERS, clusters)}
    started = time.perf_counter()
    scan_corpus(source, clusters)
    assign(source, scan, fits, clusters)
    seconds["cluster"] = time.perf_counter() - started
    return {
        "documents": documents,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "documents_a_core_second": {
            name: round(documents / value / CORES, 1) for name, value in seconds.items()
        },
        "work_bytes_a_document": round(work / documents, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--documents", type=int, default=200_000)
    documents = parser.parse_args().documents
    ray.init("local", num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    connect_ray()
    with tempfile.TemporaryDirectory(prefix="shoal-stages-") as folder:
        found = measure(Path(folder), documents)
    ray.shutdown()
    found["cores"] = CORES
    found["load_average"] = round(os.getloadavg()[0], 1)
    found["command"] = "python benchmarks/stages.py"
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
