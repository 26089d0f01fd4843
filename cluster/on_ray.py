"""Ray at the edge: shards to workers, and vectors on disk behind FAISS's assign seam."""

from __future__ import annotations

import functools
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext
from ray.util.metrics import Gauge

from cluster.lloyd import FixedPointSums, Totals, sum_by_cluster
from cluster.vectors import BLOCK_BYTES, Shard, VectorSource, read_blocks
from pipelines.runtime.machines import OFF_HEAD, find_nodes, need_ray
from pipelines.runtime.units import stream_units

START_SECONDS = 60.0
GROWTH_SECONDS = 180.0
"""The same where the Ray cluster can add nodes, which takes as long as a machine's start."""


class Travelling(Protocol):
    """A result that Arrow can carry from a worker to the driver."""

    def to_tables(self) -> dict[str, pa.Table]:
        """The result as named tables."""


def run_on_shards(
    function: Callable[[Shard], Travelling],
    shards: Sequence[Shard],
    *,
    num_workers: int,
    num_cpus: float,
    num_gpus: int = 0,
    stage: str = "",
) -> Iterator[dict[str, pa.Table]]:
    """``function(shard)`` for every shard, streamed by Ray Data over ``num_workers`` workers.

    Workers without a GPU are tasks: Ray keeps their processes for the stages to come.

    Yields the tables of each result as it comes, in no particular order. An exception of the
    function ends the run and arrives as it was raised. ``stage`` names the work in
    logs and metrics.
    """
    call = functools.partial(_do_shard, function, tuple(shards))
    how: dict[str, Any] = {"most_tasks": num_workers}
    if num_gpus:
        how = {"num_actors": num_workers, **_placement(num_gpus)}
    units = {shard.name: number for number, shard in enumerate(shards)}
    assert len(units) == len(shards)
    for batch in stream_units(stage, units, call, num_cpus=num_cpus, **how):
        yield {
            name: pa.ipc.open_stream(batch.column(name)[0].as_buffer()).read_all()
            for name in batch.column_names
            if batch.column(name)[0].is_valid
        }


def _do_shard(
    function: Callable[[Shard], Travelling], shards: Sequence[Shard], _: str, number: int
) -> pa.Table:
    tables = function(shards[number]).to_tables()
    return pa.table([_packed(table) for table in tables.values()], names=list(tables))


def _packed(table: pa.Table) -> pa.Array:
    """A whole table as one value of a binary column, not copied."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, content.size], dtype=np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])


class RayVectors:
    """All vectors of a source, behind the seam of FAISS's ``DatasetAssign``.

    Every actor reads its shards once, checks and scales them, and keeps them as raw float32 in an
    unnamed temporary file of its node: each iteration is then one read of that file, and memory
    holds a block at a time. A restarted actor reads its shards again.
    """

    def __init__(
        self,
        source: VectorSource,
        *,
        count: int,
        largest: float,
        num_workers: int,
        num_cpus: float,
        num_gpus: int = 0,
    ) -> None:
        """``count`` vectors, none with a coordinate beyond ``largest`` in size."""
        need_ray()
        self._shape = (count, source.dimension)
        self._largest = largest
        options = {"num_cpus": num_cpus, **_placement(num_gpus)}
        actor = ray.remote(max_restarts=3, max_task_retries=3, **options)(_VectorHolder)
        wanted = min(num_workers, len(source.shards))
        self._passes = 0
        self._passes_metric = Gauge("shoal_kmeans_passes", "Passes over all vectors in this fit")
        self._inertia_metric = Gauge("shoal_kmeans_inertia", "Sum of squared distances, last pass")
        self._actors = _started([actor.remote(source) for _ in range(wanted)])

    def count(self) -> int:
        """Number of vectors."""
        return self._shape[0]

    def dim(self) -> int:
        """Their dimension."""
        return self._shape[1]

    def assign_to(self, centroids: np.ndarray) -> Totals:
        """Assign every vector to its nearest centroid and add up, on all actors at once."""
        shared = ray.put(centroids)
        of = len(self._actors)
        waiting = [
            actor.assign_to.remote((number, of), shared, self._shape[0], self._largest)
            for number, actor in enumerate(self._actors)
        ]
        sums = FixedPointSums(centroids.shape, self._shape[0], self._largest)
        while waiting:
            ready, waiting = ray.wait(waiting)
            sums.merge(ray.get(ready[0]))
        totals = sums.totals(centroids)
        self._passes += 1
        self._passes_metric.set(self._passes)
        self._inertia_metric.set(totals.error)
        return totals

    def peak_memory_bytes(self) -> list[int]:
        """The most memory that each actor's process has held so far."""
        return ray.get([actor.peak_memory_bytes.remote() for actor in self._actors])

    def close(self) -> None:
        """Let the actors and their temporary files go."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class _VectorHolder:
    """One worker's vectors, on its node's disk."""

    def __init__(self, source: VectorSource) -> None:
        self._source = source
        self._dimension = source.dimension
        self._file: Any = None

    def ready(self) -> None:
        """Answers where the actor has its CPUs."""

    def assign_to(
        self, share: tuple[int, int], centroids: np.ndarray, count: int, largest: float
    ) -> FixedPointSums:
        """Sums over every ``share[1]``-th shard from ``share[0]`` on, which are read once."""
        if self._file is None:
            self._read(self._source.shards[share[0] :: share[1]])
        return sum_by_cluster(self._blocks(), centroids, count, largest)

    def _read(self, shards: Sequence[Shard]) -> None:
        file: Any = tempfile.TemporaryFile()  # noqa: SIM115
        for shard in shards:
            for block in read_blocks(self._source, shard, with_text=False):
                file.write(block.vectors.data)
        file.flush()
        self._file = file

    def peak_memory_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _blocks(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        numbers = max(1, BLOCK_BYTES // (4 * self._dimension)) * self._dimension
        while True:
            block = np.frombuffer(self._file.read(4 * numbers), dtype=np.float32)
            if not block.size:
                return
            yield block.reshape(-1, self._dimension)


def _selector() -> dict[str, str] | None:
    """Labels of the nodes that work may run on, as the job has set them for Ray Data."""
    return DataContext.get_current().execution_options.label_selector


def _placement(num_gpus: int) -> dict[str, Any]:
    """What Ray is told beside CPUs; work with GPUs goes where they are, off the head."""
    if num_gpus:
        return {"num_gpus": num_gpus, "label_selector": OFF_HEAD}
    return {"label_selector": _selector()}


def _started(actors: list[Any]) -> list[Any]:
    """Those actors for which the Ray cluster has room in good time, or as soon as it has any.

    All of them must hold their share at the same time, so one without a place would be waited for
    for ever: a driver and other jobs hold CPUs too.
    """
    waiting = {actor.ready.remote(): actor for actor in actors}
    patience = GROWTH_SECONDS if find_nodes().growth else START_SECONDS
    ready, rest = ray.wait(list(waiting), num_returns=len(actors), timeout=patience)
    if not ready:
        ready, rest = ray.wait(list(waiting), num_returns=1)
    for reference in rest:
        ray.kill(waiting[reference])
    ray.get(ready)
    return [waiting[reference] for reference in ready]
