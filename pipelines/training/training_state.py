"""What a training run must remember to go on: a folder of safetensors and one JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipelines.training.adapter_model import adapter_weights, load_weights
from pipelines.training.adapter_trainer import AdapterTrainer

_TEMPERATURE = "log_temperature"


@dataclass
class TrainingState:
    """How far a run is, its history, and its best adapter so far.

    ``history`` has one row a step (and row 0 before the first): loss, rates, and held-out measures
    where they were taken. ``stale`` counts measures since the best.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0

    def consider(self, heldout_loss: float, weights: dict[str, Tensor]) -> None:
        """Keep ``weights`` if their loss is the lowest so far; of equals the earliest."""
        if heldout_loss < self.best_loss:
            self.best_loss, self.best_step, self.best_weights = heldout_loss, self.step, weights
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
    content = {
        "step": state.step,
        "history": state.history,
        "best_step": state.best_step,
        "best_loss": state.best_loss,
        "stale": state.stale,
    }
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
