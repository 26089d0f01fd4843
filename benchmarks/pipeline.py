"""What the embedding job costs beside the encoder, how it scales, and what memory it takes.

``python benchmarks/pipeline.py speed``   job against bare encoder, two 1-core actors against one,
                                          and two bare encoders against one: what the cores give
``python benchmarks/pipeline.py memory``  peak memory at 20,000 and 200,000 short documents
``python benchmarks/pipeline.py state``   keys of 20 million documents; resuming
``python benchmarks/pipeline.py passes``  what is written below ``_work/`` for 200,000 documents of
                                          1 KB; seconds to the first vectors and of the whole job
``python benchmarks/pipeline.py start``   seconds from the command to the first vectors of 1,000
                                          documents, and memory of an encoder actor then
``python benchmarks/pipeline.py windows`` padding of texts sorted within chunks, and within all

Each writes its figures into ``benchmarks/results/pipeline.json``. ``--model`` takes any model;
memory and passes want a tiny one, such as ``tests/tiny_models.py`` makes. With ``--tree FOLDER``
passes and start run another checkout's job too, in turns with this one's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch starts its threads; the jobs set the same for theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.embedding.write import Chunk
from pipelines.encoder.sources import PACKAGED_MODEL

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "pipeline.json"
# An eighth of what the job takes on a CPU, so that a corpus of minutes has some chunks an actor.
CHUNK_TOKENS = 4096
# Encoders or actors, and the cores of each.
SHAPES = {"1x2": (1, 2), "2x1": (2, 1), "1x1": (1, 1)}
WORDS = np.array(
    [
        "river",
        "stone",
        "market",
        "engine",
        "garden",
        "window",
        "letter",
        "winter",
        "orbit",
        "signal",
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "benchmark", choices=("speed", "memory", "state", "passes", "start", "windows")
    )
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--documents", type=int, default=0, help="0 is the benchmark's own number")
    parser.add_argument("--dtype", default="auto", help="memory: precision of the encoder")
    parser.add_argument("--rounds", type=int, default=2, help="repeats; of speed the best counts")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="speed")
    parser.add_argument(
        "--tree", help="passes, start: another checkout to run in turns with this one"
    )
    options = parser.parse_args()
    trees = [ROOT, *([Path(options.tree)] if options.tree else [])]
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        if options.benchmark == "speed":
            documents = options.documents or 900
            found = speed(Path(folder), options.model, documents, options.rounds, options.shapes)
        elif options.benchmark == "memory":
            sizes = (options.documents or 20_000, 10 * (options.documents or 20_000))
            found = memory(Path(folder), options.model, options.dtype, sizes)
        elif options.benchmark == "passes":
            documents = options.documents or 200_000
            found = passes(Path(folder), options.model, documents, trees, options.rounds)
        elif options.benchmark == "start":
            found = start(
                Path(folder), options.model, options.documents or 1_000, trees, options.rounds
            )
        elif options.benchmark == "windows":
            found = windows(options.model)
        else:
            found = state(Path(folder), options.documents or 20_000_000)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name = options.benchmark if options.dtype == "auto" else f"{options.benchmark}_{options.dtype}"
    if options.benchmark == "speed":  # its ratios vary from run to run: all are kept
        results.setdefault(name, []).append(found)
    else:
        results[name] = found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def speed(
    folder: Path, model: str, documents: int, rounds: int, shapes: list[str]
) -> dict[str, Any]:
    """Tokens a second of the bare encoder and of the job, each at work, taken in turns."""
    from pipelines.runtime.packaged import load_labelled_corpus

    table = load_labelled_corpus("20newsgroups", "test").slice(0, documents)
    pq.write_table(table, folder / "corpus.parquet")
    found: dict[str, list[float]] = {}
    startup = []
    for number in range(rounds):
        for name in shapes:
            actors, cpus = SHAPES[name]
            rate = bare_rate(folder / "corpus.parquet", model, actors, cpus)
            found.setdefault(f"bare_{name}", []).append(rate)
            done = FinishedChunks(folder / f"out-{name}-{number}")
            run = embed(
                folder / "corpus.parquet", done.output, model, done.look,
                "--num-actors", str(actors), "--cpus-per-actor", str(cpus),
                "--chunk-tokens", str(CHUNK_TOKENS), "--max-tokens", "64",
            )  # fmt: skip
            found.setdefault(f"job_{name}", []).append(done.steady_rate(actors))
            startup.append(run["seconds"] - run["metrics"]["embed_seconds"])
            startup[-1] += run["metrics"]["first_chunk_seconds"]
    best = {name: max(values) for name, values in found.items()}
    jobs, bare = ([best[f"{kind}_{name}"] for name in shapes] for kind in ("job", "bare"))
    compared = {}
    if {"1x1", "2x1"} <= {*shapes}:
        compared = {
            "two_actors_against_one": round(best["job_2x1"] / best["job_1x1"], 3),
            "two_bare_encoders_against_one": round(best["bare_2x1"] / best["bare_1x1"], 3),
        }
    return {
        "documents": documents,
        "chunk_tokens": CHUNK_TOKENS,
        "tokens_per_second": found,
        "job_against_bare": round(max(jobs) / max(bare), 3),
        "job_against_bare_alike": {
            name: round(best[f"job_{name}"] / best[f"bare_{name}"], 3) for name in shapes
        },
        **compared,
        "seconds_to_first_vectors": round(min(startup), 1),
    }


def bare_rate(corpus: Path, model: str, encoders: int, threads: int) -> float:
    """Tokens a second of encoders alone, each in its process, on all texts each, side by side."""
    command = [sys.executable, "-c", BARE, str(corpus), model, str(threads), str(encoders)]
    ready = corpus.with_name(f"ready-{time.monotonic_ns()}")
    ready.mkdir()
    processes = [
        subprocess.Popen([*command, str(ready)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(encoders)
    ]
    outputs = [process.communicate()[0] for process in processes]
    failed = [process.returncode for process in processes if process.returncode]
    if failed:
        raise RuntimeError(f"an encoder ended with code {failed[0]}; its own words are above")
    return round(sum(float(output.split()[-1]) for output in outputs), 1)


class FinishedChunks:
    """When the chunks of a running job were finished, and their tokens, by its files of vectors."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._found: dict[str, tuple[float, int]] = {}

    def look(self, process: int) -> None:
        """Note the files that are there, whatever the process; the job removes them at its end."""
        for path in self.output.glob("_work/vectors/*.parquet"):
            if path.stem not in self._found:
                with contextlib.suppress(FileNotFoundError):
                    chunk = Chunk(**json.loads(pq.read_metadata(path).metadata[b"shoal.chunk"]))
                    self._found[path.stem] = (path.stat().st_mtime, chunk.tokens)

    def steady_rate(self, actors: int) -> float:
        """Tokens a second while all actors had work.

        From the time on at which each has done about one chunk, until the first finds none left:
        a small corpus would count starting and running out, which a large one does not notice.
        Chunks that reach over either end count by their part between; one began when the one that
        was finished as many places before as there are actors was.
        """
        found = sorted(self._found.values())
        if len(found) <= 2 * actors:
            raise RuntimeError(f"{len(found)} chunks for {actors} actors: raise --documents")
        begin, end = found[actors - 1][0], found[-actors][0]
        done = 0.0
        for (started, _), (finished, tokens) in zip(found, found[actors:], strict=False):
            inside = min(finished, end) - max(started, begin)
            done += tokens * max(inside, 0.0) / (finished - started)
        return round(done / (end - begin), 1)


