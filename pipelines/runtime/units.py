"""Units of work on Ray: :func:`stream_units` runs them, by tasks or by actors, wherever they run.

Each stage of a job does each of its units once and remembers it (:func:`run_stage`). A unit has a
name and leaves a receipt, ``WORK/STAGE/NAME.json``, written after everything else
the unit writes. What has a receipt is done; a run that goes on does the rest. A unit that is done
twice, because its node died or its answer was lost, writes the same files with the same content.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.util.metrics import Counter, Gauge

from pipelines.runtime.errors import InputError, StorageError, find_told_error
from pipelines.runtime.files import (
    in_threads,
    join,
    list_files,
    make_folder,
    read_bytes,
    write_bytes,
)
from pipelines.runtime.logs import RUN, UNIT_LINES, current_run, mark_lines
from pipelines.runtime.machines import (
    OFF_HEAD,
    TOKENIZE_CPUS,
    find_nodes,
    is_ray_put_off,
    need_ray,
    plan_actors,
)

log = logging.getLogger(__name__)

_TAGS = ("job", "stage")
_WAITING_A_CPU = 2
_SECONDS_HERE = 2.0
"""Of a stage's work in this process before a Ray is started for the rest: less than that takes."""


class StageMetrics:
    """Counts one stage's units as the driver learns of them."""

    def __init__(self, stage: str, left: int) -> None:
        job, _ = ray.data.DataContext.get_current().get_config(RUN, ("", ""))
        tags = {"job": job, "stage": stage}
        self._left = left
        self._done_metric = Counter("shoal_units_done", "Units of work finished", _TAGS)
        self._left_metric = Gauge("shoal_units_left", "Units of work still to do", _TAGS)
        self._done_metric.set_default_tags(tags)
        self._left_metric.set_default_tags(tags)
        self._left_metric.set(left)

    def done(self) -> None:
        """Count one more unit."""
        self._left -= 1
        self._done_metric.inc()
        self._left_metric.set(self._left)


def stream_units(
    stage: str,
    units: Mapping[str, Any],
    function: Callable[..., pa.Table],
    *,
    load: Callable[[], Any] | None = None,
    num_actors: int = 0,
    most_tasks: int | None = None,
    **resources: Any,
) -> Iterator[pa.Table]:
    """What becomes of every unit, as it comes, in no particular order.

    A single unit on a Ray cluster of one machine is done in this process: a worker would first have
    to start. So are the units of two seconds while there is no Ray yet.

    An exception of a worker ends the run and arrives as it was raised, with a note that names the
    stage and the unit; one of ``load`` too.

    Args:
        stage: what the work is called in logs and metrics.
        units: what each named unit is given, of plain JSON values.
        function: ``function(name, unit)`` in tasks, or ``function(name, unit, loaded)`` in actors;
            it gives a table of one row.
        load: what an actor loads once.
        num_actors: how many actors there are; without any, units are done in tasks.
        most_tasks: how many of these at a time; None for as many as there is room for.
        resources: what Ray is told of one task or actor: ``num_cpus``, ``num_gpus`` and, where it
            may not run wherever the job's work may, ``label_selector``.
    """
    # as it was raised, not wrapped: messages for users keep their exit code
    ray.data.DataContext.get_current().raise_original_map_exception = True
    metrics = StageMetrics(stage, len(units))
    is_simple = load is None and not resources.get("num_gpus")
    left = dict(units)
    if is_simple:
        began = time.monotonic()
        while left and may_do_here(len(left), began):
            name, unit = next(iter(left.items()))
            yield _call_unit(one_unit(name, unit), stage=stage, function=function)
            metrics.done()
            del left[name]
    if not left:
        return
    need_ray()
    dataset = unit_dataset(left)
    if num_actors:
        results = dataset.map_batches(
            _UnitActor,
            fn_constructor_args=(stage, function, load),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(left))),
            **resources,
        )
    else:
        call = functools.partial(_call_unit, stage=stage, function=function)
        results = dataset.map_batches(
            call,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=most_tasks),
            **{"num_cpus": 1, **resources},
        )
    try:
        for batch in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            metrics.done()
            yield batch
    except ray.exceptions.RayTaskError as error:
        # of the class that was raised, but with a message that is a whole traceback
        if isinstance(error.cause, (InputError, StorageError)):
            raise error.cause from error
        raise


def _call_unit(batch: pa.Table, *, stage: str, function: Callable[..., pa.Table]) -> pa.Table:
    name, unit = take_unit(batch)
    with blame(stage, name):
        return function(name, unit)


class Loaded:
    """What an actor has loaded, or why it could not.

    An exception in an actor's constructor would reach the driver without its kind, so the first
    use raises it.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: Exception | None = None
        try:
            self._value = load()
        except Exception as error:  # noqa: BLE001 - raised at its use
            self._error = error

    def get(self) -> Any:
        """What was loaded; raises what loading raised."""
        if self._error is not None:
            raise self._error
        return self._value


class _UnitActor:
    """Does units with what it has loaded."""

    def __init__(
        self, stage: str, function: Callable[..., pa.Table], load: Callable[[], Any] | None
    ) -> None:
        self.stage, self.function = stage, function
        self.loaded = None if load is None else Loaded(load)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A unit to what becomes of it."""
        name, unit = take_unit(batch)
        with blame(self.stage, name):
            if self.loaded is None:
                return self.function(name, unit)
            return self.function(name, unit, self.loaded.get())


