"""Killed drivers, workers and nodes, a failing store, a full disk, poison: no row lost or doubled.

Two worker nodes with a pretend GPU each, on this machine. The workers have no model: a row's
vector is a digest of its text, so every row of every result is checked.
"""

import gzip
import json
import os
import random
import shutil
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from fault_driver import Driver
from trivial_workers import tokens_of, vector_of

from pipelines.embedding.config import EmbedConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DOCUMENTS = 1200
SEEDS = range(7)
# Of every kill: whether the run was still going, and which folders of unfinished work it had.
KILLS: list[tuple[bool, set[str]]] = []


@dataclass(frozen=True)
class Corpus:
    folder: Path
    texts: dict[int, str]
    rejected: int
    documents: int

    @property
    def counts(self) -> dict[str, int]:
        distinct = len(set(self.texts.values()))
        return {
            "documents": self.documents,
            "embedded": distinct,
            "rejected": self.rejected,
            "duplicates": len(self.texts) - distinct,
            "tokens": sum(len(tokens_of(text)) for text in set(self.texts.values())),
        }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Four Parquet files and two of JSON lines; repeats, repeated ids and bad rows among them."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = {n: f"text {n} " + "word " * rng.randint(0, 30) for n in range(DOCUMENTS)}
    for n in range(100, 200):
        texts[n] = texts[n - 100]
    rows = [{"id": n, "text": text} for n, text in texts.items()]
    rows += [{"id": DOCUMENTS + n, "text": None} for n in range(15)]
    rows += [{"id": n, "text": "its id is taken"} for n in range(5)]
    for number in range(4):
        part = rows[number::6] if number else [r for r in rows[0::6] if r["text"] is not None]
        table = pa.table({k: [r[k] for r in part] for k in ("id", "text")})
        pq.write_table(table, folder / f"a{number}.parquet", row_group_size=50)
    lost = [r for r in rows[0::6] if r["text"] is None]
    for number in (4, 5):
        part = rows[number::6] + (lost if number == 5 else [])
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"b{number}.jsonl").write_text(lines + "{broken\n")
    # of a repeated id the first in corpus order stays: its text may be the late one
    first: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        for row_id, text in read_rows(path):
            if text is not None:
                first.setdefault(row_id, text)
    return Corpus(folder, first, len(rows) + 2 - len(first), len(rows) + 2)