# Waits for its likes before it begins, so that all of them work at once; not for one that died.
BARE = """
import os, sys, time, pyarrow.parquet as pq
from pipelines.encoder.encoder import Encoder, EncoderConfig
corpus, model, threads, encoders, ready = sys.argv[1:]
texts = pq.read_table(corpus)["text"].to_pylist()
config = EncoderConfig(model=model, adapter=None, max_tokens=64)
encoder = Encoder.load(config, device="cpu", threads=int(threads))
encoder.encode(texts[:8])
encoder.stats.tokens = 0
open(os.path.join(ready, str(os.getpid())), "w").close()
deadline = time.monotonic() + 120
while len(os.listdir(ready)) < int(encoders):
    if time.monotonic() > deadline:
        sys.exit("the other encoder did not load within 120 s")
    time.sleep(0.01)
started = time.perf_counter()
encoder.encode(texts)
print(encoder.stats.tokens / (time.perf_counter() - started))
"""


def memory(folder: Path, model: str, dtype: str, sizes: tuple[int, int]) -> dict[str, Any]:
    """Peak memory of all the job's processes together (shared pages once), for two sizes."""
    peaks = []
    for size in sizes:
        path = folder / f"{size}.parquet"
        write_short_texts(path, size)
        flags = ("--num-actors", "2", "--dtype", dtype)
        peak = PeakMemory()
        embed(path, folder / f"out-{size}", model, peak.look, *flags)
        peaks.append(round(peak.mib))
    return {
        "documents": list(sizes),
        "dtype": dtype,
        "peak_mib": peaks,
        "growth": round(peaks[1] / peaks[0] - 1, 3),
    }


class PeakMemory:
    """The most memory that a running job's processes had together, in MiB."""

    def __init__(self) -> None:
        self.mib = 0.0

    def look(self, process: int) -> None:
        """Note what the process and all below it have now."""
        self.mib = max(self.mib, sum(map(proportional_mib, process_tree(process))))