Receipt = dict[str, Any]
UnitFunction = Callable[[str, Any], Receipt]


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
    return _do_missing(work, stage, units, function)


def _do_missing(
    work: str,
    stage: str,
    units: Mapping[str, Any],
    function: Callable[..., Receipt],
    on_done: Callable[[str, Receipt], None] | None = None,
    **how: Any,
) -> dict[str, Receipt]:
    started = time.monotonic()
    folder = join(work, stage)
    make_folder(folder)
    receipts = read_receipts(folder, units)
    missing = {name: unit for name, unit in units.items() if name not in receipts}
    if missing:
        write = functools.partial(_with_receipt, folder, function)
        for batch in stream_units(stage, missing, write, **how):
            name = batch["name"][0].as_py()
            receipts[name] = json.loads(batch["receipt"][0].as_py())
            if on_done is not None:
                on_done(name, receipts[name])
    log.info(
        "%s: %d of %d done now, %.1f s", stage, len(missing), len(units), time.monotonic() - started
    )
    return {name: receipts[name] for name in units}


def _with_receipt(
    folder: str, function: Callable[..., Receipt], name: str, unit: Any, *loaded: Any
) -> pa.Table:
    receipt = json.dumps(function(name, unit, *loaded))
    try:
        write_bytes(join(folder, f"{name}.json"), receipt.encode(), create_folder=False)
    except FileNotFoundError as error:
        raise InputError(not_shared(folder)) from error
    return pa.table({"name": [name], "receipt": [receipt]})


def map_on_ray(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """``function`` of every item, each in a task of one CPU, in order, a few of them ahead.

    For what is to come back as the object that it is; an exception keeps its kind. Some items are
    done in this process, as units are.
    """
    left, began = deque(items), time.monotonic()
    while left and may_do_here(len(left), began):
        yield function(left.popleft())
    if not left:
        return
    need_ray()
    selector = ray.data.DataContext.get_current().execution_options.label_selector
    task = ray.remote(num_cpus=1, label_selector=selector)(_call)  # takes no functools.partial
    most = _WAITING_A_CPU * find_nodes().cpus
    waiting: deque[Any] = deque()
    for item in left:
        waiting.append(task.remote(function, item))
        if len(waiting) >= most:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


_TELL_OF_ERRORS = ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state")


def _is_traceback_wanted(record: logging.LogRecord) -> bool:
    """False for what Ray Data logs of an error that ends in one line for the user."""
    error = record.exc_info[1] if record.exc_info else sys.exc_info()[1]
    return find_told_error(error) is None


def configure_ray_data() -> None:
    """Leave the display of progress to :mod:`pipelines.embedding.encode`, and place work.

    What follows runs off the accelerator nodes, where there are labelled ones, unless a stage says
    otherwise. Workers find the job and the id of its run in the context.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # it would warn that its bars are off
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    for name in _TELL_OF_ERRORS:
        logging.getLogger(name).addFilter(_is_traceback_wanted)
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


def one_unit(name: str, unit: Any) -> pa.Table:
    """A unit as a task of :func:`unit_dataset` is given it."""
    return pa.table({"name": [name], "unit": [json.dumps(unit)]})


def may_do_here(left: int, began: float) -> bool:
    """Whether the next of so many units is for this process, which ``began`` them then."""
    if is_ray_put_off():
        return left == 1 or time.monotonic() - began < _SECONDS_HERE
    return left == 1 and is_one_machine()


def is_one_machine() -> bool:
    """Whether this process's Ray cluster is this machine and no more, and will not grow."""
    if is_ray_put_off():
        return True
    if not ray.is_initialized():
        return False
    nodes = find_nodes()
    return nodes.count == 1 and nodes.nodes[0]["NodeID"] == nodes.driver


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
        logging.getLogger(UNIT_LINES).info("%s done", place, extra=unit)


def not_shared(folder: str) -> str:
    """Why a worker cannot write where the driver made a folder."""
    return (
        f"a worker cannot write to {folder}, which the driver made: with several machines the "
        "output must be on a shared file system or at s3://"
    )


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
    resources: dict[str, Any] = {"num_cpus": cpus}
    if find_nodes().resources()["GPU"]:
        resources = {"num_gpus": 1, "label_selector": OFF_HEAD}
    return _do_missing(
        work, stage, units, function, on_done, load=load, num_actors=num_actors, **resources
    )


def plan_unit_actors(units: int, *, num_actors: int, cpus: float | None) -> tuple[int, float]:
    """How many actors share ``units`` units of work on this Ray cluster, and the CPUs of each.

    Without a wish (``num_actors`` 0, ``cpus`` None) as many as there are units and GPUs; where
    there are no GPUs, as many as there are CPUs, and CPUs that are left over become threads.

    Raises :class:`pipelines.runtime.errors.InputError` where what is asked for does not fit.
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
        largest_node = max(node["Resources"].get("CPU", 0.0) for node in nodes.nodes)
        share = plan.largest * plan.cpus // count
        return count, max(1.0, min(share, largest_node - TOKENIZE_CPUS))
    return count, plan.cpus
