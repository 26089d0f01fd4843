"""The training loop of one rank: step, measure, keep the best, report. No Ray here."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from pipelines.runtime.errors import InputError
from pipelines.training.adapter import adapter_weights, load_weights
from pipelines.training.batches import read_batch, read_heldout
from pipelines.training.loss import sum_over_ranks
from pipelines.training.trainer import DETAIL, AdapterTrainer

log = logging.getLogger(__name__)

_TEMPERATURE = "log_temperature"


@dataclass
class TrainingState:
    """How far a run is, its history, and its best adapter so far.

    ``history`` has one row a step (and row 0 before the first): loss, rates, and held-out measures
    where they were taken. ``stale`` counts measures since the best. ``start`` and ``best`` have
    what the measures of the first and of the best adapter are means of, pair by pair.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    start: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def consider(
        self, row: dict[str, Any], weights: dict[str, Tensor], detail: dict[str, Any]
    ) -> None:
        """Keep ``weights`` if their loss is the lowest so far; of equals the earliest.

        None is kept whose :func:`topic_score` is below that of the start.
        """
        is_worse = topic_score(row) < topic_score(self.history[0])
        if row[SCORE] < self.best_loss and not is_worse:
            self.best_loss, self.best_step, self.best_weights = row[SCORE], self.step, weights
            self.best = detail
            self.start = self.start or detail
            self.stale = 0
        else:
            self.stale += 1


def save_state(folder: Path, state: TrainingState, trainer: AdapterTrainer) -> None:
    """Write everything that is needed to go on into ``folder``."""
    current = adapter_weights(trainer.model)
    current[_TEMPERATURE] = trainer.loss.log_temperature.detach().cpu()
    safetensors.torch.save_file(current, folder / "current.safetensors")
    safetensors.torch.save_file(state.best_weights, folder / "best.safetensors")
    safetensors.torch.save_file(optimizer_tensors(trainer), folder / "optimizer.safetensors")
    content = {name: value for name, value in vars(state).items() if name != "best_weights"}
    (folder / "state.json").write_text(json.dumps(content))


def read_state(folder: Path) -> TrainingState:
    """The progress in ``folder``, without touching a model."""
    content = json.loads((folder / "state.json").read_text())
    return TrainingState(
        **content, best_weights=safetensors.torch.load_file(folder / "best.safetensors")
    )


def resume(folder: Path, trainer: AdapterTrainer) -> TrainingState:
    """Put ``trainer`` where the state in ``folder`` left off."""
    current = safetensors.torch.load_file(folder / "current.safetensors")
    with torch.no_grad():
        trainer.loss.log_temperature.copy_(current.pop(_TEMPERATURE))
    load_weights(trainer.model, current)
    load_optimizer(trainer, safetensors.torch.load_file(folder / "optimizer.safetensors"))
    return read_state(folder)