def embed(
    corpus: Path,
    output: Path,
    model: str,
    look: Callable[[int], None],
    *flags: str,
    tree: Path = ROOT,
    pause: float = 1.0,
) -> dict[str, Any]:
    """Run the job as a process, calling ``look`` with its id after each pause; its run record."""
    command = [sys.executable, str(tree / "jobs" / "embed_corpus.py"), "--corpus", str(corpus)]
    command += ["--output", str(output), "--model", model, *flags]
    log = output.with_suffix(".log")
    with log.open("w") as stream:
        path = {**os.environ, "PYTHONPATH": str(tree)}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=tree, env=path)
        while process.poll() is None:
            look(process.pid)
            time.sleep(pause)
    if process.returncode:
        raise RuntimeError(log.read_text())
    return json.loads((output / "run.json").read_text())


def process_tree(root: int) -> list[int]:
    """Process ids of a process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def proportional_mib(pid: int) -> float:
    """Resident memory of a process, shared pages divided among those who share them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def write_short_texts(path: Path, count: int, repeats: float = 0.0, seed: int = 0) -> None:
    """Documents of a few words with integer ids, some of them repeated ids."""
    rng = np.random.default_rng(seed)
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 100_000):
            ids = np.arange(start, min(count, start + 100_000))
            again = rng.random(len(ids)) < repeats
            ids = np.where(again, rng.integers(0, count, len(ids)), ids)
            words = WORDS[rng.integers(0, len(WORDS), (len(ids), 3))]
            texts = [f"{a} {b} {c} {n}" for (a, b, c), n in zip(words, ids, strict=True)]
            writer.write_table(pa.table({"id": ids, "text": texts}, schema=schema))


def state(folder: Path, documents: int) -> dict[str, Any]:
    """Everything but the encoder at a large number of ids, and what going on then costs."""
    from pipelines.corpus.files import Columns, find_files
    from pipelines.corpus.readers import inspect_files
    from pipelines.embedding.keys import ScanSettings, SettleSettings, scan_corpus, settle_corpus
    from pipelines.embedding.plan import count_partitions
    from pipelines.runtime.command import connect_ray
    from pipelines.runtime.units import configure_ray_data

    write_short_texts(folder / "corpus.parquet", documents, repeats=0.001)
    files = inspect_files(
        find_files(str(folder / "corpus.parquet")), Columns(), shard_bytes=32 << 20
    )
    work = str(folder / "_work")
    settings = ScanSettings(
        work, Columns(), pa.schema([]), count_partitions(files),
        clip_characters=4096, max_tokens=256, prompt_tokens=12,
    )  # fmt: skip
    connect_ray()
    configure_ray_data()
    seconds = {}
    with PeakOfTree() as peak:
        for attempt in ("first", "again"):
            started = time.monotonic()
            scanned = scan_corpus(settings, files, skip_unreadable=False)
            scan = time.monotonic() - started
            flushes = tuple((shard, name) for shard, name in scanned.flushes)
            settled = settle_corpus(SettleSettings(settings, flushes, len(scanned.shards)))
            total = time.monotonic() - started
            seconds[attempt] = {"scan": round(scan, 1), "all": round(total, 1)}
    size = sum(path.stat().st_size for path in Path(work).rglob("*") if path.is_file())
    return {
        "documents": documents,
        "repeated_ids": settled.repeated_ids,
        "distinct": settled.distinct,
        "partitions": settings.partitions,
        "seconds": seconds,
        "work_mib": size >> 20,
        "peak_mib_largest_process": round(peak.largest),
        "peak_mib_driver": round(peak.driver),
    }


def passes(
    folder: Path, model: str, documents: int, trees: list[Path], rounds: int
) -> dict[str, Any]:
    """Bytes below ``_work/`` without vectors, and seconds, of checkouts' jobs in turns."""
    write_long_texts(folder / "long.parquet", documents)
    write_short_texts(folder / "short.parquet", documents)
    flags = ("--max-tokens", "32")
    found: dict[str, Any] = {}
    for number in range(rounds):
        for tree in trees:
            name = "this" if tree == ROOT else "other"
            mine = found.setdefault(name, {})
            for kind in ("long", "short"):
                look = WorkFolder(folder / f"{kind}-{name}-{number}")
                run = embed(
                    folder / f"{kind}.parquet", look.output, model, look.look, *flags,
                    tree=tree, pause=0.2,
                )  # fmt: skip
                seconds = round(time.time() - look.started, 1)
                assert run["counts"]["embedded"] == documents
                mine.setdefault(f"{kind}_seconds", []).append(seconds)
                mine.setdefault(f"{kind}_first_seconds", []).append(look.first)
                mine[f"{kind}_work_bytes_a_document"] = round(look.most_bytes / documents, 1)
    return {"documents": documents, **found}


