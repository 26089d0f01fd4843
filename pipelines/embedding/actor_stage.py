"""A stage whose units are done by actors, each with a loaded model.

Like :func:`pipelines.embedding.stages.run_stage`: a unit leaves a receipt when everything it
writes is written, and what has a receipt is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipelines.embedding.actor_plan import TOKENIZE_CPUS, plan_actors
from pipelines.embedding.stage_metrics import StageMetrics
from pipelines.embedding.stages import Receipt, blame, read_receipts, take_unit, unit_dataset
from pipelines.ray_nodes import OFF_HEAD, find_nodes
from pipelines.storage import join, make_folder, write_bytes


def run_actor_stage(
    work: str,
    stage: str,
    units: Mapping[str, Any],
    function: Callable[..., Receipt],
    load: Callable[[], Any],
    *,
    num_actors: int,
    cpus: float = 1,
    on_done: Callable[[str, Receipt], None] | None = None,
) -> dict[str, Receipt]:
    """Do every unit that has no receipt yet; the receipts of all, in the units' order.

    Args:
        work: the folder of unfinished work.
        stage: the stage's name, and its folder's.
        units: what each named unit is given, of plain JSON values.
        function: ``function(name, unit, loaded)`` does one unit.
        load: what an actor loads once; a whole GPU is its own where the Ray cluster has any.
        num_actors: how many load it.
        cpus: CPUs, and so threads, of one of them where it has no GPU.
        on_done: is told of each unit as it is done.
    """
    folder = join(work, stage)
    make_folder(folder)
    receipts = read_receipts(folder, units)
    missing = {name: unit for name, unit in units.items() if name not in receipts}
    if missing:
        resources: dict[str, Any] = {"num_cpus": cpus}
        if find_nodes().resources()["GPU"]:
            resources = {"num_gpus": 1, "label_selector": OFF_HEAD}
        dataset = unit_dataset(missing).map_batches(
            _UnitActor,
            fn_constructor_args=(folder, function, load),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            **resources,
        )
        metrics = StageMetrics(stage, len(missing))
        for row in dataset.iter_rows():
            receipts[row["name"]] = json.loads(row["receipt"])
            metrics.done()
            if on_done is not None:
                on_done(row["name"], receipts[row["name"]])
    return {name: receipts[name] for name in units}


def plan_unit_actors(units: int, *, num_actors: int, cpus: float | None) -> tuple[int, float]:
    """How many actors share ``units`` units of work on this Ray cluster, and the CPUs of each.

    Without a wish (``num_actors`` 0, ``cpus`` None) as many as there are units and GPUs; where
    there are no GPUs, as many as there are CPUs, and CPUs that are left over become threads.

    Raises :class:`pipelines.errors.InputError` where what is asked for does not fit.
    """
    nodes = find_nodes()
    plan = plan_actors(
        nodes.resources(),
        nodes.count,
        num_actors=str(num_actors) if num_actors else "",
        cpus=cpus,
    )
    count = num_actors or max(1, min(units, plan.largest))
    if cpus is None and not plan.gpus:
        largest_node = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes())
        share = plan.largest * plan.cpus // count
        return count, max(1.0, min(share, largest_node - TOKENIZE_CPUS))
    return count, plan.cpus


class _UnitActor:
    """Does units with what it has loaded."""

    def __init__(
        self, folder: str, function: Callable[..., Receipt], load: Callable[[], Any]
    ) -> None:
        self.folder = folder
        self.function = function
        self.loaded = load()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A unit to its receipt."""
        name, unit = take_unit(batch)
        with blame(self.folder.rpartition("/")[2], name):
            receipt = json.dumps(self.function(name, unit, self.loaded))
            write_bytes(join(self.folder, f"{name}.json"), receipt.encode())
        return pa.table({"name": [name], "receipt": [receipt]})
