"""Finished runs of the evaluation job, whose scores another run takes over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.errors import InputError
from pipelines.evaluating.leaderboard import TaskScore
from pipelines.run_record import read_run, require_complete
from pipelines.storage import exists, join, list_files, read_bytes, write_bytes

JOB = "evaluate_mteb"


def is_finished_evaluation(name: str) -> bool:
    """Whether ``name`` is the output folder of a finished run of this job.

    Raises :class:`InputError` where it is that of an unfinished one.
    """
    if "=" in name or not exists(join(name, "run.json")):
        return False
    run = read_run(name)
    if run is None or run.get("job") != JOB:
        return False
    require_complete(name)
    return True


def take_over(folder: str, output: str) -> dict[str, dict[str, Any]]:
    """The results of a finished run, by encoder; its result files are copied into ``output``."""
    content = json.loads(read_bytes(join(folder, "scores.json")))
    if not content.get("results"):
        raise InputError(f"{folder}/scores.json holds no results: run its job again")
    for name in list_files(join(folder, "results")):
        write_bytes(join(output, "results", name), read_bytes(join(folder, "results", name)))
    return content["results"]


def add_results(results: dict[str, dict[str, Any]], more: Mapping[str, dict[str, Any]]) -> None:
    """Add what another run found; an encoder of the same name but another revision stays apart."""
    for label, entry in more.items():
        there = results.get(label)
        if there is not None and there["revision"] == entry["revision"]:
            there["tasks"] = {**entry["tasks"], **there["tasks"]}
        else:
            name = label if there is None else f"{label} {entry['revision'][:6]}"
            results[name] = entry


def check_same_documents(results: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> None:
    """Raise :class:`InputError` where a task was scored on other documents for some encoders."""
    for task in tasks:
        revisions = {label: e["tasks"][task]["dataset_revision"] for label, e in results.items()}
        first, *others = revisions.items()
        for label, revision in others:
            if revision != first[1]:
                raise InputError(
                    f"task {task} was scored on other documents for {label} than for {first[0]}: "
                    "their scores cannot be compared; run both with the same --max-documents and "
                    "corpus"
                )


def read_scores(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskScore]:
    """Scores by task, from what ``scores.json`` holds of an encoder."""
    return {
        name: TaskScore(
            name, found["metric"], found["score"], tuple(found["draws"]), found["seconds"]
        )
        for name, found in tasks.items()
    }
