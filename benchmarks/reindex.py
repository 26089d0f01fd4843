"""What a night costs: ``python benchmarks/reindex.py``.

A first night over 20,000 documents, a night in which nothing changed, one in which ten documents
were deleted, so that it publishes and embeds nothing, and one in which 1% changed (half of it
changed texts, the rest new and deleted documents), each a process as cron would start it. The model
is random and tiny, with enough layers that embedding is most of a full run, as it is with any real
one. ``--documents 100000 --files 50 --layers 2 --width 32 --clusters 50`` is a night of which
embedding is the smallest part; what changes lies in one file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
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
    parser.add_argument("--width", type=int, default=128, help="numbers of a vector")
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--packaged", action="store_true", help="the packaged LLM: twenty minutes")
    parser.add_argument("--folder", help="keep store and corpus here, for another run")
    parser.add_argument("--tree", nargs="*", default=[str(ROOT)], help="checkouts to compare")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(options.folder or name)
        first = first_night(folder, options)
        for tree in options.tree:
            report({"first": first, **later_nights(folder, options, tree)}, options, tree)


def make_model(folder: Path, options: argparse.Namespace) -> str:
    """A random model that embeds slowly enough to resemble a real one."""
    sys.path.insert(0, str(ROOT / "tests"))
    tiny_model = importlib.import_module("tiny_models").tiny_model
    width = options.width
    sizes = {"num_hidden_layers": options.layers, "hidden_size": width}
    if not (folder / "model").exists():
        tiny_model(folder / "model", intermediate_size=3 * width, **sizes)
    return str(folder / "model")


def first_night(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The record of the first night; store and corpus after it are kept in ``first/``."""
    kept = folder / "first"
    if not (kept / "night.json").exists():
        texts = {n: text_of(n) for n in range(options.documents)}
        write_corpus(folder / "corpus", texts, options)
        time.sleep(2.5)  # a file so young is read again
        found = night(folder, options, options.tree[0])
        for name in ("corpus", "store"):
            shutil.copytree(folder / name, kept / name)
        (kept / "night.json").write_text(json.dumps(found))
    return json.loads((kept / "night.json").read_text())


def later_nights(folder: Path, options: argparse.Namespace, tree: str) -> dict[str, dict[str, Any]]:
    """Records of the nights after the first, by name."""
    for name in ("corpus", "store"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "first" / name, folder / name)
    texts = {n: text_of(n) for n in range(options.documents)}
    nights = {}
    for name in ("nothing changed", "10 deleted", "1% changed"):
        if name == "10 deleted":
            for number in range(10):
                del texts[number]
        if name == "1% changed":
            change(texts, options)
        write_corpus(folder / "corpus", texts, options)
        time.sleep(2.5)
        nights[name] = night(folder, options, tree)
    return nights


def text_of(number: int, version: int = 0) -> str:
    """A text of about 60 words."""
    draw = random.Random(f"{number} {version}")
    topic = draw.sample(WORDS, 3)
    return f"{number} {version} " + " ".join(draw.choice(topic) for _ in range(60))


def change(texts: dict[int, str], options: argparse.Namespace) -> None:
    """Change texts in place, 1% in all: in one file, or with new and deleted documents where there
    is but one."""
    documents, file = options.documents, options.documents // options.files
    count = int(documents * CHANGED)
    chosen = random.Random(0).sample([n for n in sorted(texts) if n < file], count)
    for number in chosen if options.files > 1 else chosen[: count // 2]:
        texts[number] = text_of(number, version=1)
    if options.files == 1:
        for number in chosen[count // 2 : count * 3 // 4]:
            del texts[number]
        for number in range(documents, documents + count // 4):
            texts[number] = text_of(number)


def write_corpus(folder: Path, texts: dict[int, str], options: argparse.Namespace) -> None:
    """The corpus as Parquet files in a folder; those that are as they were are not touched."""
    folder.mkdir(exist_ok=True, parents=True)
    size = -(-options.documents // options.files)
    for number in range(options.files):
        last = 2 * options.documents if number == options.files - 1 else (number + 1) * size
        rows = {n: texts[n] for n in range(number * size, last) if n in texts}
        table = pa.table({"id": list(rows), "text": list(rows.values())})
        path = folder / f"part-{number:03d}.parquet"
        if not path.exists() or not pq.read_table(path).equals(table):
            pq.write_table(table, path, row_group_size=2_000)


def night(folder: Path, options: argparse.Namespace, tree: str) -> dict[str, Any]:
    """Run one night as a process of its own; its record, and the process's seconds."""
    model = PACKAGED_MODEL if options.packaged else make_model(folder, options)
    command = [
        sys.executable, f"{tree}/jobs/nightly_reindex.py", "--corpus", str(folder / "corpus"),
        "--store", str(folder / "store"), "--model", model,
        "--num-clusters", str(options.clusters), "--dtype", "float32",
        "--max-tokens", MAX_TOKENS["packaged" if options.packaged else "tiny"],
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": tree})
    seconds = time.monotonic() - started
    record = json.loads((folder / "store" / "_work" / "run.json").read_text())
    return {"process_seconds": round(seconds, 2), **record}


def report(nights: dict[str, dict[str, Any]], options: argparse.Namespace, tree: str) -> None:
    """Print the table and write the JSON."""
    model = "packaged" if options.packaged else "tiny"
    kind = model if options.files == 1 else f"{model}, {options.files} files"
    title = f"Nights over {options.documents:,} documents, {model} model, {tree}"
    table = Table(title=title, title_justify="left")
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
            "share_of_embedding": round(
                embedding / max(1e-9, first["metrics"]["embed_seconds"]), 4
            ),
            "share_of_total": round(found["process_seconds"] / first["process_seconds"], 4),
            "step_seconds": found["metrics"]["step_seconds"],
        }
        print(name, row["step_seconds"])
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
    if tree != str(ROOT):
        return
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found[kind] = {"documents": options.documents, "nights": rows}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
