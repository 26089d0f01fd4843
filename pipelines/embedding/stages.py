"""One stage of a job: units of work over Ray Data, each done once and remembered.

A unit has a name and leaves a receipt, ``WORK/STAGE/NAME.json``, written after everything else
the unit writes. What has a receipt is done; a run that goes on does the rest. A unit that is done
twice, because its node died or its answer was lost, writes the same files with the same content.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipelines.embedding.stage_metrics import StageMetrics
from pipelines.errors import InputError
from pipelines.job_logs import RUN, current_run, mark_lines
from pipelines.ray_nodes import find_nodes
from pipelines.storage import (
    in_threads,
    join,
    list_files,
    make_folder,
    read_bytes,
    with_retries,
    write_bytes,
)

Receipt = dict[str, Any]
UnitFunction = Callable[[str, Any], Receipt]

log = logging.getLogger(__name__)


def run_stage(
    work: str, stage: str, units: Mapping[str, Any], function: UnitFunction
) -> dict[str, Receipt]:
    """Do every unit that has no receipt yet; the receipts of all, in the units' order.

    Args:
        work: the folder of unfinished work.
        stage: the stage's name, and its folder's.
        units: what each named unit is given, of plain JSON values.
        function: ``function(name, unit)`` does one unit in a task of one CPU.
    """
    started = time.monotonic()
    folder = join(work, stage)
    make_folder(folder)
    receipts = read_receipts(folder, units)
    missing = {name: unit for name, unit in units.items() if name not in receipts}
    if missing:
        task = functools.partial(_do_unit, folder=folder, function=function)
        dataset = unit_dataset(missing).map_batches(
            task, batch_size=1, batch_format="pyarrow", num_cpus=1
        )
        metrics = StageMetrics(stage, len(missing))
        for row in dataset.iter_rows():
            receipts[row["name"]] = json.loads(row["receipt"])
            metrics.done()
    log.info(
        "%s: %d of %d done now, %.1f s", stage, len(missing), len(units), time.monotonic() - started
    )
    return {name: receipts[name] for name in units}


def configure_ray_data() -> None:
    """Leave the display of progress to :mod:`pipelines.embedding.progress`, and place work.

    What follows runs off the accelerator nodes, where there are labelled ones, unless a stage says
    otherwise. Workers find the job and the id of its run in the context.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # it would warn that its bars are off
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # as it was raised, not wrapped: messages for users keep their exit code
    context.raise_original_map_exception = True
    context.execution_options.label_selector = find_nodes().cpu_selector
    context.set_config(RUN, current_run() or ("", ""))


def unit_dataset(units: Mapping[str, Any]) -> ray.data.Dataset:
    """Units as a dataset of ``name`` and ``unit`` (JSON), one unit a block and so a task."""
    rows = [{"name": name, "unit": json.dumps(unit)} for name, unit in units.items()]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def take_unit(batch: pa.Table) -> tuple[str, Any]:
    """Name and content of the one unit in a batch."""
    return batch["name"][0].as_py(), json.loads(batch["unit"][0].as_py())


def read_receipts(folder: str, units: Mapping[str, Any]) -> dict[str, Receipt]:
    """Receipts of those units that are done."""
    there = set(list_files(folder))
    names = [name for name in units if f"{name}.json" in there]
    contents = in_threads(lambda name: read_bytes(join(folder, f"{name}.json")), names)
    return {name: json.loads(content) for name, content in zip(names, contents, strict=True)}


def blame(stage: str, name: str) -> _Blame:
    """A context in which an exception is told which unit of which stage it belongs to.

    Without one a line is logged, which is seen where logs are JSON.
    """
    return _Blame(stage, name)


class _Blame:
    def __init__(self, stage: str, name: str) -> None:
        self.stage, self.name = stage, name

    def __enter__(self) -> None:
        job, run_id = ray.data.DataContext.get_current().get_config(RUN, ("", ""))
        mark_lines(job, run_id)
        self.started = time.monotonic()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        place = f"{self.stage} of {self.name}"
        if error is not None:
            error.add_note(f"in {place}")
            return
        unit = {
            "stage": self.stage,
            "shard": self.name,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        log.info("%s done", place, extra=unit)


def _do_unit(batch: pa.Table, *, folder: str, function: UnitFunction) -> Iterator[pa.Table]:
    name, unit = take_unit(batch)
    with blame(folder.rpartition("/")[2], name):
        receipt = json.dumps(with_retries(lambda: function(name, unit), name))
        try:
            write_bytes(join(folder, f"{name}.json"), receipt.encode(), create_folder=False)
        except FileNotFoundError as error:
            raise InputError(not_shared(folder)) from error
    yield pa.table({"name": [name], "receipt": [receipt]})


def not_shared(folder: str) -> str:
    """Why a worker cannot write where the driver made a folder."""
    return (
        f"a worker cannot write to {folder}, which the driver made: with several machines the "
        "output must be on a shared file system or at s3://"
    )
