"""Ray at the edge: run a function over shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from cluster.vectors import Shard


def run_on_shards(
    function: Callable[[Shard], Any], shards: Sequence[Shard], *, num_workers: int, num_cpus: float
) -> Iterator[Any]:
    """``function(shard)`` for every shard, streamed by Ray Data over a pool of workers.

    Results come in no particular order. An exception of the function ends the run.
    """
    items = [{"shard": index} for index in range(len(shards))]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    pool = ActorPoolStrategy(size=min(num_workers, len(shards)))
    results = dataset.map(
        _ShardWorker, fn_constructor_args=(function, list(shards)), compute=pool, num_cpus=num_cpus
    )
    for row in results.iter_rows():
        yield row["result"]


class _ShardWorker:
    def __init__(self, function: Callable[[Shard], Any], shards: Sequence[Shard]) -> None:
        self._function = function
        self._shards = shards

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": self._function(self._shards[row["shard"]])}


def count_cpus() -> int:
    """CPUs of the Ray cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
