"""What a night costs: ``python benchmarks/reindex.py``.

A first night over 20,000 documents, a night in which nothing changed, one in which ten documents
were deleted, so that it publishes and embeds nothing, and one in which 1% changed (half of it
changed texts, the rest new and deleted documents), each a process as cron would start it. The model
is random and tiny, with enough layers that embedding is most of a full run, as it is with any real
one. ``--documents 100000 --files 50 --layers 2 --width 32 --clusters 50`` is a night of which
embedding is the smallest part; what changes lies in one file. ``--nights 30`` runs so many nights
of 1% with people's edits between them: who keeps the cluster, and what the disk holds in the end.
``--growth 200000 1000000`` has corpora that bring vectors of 32 numbers along, each in 50 files,
and tells what a night costs in which nothing changed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipelines.encoder.sources import PACKAGED_MODEL
from pipelines.store.store import Store

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
    parser.add_argument("--nights", type=int, default=0, help="nights of 1%% with edits, instead")
    parser.add_argument("--growth", type=int, nargs="*", default=(), metavar="DOCUMENTS")
    parser.add_argument("--folder", help="keep store and corpus here, for another run")
    parser.add_argument("--tree", nargs="*", default=[str(ROOT)], help="checkouts to compare")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(options.folder or name)
        if options.growth:
            write_results("growth", growth(folder, options.growth))
            return
        first = first_night(folder, options)
        if options.nights:
            report_nights(many_nights(folder, options), options)
            return
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


def many_nights(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Nights of 1% each with edits now and then: shares of untouched documents that stay."""
    after_the_first(folder)
    texts = {n: text_of(n) for n in range(options.documents)}
    draw, seconds = random.Random(0), []
    stayed: list[float] = []
    edited: list[float] = []
    before = clusters_of(folder)
    edits = {3: "name", 6: "merge", 9: "pin", 12: "split", 15: "forbid"}
    for number in range(1, options.nights + 1):
        if number in edits:
            edit(folder, edits[number], before, texts)
        changed = draw.sample(sorted(texts), options.documents // 100)
        for place, document in enumerate(changed):
            texts[document] = text_of(document, version=number)
            if place % 4 == 0:
                del texts[document]
                texts[options.documents + 1000 * number + place] = text_of(document, number)
        write_corpus(folder / "corpus", texts, options)
        time.sleep(2.5)
        seconds.append(night(folder, options, str(ROOT), "--accept", "drift")["process_seconds"])
        after, touched = clusters_of(folder), set(changed)
        both = [n for n in before if n in after and n not in touched]
        kept = sum(before[n] == after[n] for n in both) / len(both)
        (edited if number in edits else stayed).append(round(kept, 4))
        before = after
        print(f"night {number}: {kept:.2%} of the untouched stayed", flush=True)
    store = Store.open(str(folder / "store"))
    data = sum(batch.nbytes for batch in store.version().batches())
    disk = {"data_bytes": data, "disk_ratio_unpruned": bytes_below(folder / "store") / data}
    for keep in (7, 3):
        manage(folder, "prune", "--keep", str(keep))
        disk[f"disk_ratio_keep_{keep}"] = bytes_below(folder / "store") / data
    manage(folder, "verify")
    return {
        "nights": options.nights,
        "documents": options.documents,
        "night_seconds_median": statistics.median(seconds),
        "stayed_least": min(stayed),
        "stayed_mean": round(statistics.mean(stayed), 5),
        "stayed_in_nights_of_edits": edited,
        **{name: round(value, 3) for name, value in disk.items()},
    }


def edit(folder: Path, action: str, clusters: dict[int, int], texts: dict[int, str]) -> None:
    """What a person asks for: something of the two smallest clusters, or the largest is split."""
    sizes = Counter(clusters.values()).most_common()
    small, smaller, large = sizes[-2][0], sizes[-1][0], sizes[0][0]
    arguments: dict[str, list[Any]] = {
        "name": [large, "The largest"],
        "merge": [small, smaller],
        "pin": [min(texts), large],
        "split": [large],
        "forbid": [large, small],
    }
    manage(folder, "edit", f"--{action}", *map(str, arguments[action]))


def manage(folder: Path, *arguments: str) -> None:
    """One verb of ``manage_store.py``."""
    verb, *rest = arguments
    command = [sys.executable, str(ROOT / "jobs" / "manage_store.py"), verb]
    subprocess.run([*command, "--store", str(folder / "store"), *rest], check=True)


def clusters_of(folder: Path) -> dict[int, int]:
    """Cluster of each document of the published version."""
    batches = Store.open(str(folder / "store")).version().batches(["id", "cluster_id"])
    table = pa.Table.from_batches(batches)
    return dict(zip(table["id"].to_pylist(), table["cluster_id"].to_pylist(), strict=True))


def bytes_below(folder: Path) -> int:
    """Size of every file."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report_nights(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table and write the JSON."""
    table = Table("figure", "value", title="Nights of 1% with edits", title_justify="left")
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)
    write_results(f"{options.nights} nights", found)


