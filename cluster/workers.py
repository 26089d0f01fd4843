"""Ray at the edge: shards to workers, and vectors on disk behind FAISS's assign seam."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from cluster.errors import InputError
from cluster.lloyd import FixedPointSums, Totals, sum_by_cluster
from cluster.vectors import BLOCK_BYTES, Shard, VectorSource, read_blocks

_ERROR = "input_error"


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
) -> Iterator[dict[str, pa.Table]]:
    """``function(shard)`` for every shard, streamed by Ray Data over a pool of workers.

    Yields the tables of each result as it comes, in no particular order. An exception of the
    function ends the run; an :class:`InputError` arrives as such.
    """
    items = [{"shard": index} for index in range(len(shards))]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _ShardWorker,
        fn_constructor_args=(function, tuple(shards)),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(num_workers, len(shards))),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    for batch in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        tables = {
            name: pa.ipc.open_stream(batch.column(name)[0].as_buffer()).read_all()
            for name in batch.column_names
            if batch.column(name)[0].is_valid
        }
        if _ERROR in tables:
            raise InputError(tables[_ERROR].column(0)[0].as_py())
        yield tables


class _ShardWorker:
    def __init__(self, function: Callable[[Shard], Travelling], shards: Sequence[Shard]) -> None:
        self._function = function
        self._shards = shards

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard = self._shards[batch.column("shard")[0].as_py()]
        try:
            tables = self._function(shard).to_tables()
        except InputError as error:
            # Ray Data passes on what a function raised as text only; its type would be lost.
            tables = {_ERROR: pa.table({"message": [str(error)]})}
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
        self._shape = (count, source.dimension)
        self._largest = largest
        shares = [source.shards[i::num_workers] for i in range(num_workers)]
        actor = ray.remote(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=3, max_task_retries=3
        )(_VectorHolder)
        self._actors = [actor.remote(source, share) for share in shares if share]

    def count(self) -> int:
        """Number of vectors."""
        return self._shape[0]

    def dim(self) -> int:
        """Their dimension."""
        return self._shape[1]

    def assign_to(self, centroids: np.ndarray) -> Totals:
        """Assign every vector to its nearest centroid and add up, on all actors at once."""
        shared = ray.put(centroids)
        waiting = [
            actor.assign_to.remote(shared, self._shape[0], self._largest) for actor in self._actors
        ]
        sums = FixedPointSums(centroids.shape, self._shape[0], self._largest)
        while waiting:
            ready, waiting = ray.wait(waiting)
            sums.merge(ray.get(ready[0]))
        return sums.totals(centroids)

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

    def __init__(self, source: VectorSource, shards: Sequence[Shard]) -> None:
        self._dimension = source.dimension
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115
        for shard in shards:
            for block in read_blocks(source, shard, with_text=False):
                self._file.write(block.vectors.data)
        self._file.flush()

    def assign_to(self, centroids: np.ndarray, count: int, largest: float) -> FixedPointSums:
        return sum_by_cluster(self._blocks(), centroids, count, largest)

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


def count_cpus() -> int:
    """CPUs of the Ray cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
