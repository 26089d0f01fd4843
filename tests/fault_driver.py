"""A driver in a process of its own, which tests may kill: runs the embedding job on demand."""

import multiprocessing
import os
import signal
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import ray
import trivial_workers

from pipelines.embedding import job as embed
from pipelines.embedding import plan as work_plan
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.job import embed_corpus
from pipelines.runtime.run_record import RunRecord, read_run

# Not forked: a process that imported ray.data leaves its children one and the same random state, by
# which Ray's ids are drawn, and two of them on one node end each other.
CONTEXT = multiprocessing.get_context("spawn")


class Driver:
    """A child process connected to a Ray cluster."""

    def __init__(self, address: str) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, address), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, config: EmbedConfig, workers: str = "WORKERS") -> None:
        """Begin a run; :meth:`result` waits for it."""
        self.connection.send((asdict(config), workers))

    def finished(self, seconds: float) -> bool:
        """Whether the run ends within some time."""
        return self.connection.poll(seconds)

    def result(self, seconds: float = 120.0) -> Any:
        """The counts of the run that was started, or the error's text."""
        if not self.finished(seconds):
            raise TimeoutError("the run hangs")
        return self.connection.recv()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()


def serve(connection: Connection, address: str) -> None:
    """Run jobs as they are asked for; small shards, partitions and chunks."""
    embed.SHARD_BYTES = 16 << 10
    work_plan.PARTITION_BYTES = 48 << 10
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    while True:
        settings, workers = connection.recv()
        embed.WORKERS = getattr(trivial_workers, workers)
        config = EmbedConfig(**settings)
        record = RunRecord.of("embed_corpus", config, keep_complete=True)
        try:
            with record:
                embed_corpus(config, record)
            run = read_run(config.output)
            connection.send(run["counts"] if run else "no run.json")
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            connection.send(f"{type(error).__name__}: {error}")
