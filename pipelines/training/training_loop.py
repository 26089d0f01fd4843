"""The training loop of one rank: step, measure, keep the best, report. No Ray here."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pipelines.contrastive import sum_over_ranks
from pipelines.errors import InputError
from pipelines.training.adapter_model import adapter_weights
from pipelines.training.adapter_trainer import AdapterTrainer
from pipelines.training.training_batches import read_batch, read_heldout
from pipelines.training.training_state import TrainingState, resume, save_state

SCORE = "heldout_loss"
"""The measure by which the best adapter is chosen, lower better: the objective on held-out pairs.

Retrieval of the partner is measured too, but does not choose: an untuned model finds a crop's
partner by the words that both have, and its clusters may get better while it finds no more of them.
"""

Report = Callable[[dict[str, Any], Path | None], None]

log = logging.getLogger(__name__)


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
    heldout = read_heldout(settings.batches, rank=0, world_size=1)
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
    state.history.append(row)
    state.consider(row[SCORE], adapter_weights(trainer.model))


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