def read_rows(path: Path) -> list[tuple[int, str | None]]:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return list(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    found = [json.loads(line) for line in path.read_text().splitlines() if line != "{broken"]
    return [(row["id"], row["text"]) for row in found]


class Machines:
    """A Ray cluster of a head and two worker nodes with a pretend GPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": 200 << 20,
                "_system_config": quick,
            },
        )
        self.nodes = [self.add_node(), self.add_node()]
        self.idle: list[Driver] = []

    def take_driver(self) -> Driver:
        """A driver that is connected already, or a new one."""
        return self.idle.pop() if self.idle else Driver(self.cluster.address)

    def keep_ready(self) -> None:
        """Have a driver connect in the background, to be taken when another is killed."""
        if not self.idle:
            self.idle.append(Driver(self.cluster.address))

    def add_node(self):
        return self.cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=150 << 20)

    def kill_node(self, number: int) -> None:
        self.cluster.remove_node(self.nodes[number], allow_graceful=False)
        self.nodes[number] = self.add_node()

    def kill_worker(self, rng: random.Random) -> None:
        """kill -9 one of the processes in which tasks and actors run."""
        raylets = {
            node.all_processes["raylet"][0].process.pid for node in self.cluster.list_all_nodes()
        }
        workers = [pid for pid in children(raylets) if b"ray::Map" in command(pid)]
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)


def children(parents: set[int]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) in parents:
                found.append(int(entry.name))
    return sorted(found)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def machines():
    found = Machines()
    yield found
    for driver in found.idle:
        driver.kill()
    found.cluster.shutdown()


@pytest.fixture
def driver(machines):
    """A driver that outlives the test, which does not kill it."""
    found = machines.take_driver()
    yield found
    machines.idle.append(found)


@pytest.fixture
def config(tmp_path, corpus, tiny_model_folder) -> EmbedConfig:
    return EmbedConfig(
        corpus=str(corpus.folder),
        output=str(tmp_path / "out"),
        model=str(tiny_model_folder),
        chunk_tokens=1500,
    )


def check(config: EmbedConfig, corpus: Corpus, counts: object) -> None:
    """Every row is there once, with the vector of its text; the counts are the expected ones."""
    assert counts == corpus.counts
    filesystem, path = pafs.FileSystem.from_uri(config.output)
    table = pads.dataset(f"{path}/embeddings", filesystem=filesystem).to_table()
    assert sorted(table["id"].to_pylist()) == sorted(corpus.texts)
    vectors = dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    for row_id, text in corpus.texts.items():
        np.testing.assert_array_equal(vectors[row_id], vector_of(tokens_of(text)), str(row_id))
    lost = pads.dataset(f"{path}/rejected", filesystem=filesystem).to_table()
    assert len(lost) == corpus.rejected
    names = {info.base_name for info in filesystem.get_file_info(pafs.FileSelector(path))}
    assert names == {"embeddings", "rejected", "encoder.json", "run.json"}


def note_kill(config: EmbedConfig, finished: bool) -> None:
    work = Path(config.output, "_work")
    KILLS.append((not finished, {path.name for path in work.iterdir()} if work.exists() else set()))


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_driver_is_followed_by_one_that_finishes(seed, config, corpus, machines):
    rng = random.Random(seed)
    for _ in range(1 + seed % 2):
        killed = machines.take_driver()
        killed.start(config)
        machines.keep_ready()
        note_kill(config, killed.finished(rng.uniform(0.5, 7.0)))
        killed.kill()
    last = machines.take_driver()
    last.start(config)
    counts = last.result()
    machines.idle.append(last)
    check(config, corpus, counts)


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_workers_cost_no_row(seed, config, corpus, machines, driver):
    rng = random.Random(100 + seed)
    driver.start(config)
    for _ in range(3):
        note_kill(config, driver.finished(rng.uniform(0.3, 2.0)))
        machines.kill_worker(rng)
    check(config, corpus, driver.result())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_node_costs_no_row(seed, config, corpus, machines, driver):
    rng = random.Random(200 + seed)
    driver.start(config)
    note_kill(config, driver.finished(rng.uniform(0.3, 4.0)))
    machines.kill_node(rng.randrange(2))
    check(config, corpus, driver.result())


def test_the_kills_hit_runs_in_all_their_stages():
    """Of the tests above; run alone it has nothing to say."""
    if len(KILLS) < 20:
        pytest.skip("the tests above did not all run")
    hits = [stages for running, stages in KILLS if running]
    assert len(hits) > 0.7 * len(KILLS)
    assert any("vectors" in stages for stages in hits)
    assert any("vectors" not in stages for stages in hits)


class FailingStore:
    """A real S3 API server that answers 503 to everything, or to some requests, on demand."""

    def __init__(self, port: int) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.application = DomainDispatcherApplication(create_backend_app)
        self.failing_share = 0.0
        self.failed = 0
        self.rng = random.Random(0)
        self.server = make_server("127.0.0.1", port, self.answer, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, environ, start_response):
        if self.rng.random() < self.failing_share:
            self.failed += 1
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ServiceUnavailable</Code><Message>later</Message></Error>"]
        return self.application(environ, start_response)


@pytest.fixture(scope="module")
def store():
    import boto3

    found = FailingStore(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    boto3.client("s3").create_bucket(Bucket="shoal-faults")
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_store_that_fails_for_a_while_costs_no_row(config, corpus, driver, store):
    on_s3 = replace(config, output="s3://shoal-faults/out")
    driver.start(on_s3)
    driver.finished(4.0)
    store.failing_share = 1.0
    driver.finished(8.0)
    store.failing_share = 0.05
    counts = driver.result()
    store.failing_share = 0.0
    assert store.failed > 4
    check(on_s3, corpus, counts)


def test_a_full_disk_is_one_line_and_room_lets_the_run_go_on(config, corpus, driver, tmp_path):
    (tmp_path / "cramped").touch()
    driver.start(config, "CRAMPED_WORKERS")
    error = driver.result()
    assert isinstance(error, str)
    assert "no room to write" in error
    assert "run the same command again" in error
    assert not Path(config.output, "embeddings").exists()
    (tmp_path / "cramped").unlink()
    driver.start(config, "CRAMPED_WORKERS")
    check(config, corpus, driver.result())


def test_poisoned_files_among_good_ones(config, corpus, driver, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.folder, folder)
    good = (folder / "a1.parquet").read_bytes()
    (folder / "c0.parquet").write_bytes(good[: len(good) // 2])
    (folder / "c1.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1, "text": "x"}\n' * 9999)[:-30])
    (folder / "c2.csv.gz").touch()
    config = replace(config, corpus=str(folder))
    driver.start(config)
    error = driver.result()
    assert isinstance(error, str)
    assert "c0.parquet: it cannot be read" in error
    assert "(3 files cannot be read)" in error
    for path in folder.glob("c*"):
        path.unlink()
    driver.start(config)
    check(config, corpus, driver.result())