def optimizer_tensors(trainer: AdapterTrainer) -> dict[str, Tensor]:
    """The optimizer's moments and counts, named after the parameters they belong to."""
    return {
        f"{name}|{key}": value.detach().cpu().clone()
        for name, parameter in trainer.parameters.items()
        for key, value in trainer.optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(trainer: AdapterTrainer, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`optimizer_tensors`."""
    for name, parameter in trainer.parameters.items():
        moments = {
            key.rpartition("|")[2]: tensor
            for key, tensor in tensors.items()
            if key.rpartition("|")[0] == name
        }
        if moments:
            trainer.optimizer.state[parameter] = {
                key: tensor if key == "step" else tensor.to(parameter.device)
                for key, tensor in moments.items()
            }


SCORE = "heldout_loss"
"""The measure by which the best adapter is chosen, lower better: the objective on held-out pairs.

Retrieval of the partner is measured too, but does not choose: an untuned model finds a crop's
partner by the words that both have, and its clusters may get better while it finds no more of them.
"""


def topic_score(row: dict[str, Any]) -> float:
    """How well partners find each other and fall into one cluster, 0 to 1; needs no label.

    With a teacher, how far the adapter agrees with it instead.

    Training cannot lower its own objective by it: an adapter that scores less than the encoder it
    starts from has learned something else than topics.
    """
    if "teacher_agreement" in row:
        return row["teacher_agreement"]
    return (row.get("mrr", 0.0) + row.get("half_agreement", 0.0)) / 2


Report = Callable[[dict[str, Any], Path | None], None]


@dataclass(frozen=True)
class LoopSettings:
    """Where the batches lie, when to measure, when to stop."""

    batches: str
    max_steps: int
    batch_pairs: int
    measure_every: int
    patience: int


def train(
    trainer: AdapterTrainer,
    settings: LoopSettings,
    rank: int,
    world_size: int,
    checkpoint: Path | None,
    report: Report,
) -> None:
    """Train from the beginning, or from ``checkpoint`` on, until the last or a good enough step.

    Stops early once ``patience`` measures in a row were not better than the best. Raises
    :class:`InputError`, on all ranks, for a loss or gradient that is not finite.

    Args:
        trainer: this rank's.
        settings: the same on all ranks.
        rank: this process among ``world_size``.
        world_size: how many there are; may differ from that of the run that ``checkpoint`` is of.
        checkpoint: folder of a state.
        report: called equally often on all ranks: with a row of the history and, on rank 0, the
            folder of a new state, which is gone afterwards.
    """
    heldout = read_heldout(settings.batches)
    state = TrainingState() if checkpoint is None else resume(checkpoint, trainer)
    if checkpoint is None:
        _measure(trainer, state, heldout, rank, world_size, {"step": 0})
    while state.step < settings.max_steps and not _is_stale(state, settings):
        row = _take_step(trainer, settings, state.step + 1, rank, world_size)
        step = state.step = row["step"]
        if step % settings.measure_every == 0 or step == settings.max_steps:
            _measure(trainer, state, heldout, rank, world_size, row)
            _report(trainer, state, rank, report)
        else:
            state.history.append(row)
        if rank == 0:
            log.info("%s", describe_row(state.history[-1], settings.max_steps))


def _take_step(
    trainer: AdapterTrainer, settings: LoopSettings, step: int, rank: int, world_size: int
) -> dict[str, Any]:
    """Train on one batch; its row of the history."""
    started = time.perf_counter()
    pairs = read_batch(settings.batches, step, rank, world_size)
    row: dict[str, Any] = {"step": step}
    row |= trainer.step(step, pairs, settings.batch_pairs * rank // world_size)
    if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
        raise InputError(describe_divergence(row, settings))
    row["tokens"] = sum_over_ranks(torch.tensor(row["tokens"], device=trainer.device))
    row["seconds"] = time.perf_counter() - started
    return row


def describe_row(row: dict[str, Any], max_steps: int) -> str:
    """A row of the history as a line for people."""
    line = (
        f"step {row['step']} of {max_steps}: loss {row['loss']:.3f}, "
        f"{row['tokens'] / row['seconds']:.0f} tokens a second"
    )
    if SCORE in row:
        line += f", held-out loss {row[SCORE]:.3f}"
    return line


def describe_divergence(row: dict[str, Any], settings: LoopSettings) -> str:
    """Why a run ended that diverged, with the ids of the batch it happened on."""
    ids = read_batch(settings.batches, row["step"], 0, 1)["id"].to_pylist()
    shown = ", ".join(str(i) for i in ids[:10]) + (", …" if len(ids) > 10 else "")
    return (
        f"step {row['step']}: loss {row['loss']} and gradient norm {row['gradient_norm']} are not "
        f"both finite. The batch's document ids are {shown}. Lower --learning-rate, raise "
        "--temperature, or look at these documents; the steps before are kept"
    )


def _measure(
    trainer: AdapterTrainer,
    state: TrainingState,
    heldout: pa.Table,
    rank: int,
    world_size: int,
    row: dict[str, Any],
) -> None:
    row |= trainer.measure(heldout, rank, world_size)
    if not math.isfinite(row[SCORE]):
        raise InputError(
            f"step {row['step']}: the loss of the held-out pairs is {row[SCORE]}, by which the "
            "adapter is chosen. Use --dtype float32, lower --learning-rate, or look at the "
            "held-out documents"
        )
    detail = row.pop(DETAIL, {})
    state.history.append(row)
    state.consider(row, adapter_weights(trainer.model), detail)


def _is_stale(state: TrainingState, settings: LoopSettings) -> bool:
    return settings.patience > 0 and state.stale >= settings.patience


def _report(trainer: AdapterTrainer, state: TrainingState, rank: int, report: Report) -> None:
    row = state.history[-1]
    if rank > 0:
        report(row, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder), state, trainer)
        report(row, Path(folder))
