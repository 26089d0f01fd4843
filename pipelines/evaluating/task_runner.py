"""What a worker does: one encoder on one task, by mteb itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mteb
import torch

from pipelines.embedding.stages import Receipt
from pipelines.errors import InputError
from pipelines.evaluating.contestants import Contestant, load_contestant
from pipelines.evaluating.tasks import labelled_task, make_task, why_unreachable
from pipelines.storage import join, read_bytes, write_bytes


class ContestantCache:
    """The encoder that was used last, as the next unit often wants it again."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._key: str | None = None
        self._encoder: Any = None

    def encoder(self, contestant: Contestant) -> Any:
        """The contestant as an encoder object for mteb."""
        if self._key != contestant.key:
            self._encoder = None  # before the next one's weights come
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._encoder = load_contestant(contestant, device=device, threads=self._threads)
            self._key = contestant.key
        return self._encoder


def run_unit(output: str, name: str, unit: Mapping[str, Any], cache: ContestantCache) -> Receipt:
    """Score one encoder on one task; mteb's own files go to ``output/results``."""
    encoder = cache.encoder(Contestant(**unit["contestant"]))
    task = open_task(unit["task"])
    with tempfile.TemporaryDirectory() as folder:
        result = mteb.evaluate(
            encoder,
            task,
            cache=mteb.ResultCache(folder),
            co2_tracker=False,
            show_progress_bar=False,
            overwrite_strategy="always",
        )
        for path in sorted(Path(folder).rglob("*.json")):
            write_bytes(join(output, path.relative_to(folder).as_posix()), path.read_bytes())
    return {"name": encoder.mteb_model_meta.name, **score_of(result.task_results[0], task)}


def open_task(unit: Mapping[str, Any]) -> Any:
    """A fresh task with its data, so that every encoder gets the same draws of documents.

    Raises :class:`InputError` where this machine cannot have the data.
    """
    if unit["path"]:
        texts, labels = json.loads(read_bytes(unit["path"]))
        return labelled_task(unit["name"], texts, labels)
    task = make_task(unit["name"], unit["documents"])
    reason = why_unreachable(task)
    if reason is not None:
        raise InputError(f"a worker cannot have the data of {unit['name']}: {reason}")
    return task


def score_of(result: Any, task: Any) -> dict[str, Any]:
    """A task's main score, the draws it is the mean of, its name and how long it took."""
    found = [entry for entries in result.scores.values() for entry in entries]
    draws = [float(entry["main_score"]) for entry in found]
    if len(found) == 1 and "v_measures" in found[0]:
        values = found[0]["v_measures"]
        groups = values.values() if isinstance(values, dict) else [values]
        draws = [float(value) for group in groups for value in group]
    return {
        "score": float(result.get_score()),
        "metric": task.metadata.main_score,
        "draws": draws,
        "seconds": result.evaluation_time,
        "dataset_revision": result.dataset_revision,
        "mteb_version": result.mteb_version,
    }