def start(
    folder: Path, model: str, documents: int, trees: list[Path], rounds: int
) -> dict[str, Any]:
    """Seconds from the command to the first vectors, of checkouts' jobs in turns; then memory."""
    from pipelines.runtime.packaged import load_labelled_corpus

    corpus = folder / "corpus.parquet"
    pq.write_table(load_labelled_corpus("20newsgroups", "test").slice(0, documents), corpus)
    found: dict[str, Any] = {"documents": documents}
    for number in range(rounds):
        for tree in trees:
            mine = found.setdefault("this" if tree == ROOT else "other", {})
            output = folder / f"start-{len(mine)}-{tree.name}-{number}"
            command = [sys.executable, str(tree / "jobs" / "embed_corpus.py")]
            command += ["--corpus", str(corpus), "--output", str(output), "--model", model]
            began = time.time()
            with output.with_suffix(".log").open("w") as log:
                environment = {**os.environ, "PYTHONPATH": str(tree)}
                job = subprocess.Popen(command, stdout=log, stderr=log, cwd=tree, env=environment)
                while not any(output.glob("_work/vectors/[!.]*.parquet")):
                    if job.poll() is not None:
                        raise RuntimeError(output.with_suffix(".log").read_text())
                    time.sleep(0.05)
                mine.setdefault("first_seconds", []).append(round(time.time() - began, 1))
                sizes = [proportional_mib(process) for process in process_tree(job.pid)]
                mine["largest_process_mib"], mine["driver_mib"] = round(max(sizes)), round(sizes[0])
                job.terminate()
                job.wait()
    return found


def windows(model: str) -> dict[str, Any]:
    """Padding of batches whose texts are sorted by length within chunks, and within all texts.

    For models that run padded: the packed pass has none. Chunks in the corpus's order, as a job
    cuts them; batches of a CPU's and of a large GPU's budget.
    """
    from pipelines.encoder.description import EncoderConfig
    from pipelines.encoder.encoder import token_budget_batches
    from pipelines.encoder.tokenization import PromptedTokenizer
    from pipelines.runtime.packaged import load_labelled_corpus

    parts = [load_labelled_corpus("20newsgroups", part) for part in ("train", "test")]
    texts = pa.concat_tables(parts)["text"].to_pylist()
    lengths = [
        len(ids) for ids in PromptedTokenizer.load(EncoderConfig(model=model)).tokenize(texts)
    ]
    rows = []
    for budget, sizes in ((1024, (1 << 15, 0)), (1 << 16, (1 << 20, 0))):
        for size in sizes:
            ends = np.cumsum(lengths) // (size or sum(lengths) + 1)
            padded = batches = 0
            for chunk in range(int(ends[-1]) + 1):
                mine = [n for n, end in zip(lengths, ends, strict=True) if end == chunk]
                for batch in token_budget_batches(mine, budget):
                    padded += len(batch) * max(mine[i] for i in batch)
                    batches += 1
            waste = round(1 - sum(lengths) / padded, 4)
            full = round(sum(lengths) / (batches * budget), 4)
            rows.append(
                {
                    "batch_tokens": budget,
                    "chunk_tokens": size or "all",
                    "padding": waste,
                    "full": full,
                }
            )
    return {"texts": len(texts), "tokens": sum(lengths), "sorted_within": rows}


class WorkFolder:
    """How large ``_work/`` of a running job became without vectors, and when the first came."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.started = time.time()
        self.first = 0.0
        self.most_bytes = 0

    def look(self, process: int) -> None:
        """Note what is there now, whatever the process."""
        size = 0
        for path in (self.output / "_work").rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.parent.name == "vectors":
                    self.first = self.first or round(time.time() - self.started, 1)
                elif path.is_file():
                    size += path.stat().st_size
        self.most_bytes = max(self.most_bytes, size)


def write_long_texts(path: Path, count: int) -> None:
    """Documents of about 1 KB of made-up words, which do not compress to nothing."""
    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlu"))
    words = np.array(["".join(rng.choice(letters, 5)) for _ in range(5000)])
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 10_000):
            ids = np.arange(start, min(count, start + 10_000))
            picks = words[rng.integers(0, len(words), (len(ids), 170))]
            texts = [f"{n} {' '.join(row)}" for n, row in zip(ids, picks, strict=True)]
            writer.write_table(pa.table({"id": ids, "text": texts}, schema=schema))


class PeakOfTree:
    """Peak resident memory of this process and of the largest below it, sampled each second."""

    def __enter__(self) -> PeakOfTree:
        import threading

        self.largest = self.driver = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            mine, *others = process_tree(os.getpid())
            self.driver = max(self.driver, proportional_mib(mine))
            self.largest = max([self.largest, *map(proportional_mib, others)])


if __name__ == "__main__":
    main()
