"""The training loop on Ray Train: workers, restarts, checkpoints in the output folder."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray.util.metrics import Gauge

from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.sources import fetch_adapter
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    join,
    list_files,
    open_filesystem,
    read_bytes,
    remove_files,
    write_bytes,
)
from pipelines.runtime.logs import RUN, configure_logging, mark_lines
from pipelines.runtime.machines import OFF_HEAD, RayNodes, find_nodes, need_ray, usable_cpus
from pipelines.training.config import TrainerSettings
from pipelines.training.loop import SCORE, LoopSettings, train
from pipelines.training.trainer import AdapterTrainer

_RUN_NAME = "ray_train"
_PROBLEM = "problem-"
_PROBLEM_WAIT_SECONDS = 10.0
_KEPT_CHECKPOINTS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingTask:
    """Everything a worker must know."""

    trainer: TrainerSettings
    loop: LoopSettings
    encoder: Mapping[str, Any]
    start_adapter: str | None
    teacher: Mapping[str, Any] | None
    work: str


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers, and what each may use."""

    smallest: int
    largest: int
    cpus: float
    gpus: float
    max_failures: int
    selector: Mapping[str, str] | None = None
    """Labels of the nodes they may be on."""


def plan_workers(
    workers: tuple[int, int], cpus: float | None, gpus: float | None, max_failures: int
) -> WorkerPlan:
    """Settle what each worker gets: an even share of its machine's CPUs, a GPU where there are.

    Raises :class:`InputError` where the Ray cluster is too small for the fewest workers.
    """
    nodes = find_nodes()
    available = nodes.resources()
    if gpus is None:
        gpus = 1.0 if available["GPU"] >= max(1, workers[0]) else 0.0
    cpus = share_of_cpus(nodes, workers[1], gpus) if cpus is None else cpus
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if each * workers[0] > available[kind]:
            raise InputError(
                f"{workers[0]} workers of {each:g} {kind}s each do not fit the Ray cluster's "
                f"{available[kind]:g}: lower --num-workers or --{kind.lower()}s-per-worker"
            )
    selector = OFF_HEAD if gpus else nodes.cpu_selector
    return WorkerPlan(*workers, cpus, gpus, max_failures, selector)


