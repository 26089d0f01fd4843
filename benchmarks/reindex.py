"""What a night costs: ``python benchmarks/reindex.py``.

A first night over 20,000 documents, a night in which nothing changed, and one in which 1% did (half
of it changed texts, the rest new and deleted documents), each a process as cron would start it. The
model is random and tiny, with enough layers that embedding is most of a full run, as it is with any
real one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines.encoder.sources import PACKAGED_MODEL

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "reindex.json"
CHANGED = 0.01
# Tokens a text is cut at, by model: the packaged one takes a quarter of an hour at 48.
MAX_TOKENS = {"packaged": "48", "tiny": "256"}
WORDS = (
    "gravity",
    "satellite",
    "orbit",
    "goalkeeper",
    "league",
    "interest",
    "market",
    "flour",
    "milk",
)


def main() -> None:
    """Run the three nights and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--packaged", action="store_true", help="the packaged LLM: twenty minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(name)
        kind = "packaged" if options.packaged else "tiny"
        model = PACKAGED_MODEL if options.packaged else make_model(folder, options.layers)
        nights = measure(folder, options.documents, model, MAX_TOKENS[kind])
    report(nights, options.documents, kind)


def make_model(folder: Path, layers: int) -> str:
    """A random model that embeds slowly enough to resemble a real one."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny_model = importlib.import_module("tiny_models").tiny_model
    sizes = {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 384}
    return str(tiny_model(folder / "model", **sizes))


def measure(folder: Path, documents: int, model: str, max_tokens: str) -> dict[str, dict[str, Any]]:
    """Records of the nights by name."""
    texts = {n: text_of(n) for n in range(documents)}
    nights = {}
    for name in ("first", "nothing changed", "1% changed"):
        if name == "1% changed":
            change(texts, documents)
        corpus = write_corpus(folder / "corpus", texts)
        nights[name] = night(folder, corpus, model, max_tokens)
    return nights


def text_of(number: int, version: int = 0) -> str:
    """A text of about 60 words."""
    draw = random.Random(f"{number} {version}")
    topic = draw.sample(WORDS, 3)
    return f"{number} {version} " + " ".join(draw.choice(topic) for _ in range(60))


def change(texts: dict[int, str], documents: int) -> None:
    """Change, insert and delete documents in place, 1% in all."""
    count = int(documents * CHANGED)
    chosen = random.Random(0).sample(sorted(texts), count)
    for number in chosen[: count // 2]:
        texts[number] = text_of(number, version=1)
    for number in chosen[count // 2 : count * 3 // 4]:
        del texts[number]
    for number in range(documents, documents + count // 4):
        texts[number] = text_of(number)


def write_corpus(folder: Path, texts: dict[int, str]) -> str:
    """The corpus as one Parquet file in a folder."""
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": list(texts), "text": list(texts.values())})
    pq.write_table(table, folder / "part.parquet", row_group_size=2_000)
    return str(folder)


def night(folder: Path, corpus: str, model: str, max_tokens: str) -> dict[str, Any]:
    """Run one night as a process of its own; its record, and the process's seconds."""
    command = [
        sys.executable, str(ROOT / "jobs" / "nightly_reindex.py"), "--corpus", corpus,
        "--store", str(folder / "store"), "--model", model, "--num-clusters", "20",
        "--dtype", "float32", "--max-tokens", max_tokens,
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    seconds = time.monotonic() - started
    record = json.loads((folder / "store" / "_work" / "run.json").read_text())
    return {"process_seconds": round(seconds, 2), **record}


def report(nights: dict[str, dict[str, Any]], documents: int, model: str) -> None:
    """Print the table and write the JSON."""
    table = Table(title=f"Nights over {documents:,} documents, {model} model", title_justify="left")
    for column in ("night", "embedded", "embedding s", "whole s", "of the first"):
        table.add_column(column)
    first = nights["first"]
    rows = {}
    for name, found in nights.items():
        embedding = found["metrics"].get("embed_seconds", 0.0)
        row = {
            "embedded": found["counts"]["embedded"],
            "embed_seconds": embedding,
            "process_seconds": found["process_seconds"],
            "share_of_embedding": round(embedding / first["metrics"]["embed_seconds"], 4),
            "share_of_total": round(found["process_seconds"] / first["process_seconds"], 4),
            "step_seconds": found["metrics"]["step_seconds"],
        }
        rows[name] = row
        shares = f"{row['share_of_embedding']:.1%} / {row['share_of_total']:.1%}"
        table.add_row(
            name,
            f"{row['embedded']:,}",
            f"{embedding:.1f}",
            f"{row['process_seconds']:.1f}",
            shares,
        )
    Console().print(table)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found[model] = {"documents": documents, "nights": rows}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
