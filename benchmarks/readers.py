"""Rows a second and core of reading a corpus, beside Ray Data's, datasets' and DuckDB's readers.

Run ``python benchmarks/readers.py``; figures go to ``benchmarks/results/readers.json``. Every
reader reads the same file in this process on one thread, and every row's text and id then pass
the same checks. CPU time is counted, not the clock, so that other work matters little.
``--single`` reads one gzip of as many GiB of JSON lines as it says, and notes the memory.
``--passages`` cuts this project's pages into passages, beside tokenizing them once.
"""

import argparse
import gzip
import itertools
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from peak_memory import forget_peak, peak_bytes  # type: ignore[import-not-found]
from ray.data import DataContext
from rich.console import Console
from rich.table import Table

from pipelines.corpus.documents import check_rows
from pipelines.corpus.files import Columns, find_files
from pipelines.corpus.passages import Cuts, cut_texts
from pipelines.corpus.readers import RowBatch, inspect_files, read_shard
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.tokenization import PromptedTokenizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "readers.json"
KINDS = ("jsonl.gz", "jsonl.zst", "parquet", "csv")
REPEATS = 3


def write_corpora(folder: Path, rows: int) -> None:
    """One corpus of ``rows`` documents of about 1 kB in every format."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(5000)]
    texts = [" ".join(generator.choices(words, k=120)) for _ in range(rows)]
    table = pa.table({"id": range(rows), "text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=10_000)
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "a.csv").write_text("id,text\n" + "".join(f"{n},{t}\n" for n, t in enumerate(texts)))


def check(ids: list[Any], texts: list[Any]) -> int:
    """Rows that pass the checks of :func:`check_rows`."""
    batch = RowBatch(texts=texts, ids=ids, problems=[None] * len(texts))
    return sum(row.reason is None for row in check_rows(batch))


def check_tables(tables: Iterator[pa.Table]) -> int:
    """The same for tables of ``id`` and ``text``."""
    return sum(check(t["id"].to_pylist(), t["text"].to_pylist()) for t in tables)


def read_ours(path: Path) -> int:
    """Shoal's readers."""
    columns = Columns()
    (file,) = inspect_files(find_files(str(path)), columns, shard_bytes=32 << 20)
    batches = itertools.chain.from_iterable(read_shard(shard, columns) for shard in file.shards())
    return sum(check(batch.ids or [], batch.texts) for batch in batches)


def read_ray(path: Path) -> int:
    """The read tasks of Ray Data's own datasources, called in this process."""
    from ray.data._internal.datasource import csv_datasource, json_datasource, parquet_datasource

    DataContext.get_current().enable_progress_bars = False
    if path.suffix == ".parquet":
        source: Any = parquet_datasource.ParquetDatasource(str(path), columns=["id", "text"])
    elif path.suffix == ".csv":
        source = csv_datasource.CSVDatasource(str(path))
    else:
        compression = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
        source = json_datasource.ArrowJSONDatasource(
            str(path), open_stream_args={"compression": compression}
        )
    return check_tables(pa.table(block) for task in source.get_read_tasks(1) for block in task())


def read_datasets(path: Path) -> int:
    """datasets, streaming."""
    kind = {".parquet": "parquet", ".csv": "csv"}.get(path.suffix, "json")
    data = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    return check_tables(iter(data.with_format("arrow").iter(batch_size=4096)))


def read_duckdb(path: Path) -> int:
    """DuckDB on one thread."""
    connection = duckdb.connect(config={"threads": 1})
    reader: Any = connection.execute(f"SELECT id, text FROM '{path}'").to_arrow_reader(4096)
    count = check_tables(pa.Table.from_batches([batch]) for batch in reader)
    connection.close()
    return count


READERS: dict[str, Callable[[Path], int]] = {
    "shoal": read_ours,
    "ray data": read_ray,
    "datasets": read_datasets,
    "duckdb": read_duckdb,
}


def compare(rows: int) -> dict[str, dict[str, Any]]:
    """Rows a CPU second of every reader on every kind, in turns; the median of three."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpora(folder, rows)
        for kind in KINDS:
            seconds: dict[str, list[float]] = {reader: [] for reader in READERS}
            failed: dict[str, str] = {}
            for _ in range(REPEATS):
                for reader, read in READERS.items():
                    started = time.process_time()
                    try:
                        count = read(folder / f"a.{kind}")
                    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
                        failed[reader] = f"{type(error).__name__}: {str(error)[:80]}"
                        continue
                    seconds[reader].append(time.process_time() - started)
                    assert count == rows, (reader, kind, count)
            rates: dict[str, Any] = {r: round(rows / median(s)) for r, s in seconds.items() if s}
            best = max(rate for reader, rate in rates.items() if reader != "shoal")
            found[kind] = {**rates, **failed, "of the best other": round(rates["shoal"] / best, 2)}
    return found


def read_single(gib: float) -> dict[str, float]:
    """One ``.json.gz`` of ``gib`` GiB unpacked, of a few hundred members that pack well."""
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    packed = gzip.compress(line * 20_000, 9)
    members = int(gib * (1 << 30) / (len(line) * 20_000)) + 1
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "a.json.gz")
        with path.open("wb") as file:
            for _ in range(members):
                file.write(packed)
        (seen,) = inspect_files(find_files(str(path)), Columns(), shard_bytes=32 << 20)
        forget_peak()
        before = peak_bytes()
        batches = itertools.chain.from_iterable(read_shard(s, Columns()) for s in seen.shards())
        rows = sum(len(batch.texts) for batch in batches)
    return {"gib": gib, "rows": rows, "memory_added_mib": (peak_bytes() - before) >> 20}


def cut_pages() -> dict[str, dict[str, float]]:
    """Characters a CPU second of tokenizing pages and of cutting them, the median of three."""
    reader = PromptedTokenizer.load(EncoderConfig(prompt="one-word"))
    texts = [path.read_text() for path in sorted(ROOT.glob("docs/*.md"))]
    ways: dict[str, Callable[[], Any]] = {
        "tokenize": lambda: reader.count(texts),
        "tokens:256, overlap 32": lambda: cut_texts(texts, Cuts(256, 32), reader),
        "sentences:256": lambda: cut_texts(texts, Cuts(256, sentences=True), reader),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):  # the first is to warm up
        for name, way in ways.items():
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
    size = sum(map(len, texts))
    best = median(seconds["tokenize"][1:])
    return {
        name: {
            "characters_a_cpu_second": round(size / median(some[1:])),
            "of_tokenizing": round(median(some[1:]) / best, 2),
        }
        for name, some in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--single", type=float, default=0.0, help="GiB of one .json.gz to read")
    parser.add_argument("--passages", action="store_true", help="cut pages into passages")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    if options.single:
        results["single"] = read_single(options.single)
    elif options.passages:
        results["passages"] = cut_pages()
        Console().print(results["passages"])
    else:
        results["rows_a_cpu_second"] = compare(options.rows)
        table = Table(*["kind", *READERS, "of the best other"], title="rows a CPU second")
        for kind, rates in results["rows_a_cpu_second"].items():
            table.add_row(kind, *[str(rates.get(r)) for r in [*READERS, "of the best other"]])
        Console().print(table)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