def share_of_cpus(nodes: RayNodes, workers: int, gpus: float) -> float:
    """CPUs of one of ``workers`` workers: an even share of the smallest machine they may be on."""
    kind = "GPU" if gpus else "CPU"
    cpus_of_nodes = [
        node["Resources"]["CPU"]
        for node in nodes.nodes
        if node["Resources"].get(kind) and node["Resources"].get("CPU")
    ]
    if not cpus_of_nodes:  # they are still to come
        return 1.0
    smallest = min(cpus_of_nodes)
    if nodes.count == 1:  # a local one is told of more CPUs than there are
        smallest = min(smallest, usable_cpus())
    return max(1.0, smallest // math.ceil(max(1, workers) / len(cpus_of_nodes)))


def train_on_workers(task: TrainingTask, plan: WorkerPlan, state_folder: Path) -> None:
    """Train, going on from the last checkpoint of an earlier try; the final state is copied out.

    A lost worker is replaced and training goes on from the last checkpoint; with fewer workers
    than asked for if that is what the Ray cluster has left and the plan allows. Raises what a
    worker found wrong with the input.
    """
    need_ray()
    remove_files(list(find_problems(task.work).values()))
    filesystem, inner = open_filesystem(task.work)
    workers = plan.largest if plan.smallest == plan.largest else (plan.smallest, plan.largest)
    resources = {"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}
    trainer = ray.train.torch.TorchTrainer(
        work_as_rank,
        train_loop_config={
            "task": task,
            "threads": max(1, int(plan.cpus)),
            "run": ray.data.DataContext.get_current().get_config(RUN, ("", "")),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=bool(plan.gpus),
            resources_per_worker=resources,
            label_selector=None if plan.selector is None else dict(plan.selector),
        ),
        torch_config=ray.train.torch.TorchConfig(backend=pick_backend(plan)),
        run_config=ray.train.RunConfig(
            name=_RUN_NAME,
            storage_path=inner,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=plan.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=_KEPT_CHECKPOINTS),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError:
        raise_problem(task.work)
        raise
    raise_problem(task.work)
    assert result.checkpoint is not None
    result.checkpoint.to_directory(str(state_folder))


def pick_backend(plan: WorkerPlan) -> str:
    """NCCL where the workers' GPUs are real; gloo elsewhere."""
    if not plan.gpus:
        return "gloo"
    ask = ray.remote(num_gpus=min(1.0, plan.gpus), num_cpus=0, label_selector=dict(OFF_HEAD))
    if ray.get(ask(torch.cuda.is_available).remote()):
        return "nccl"
    log.warning("Ray gives the workers GPUs, but torch sees none there: training on the CPU")
    return "gloo"


def work_as_rank(config: dict[str, Any]) -> None:
    """What each worker runs."""
    configure_logging()
    mark_lines(*config["run"])
    task: TrainingTask = config["task"]
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # Ray's GPUs may be of another kind than torch can use, or only pretended.
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    log.info("rank %d of %d on %s", rank, world_size, device)

    metrics = training_metrics() if rank == 0 else {}

    def report(row: dict[str, Any], folder: Path | None) -> None:
        for name, metric in metrics.items():
            if name in row:
                metric.set(row[name])
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(row, checkpoint=checkpoint)

    if find_problems(task.work):
        return  # the try before this one ended for good; this one is Ray's, which tries again
    checkpoint = ray.train.get_checkpoint()
    with contextlib.ExitStack() as stack:
        folder = (
            None if checkpoint is None else Path(stack.enter_context(checkpoint.as_directory()))
        )
        try:
            trainer = load_trainer(task, device)
            train(trainer, task.loop, rank, world_size, folder, report)
        except InputError as error:
            write_bytes(join(task.work, f"{_PROBLEM}{rank}"), str(error).encode())
            if not is_everywhere(task.work, world_size):
                raise  # so that Ray ends the ranks that wait for this one


def find_problems(work: str) -> dict[str, str]:
    """Paths of what ranks found wrong with the input, by name."""
    return {n: join(work, n) for n in sorted(list_files(work)) if n.startswith(_PROBLEM)}


def raise_problem(work: str) -> None:
    """Raise the first of the problems that ranks have left, if any, as :class:`InputError`."""
    for path in find_problems(work).values():
        raise InputError(read_bytes(path).decode())


def is_everywhere(work: str, world_size: int) -> bool:
    """Whether every rank ends with a problem, as most that one finds are found by all."""
    last = time.monotonic() + _PROBLEM_WAIT_SECONDS
    while len(find_problems(work)) < world_size:
        if time.monotonic() > last:
            return False
        time.sleep(0.2)
    return True


def training_metrics() -> dict[str, Gauge]:
    """Prometheus metrics of a training run, by their names in the history; set at every measure."""
    return {
        "step": Gauge("shoal_training_step", "Steps trained"),
        "loss": Gauge("shoal_training_loss", "Loss of the latest step, nats"),
        "gradient_norm": Gauge("shoal_training_gradient_norm", "Gradient norm before clipping"),
        "seconds": Gauge("shoal_training_step_seconds", "Seconds of the latest step"),
        SCORE: Gauge("shoal_training_heldout_loss", "Held-out loss, which picks the adapter"),
    }


def train_in_process(task: TrainingTask, state_folder: Path) -> None:
    """Train without Ray, going on from ``state_folder``, where each new state is put whole."""

    def report(_: dict[str, Any], folder: Path | None) -> None:
        assert folder is not None
        fresh, old = (state_folder.with_name(state_folder.name + end) for end in (".new", ".old"))
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(folder, fresh)
        if state_folder.exists():
            state_folder.replace(old)
        fresh.replace(state_folder)
        shutil.rmtree(old, ignore_errors=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = load_trainer(task, device)
    train(trainer, task.loop, 0, 1, state_folder if state_folder.exists() else None, report)


def load_trainer(task: TrainingTask, device: torch.device) -> AdapterTrainer:
    """The model on this machine, with a new adapter or the one to go on from."""
    start = None if task.start_adapter is None else fetch_adapter(task.start_adapter).folder
    teacher = None if task.teacher is None else EncoderDescription.from_json(task.teacher)
    encoder = EncoderDescription.from_json(task.encoder)
    return AdapterTrainer(task.trainer, encoder, device, start, teacher)
