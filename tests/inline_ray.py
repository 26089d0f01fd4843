"""The same stages in this process, without Ray: for tests of what is computed, not of where."""

import json

import pyarrow as pa
import pytest
import ray

from cluster import work
from pipelines.embedding import encode as vectors
from pipelines.nightly import clusters
from pipelines.nightly import job as reindex
from pipelines.runtime import machines as ray_nodes
from pipelines.runtime import units as stages


def before_unit() -> None:
    """Called before a unit of work begins and before it goes on: tests interrupt runs here."""


class InlineDataset:
    """As much of a Ray dataset as the stages use."""

    def __init__(self, batches):
        self._batches = batches

    def map_batches(self, function, *, fn_constructor_args=(), **_):
        call = function(*fn_constructor_args) if isinstance(function, type) else function
        return InlineDataset(_flat(call(batch) for batch in _interruptible(self._batches)))

    def iter_batches(self, **_):
        yield from self._batches

    def iter_rows(self):
        for batch in self._batches:
            yield from batch.to_pylist()


def _interruptible(batches):
    for batch in batches:
        before_unit()
        yield batch


def _flat(results):
    for result in results:
        if isinstance(result, pa.Table):
            yield result
        else:
            yield from _interruptible(result)


def inline_units(units):
    return InlineDataset(
        pa.table({"name": [name], "unit": [json.dumps(unit)]}) for name, unit in units.items()
    )


def run_inline(patch: pytest.MonkeyPatch) -> None:
    """Make nights run in this process."""
    patch.setattr(stages, "unit_dataset", inline_units)
    patch.setattr(vectors, "unit_dataset", inline_units)
    patch.setattr(stages, "is_one_machine", lambda: False)  # so that each unit can be interrupted
    for module in (work, clusters):
        patch.setattr(module, "run_on_shards", _on_shards)
    for module in (reindex, clusters):
        patch.setattr(module, "map_on_ray", lambda function, items: map(function, items))
    patch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    node = {"Alive": True, "NodeID": "here", "Resources": {"CPU": 4.0}}
    patch.setattr(ray, "nodes", lambda: [node])
    patch.setattr(ray_nodes, "find_driver", lambda: "here")


def _on_shards(function, shards, **_):
    return (function(shard).to_tables() for shard in shards)