def write_results(kind: str, found: dict[str, Any]) -> None:
    """Put what was found into the JSON."""
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results[kind] = found
    RESULT.write_text(json.dumps(results, indent=2) + "\n")


def growth(folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """CPU and whole seconds of a night in which nothing changed, by number of documents."""
    table = Table("documents", "night", "CPU s", "seconds")
    found: dict[str, Any] = {}
    for count in counts:
        corpus, store = folder / f"corpus-{count}", folder / f"store-{count}"
        draw = np.random.default_rng(0)
        corpus.mkdir()
        for number, ids in enumerate(np.array_split(np.arange(count), 50)):
            vectors = draw.standard_normal((len(ids), 32), dtype=np.float32)
            rows = {"id": ids, "text": [text_of(n) for n in ids.tolist()]}
            column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), 32)
            pq.write_table(pa.table({**rows, "v": column}), corpus / f"part-{number:03d}.parquet")
        time.sleep(2.5)
        command = [
            sys.executable, f"{ROOT}/jobs/nightly_reindex.py", "--corpus", str(corpus),
            "--store", str(store), "--vector-column", "v", "--vectors-of", "drawn",
            "--num-clusters", "50",
        ]  # fmt: skip
        for night_name in ("first", *["nothing changed"] * 3):
            before, started = os.times(), time.monotonic()
            subprocess.run(command, check=True)
            after, seconds = os.times(), time.monotonic() - started
            cpu = sum(after[2:4]) - sum(before[2:4])
            row = {"cpu_seconds": round(cpu, 2), "seconds": round(seconds, 2)}
            best = found.setdefault(str(count), {}).get(night_name, row)
            found[str(count)][night_name] = min(row, best, key=lambda r: r["cpu_seconds"])
        for night_name, row in found[str(count)].items():
            table.add_row(f"{count:,}", night_name, *map(str, row.values()))
    Console().print(table)
    return found


def after_the_first(folder: Path) -> None:
    """Corpus and store as they were after the first night."""
    for name in ("corpus", "store"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "first" / name, folder / name)


def later_nights(folder: Path, options: argparse.Namespace, tree: str) -> dict[str, dict[str, Any]]:
    """Records of the nights after the first, by name."""
    after_the_first(folder)
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


def night(folder: Path, options: argparse.Namespace, tree: str, *more: str) -> dict[str, Any]:
    """Run one night as a process of its own; its record, and the process's seconds."""
    model = PACKAGED_MODEL if options.packaged else make_model(folder, options)
    command = [
        sys.executable, f"{tree}/jobs/nightly_reindex.py", "--corpus", str(folder / "corpus"),
        "--store", str(folder / "store"), "--model", model,
        "--num-clusters", str(options.clusters), "--dtype", "float32",
        "--max-tokens", MAX_TOKENS["packaged" if options.packaged else "tiny"], *more,
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
    write_results(kind, {"documents": options.documents, "nights": rows})


if __name__ == "__main__":
    main()
