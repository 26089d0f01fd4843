"""Kills in the middle of training, and fewer workers than asked for: nothing may change."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import SENTENCES, tiny_model

from pipelines.runtime.run_record import RunRecord
from pipelines.training.config import FinetuneConfig
from pipelines.training.job import finetune_adapter

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 120
_WORKER = re.compile(r"\(RayTrainWorker pid=(\d+)")
_STEP = re.compile(r"step (\d+) of \d+")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and pairs."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model(folder / "model")
    texts = [f"{first} {second}" for first in SENTENCES for second in SENTENCES]
    table = {"anchor": texts, "positive": [text[::-1] for text in texts], "id": range(len(texts))}
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    return folder


def settings(files):
    return {
        "model": str(files / "model"), "pairs": str(files / "pairs.parquet"), "max_steps": STEPS,
        "measure_every": 10, "batch_pairs": 16, "dtype": "float32", "heldout_pairs": 8,
        "lora_dropout": 0.1,
    }  # fmt: skip


class Training:
    """A run of the job in processes of its own, its output watched line by line."""

    def __init__(self, files, output, workers, *options):
        self.lines = []
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings(files).items()]
        command = [
            sys.executable, str(ROOT / "jobs/finetune_adapter.py"), *flags, "--output", output,
            "--num-workers", workers, *options,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_DEDUP_LOGS": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        }
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip

    def steps(self):
        return [int(m[1]) for line in self.lines if (m := _STEP.search(line))]

    def wait_for_step(self, step):
        for line in self.process.stdout:
            self.lines.append(line)
            if max(self.steps(), default=0) >= step:
                return
        raise AssertionError("".join(self.lines[-30:]))

    def finish(self):
        self.lines += self.process.stdout.read().splitlines(keepends=True)
        assert self.process.wait(timeout=60) == 0, "".join(self.lines[-30:])

    def kill_driver(self):
        """Kill the driver and what it started, as when its machine is lost."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        time.sleep(2)


def losses(output):
    rows = pq.read_table(output / "history.parquet").to_pylist()
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "out"
    config = FinetuneConfig(**settings(files), output=str(output), num_workers="0")
    with RunRecord(str(output), "finetune_adapter", asdict(config), keep_complete=True) as record:
        finetune_adapter(config, record)
    return losses(output)


def assert_same(found, unbroken):
    assert list(found) == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        assert found[step] == pytest.approx(unbroken[step], rel=1e-3), step


def test_killed_driver_goes_on_from_its_last_checkpoint(files, unbroken, tmp_path):
    output = tmp_path / "out"
    first = Training(files, output, "1")
    first.wait_for_step(35)
    first.kill_driver()
    second = Training(files, output, "1")
    second.finish()
    assert min(second.steps()) > 20
    assert_same(losses(output), unbroken)
    assert not (output / "_work").exists()


def test_killed_worker_is_replaced_and_training_goes_on(files, unbroken, tmp_path):
    output = tmp_path / "out"
    training = Training(files, output, "2", "--cpus-per-worker", "1")
    training.wait_for_step(35)
    workers = {int(m[1]) for line in training.lines if (m := _WORKER.search(line))}
    os.kill(max(workers), signal.SIGKILL)
    training.finish()
    assert_same(losses(output), unbroken)


def test_elastic_run_makes_do_with_the_workers_there_are(files, unbroken, tmp_path):
    output = tmp_path / "out"
    training = Training(files, output, "1:2", "--cpus-per-worker", "3")
    training.finish()
    assert any("rank 0 of 1 on" in line for line in training.lines)
    assert_same(losses(output), unbroken)
