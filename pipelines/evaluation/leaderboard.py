"""Scores of several encoders over several tasks: mean, spread, and differences with intervals.

mteb scores a clustering task by ten draws of documents, and every encoder gets the same draws.
Two encoders are therefore compared draw by draw: the paired bootstrap resamples tasks, and draws
within a task, and looks at the mean difference.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import exists, join, list_files, read_bytes, write_bytes
from pipelines.runtime.run_record import read_run, require_complete

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
        earlier = results.get(label)
        if earlier is not None and earlier["revision"] == entry["revision"]:
            earlier["tasks"] = {**entry["tasks"], **earlier["tasks"]}
        else:
            name = label if earlier is None else f"{label} {entry['revision'][:6]}"
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


RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class TaskScore:
    """One encoder's score of one task.

    ``draws`` are the scores whose mean it is; just the score itself where a task makes no draws.
    """

    task: str
    metric: str
    score: float
    draws: tuple[float, ...]
    seconds: float | None = None

    @property
    def spread(self) -> float | None:
        """Standard deviation over draws, None where there is one."""
        return float(np.std(self.draws, ddof=1)) if len(self.draws) > 1 else None


def mean_and_spread(scores: Sequence[TaskScore]) -> tuple[float, float | None]:
    """Mean over tasks, and the standard deviation of that mean over its tasks' draws.

    The second is the draws' alone: it says nothing of how the mean would be over other tasks.
    """
    mean = float(np.mean([score.score for score in scores]))
    if any(score.spread is None for score in scores):
        return mean, None
    variance = sum(score.spread**2 for score in scores if score.spread is not None)
    return mean, float(np.sqrt(variance)) / len(scores)


def paired_bootstrap(first: Sequence[TaskScore], second: Sequence[TaskScore]) -> dict[str, Any]:
    """How much better ``first`` is than ``second`` on the same tasks, in the same order.

    Tasks are resampled, and within each the draws, both encoders' together.

    Returns:
        ``difference`` of the means over tasks, ``low`` and ``high`` of its 95% interval, and
        ``share_above``: in how many resamples ``first`` was ahead.
    """
    generator = np.random.default_rng(0)
    resampled = np.zeros((len(first), RESAMPLES))
    means = []
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        if one.task != other.task:
            raise ValueError(f"scores of {one.task} and of {other.task} are no pair")
        if len(one.draws) == len(other.draws):
            pairs = np.subtract(one.draws, other.draws)
        else:
            pairs = np.array([one.score - other.score])
        chosen = generator.integers(len(pairs), size=(RESAMPLES, len(pairs)))
        resampled[place] = pairs[chosen].mean(axis=1)
        means.append(one.score - other.score)
    tasks = generator.integers(len(first), size=(RESAMPLES, len(first)))
    values = resampled[tasks, np.arange(RESAMPLES)[:, None]].mean(axis=1)
    low, high = np.percentile(values, INTERVAL)
    return {
        "difference": float(np.mean(means)),
        "low": float(low),
        "high": float(high),
        "share_above": float(np.mean(values > 0)),
        "tasks": len(first),
    }


def rank(results: Mapping[str, Sequence[TaskScore]]) -> dict[str, Any]:
    """The leaderboard: encoders with their means, best first, and the best against each other.

    Args:
        results: every encoder's scores of the same tasks in the same order, by its label.
    """
    rows: list[dict[str, Any]] = []
    for label, scores in results.items():
        mean, spread = mean_and_spread(scores)
        rows.append({"encoder": label, "mean": mean, "spread": spread})
    rows.sort(key=lambda row: -row["mean"])
    best = rows[0]["encoder"]
    differences = [
        {"first": best, "second": row["encoder"]}
        | paired_bootstrap(results[best], results[row["encoder"]])
        for row in rows[1:]
    ]
    return {"encoders": rows, "differences": differences}


def to_csv(results: Mapping[str, Sequence[TaskScore]]) -> str:
    """One line an encoder and task."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["encoder", "task", "metric", "score", "spread", "draws", "seconds"])
    for label, scores in results.items():
        for s in scores:
            spread = "" if s.spread is None else f"{s.spread:.6f}"
            seconds = "" if s.seconds is None else f"{s.seconds:.1f}"
            row = [label, s.task, s.metric, f"{s.score:.6f}", spread, len(s.draws), seconds]
            writer.writerow(row)
    return stream.getvalue()


def to_markdown(results: Mapping[str, Sequence[TaskScore]]) -> str:
    """The leaderboard as a Markdown table, and the differences as another."""
    ranking = rank(results)
    first = next(iter(results.values()))
    tasks = [score.task for score in first]
    head = ["encoder", *(f"{s.task} ({s.metric})" for s in first), "mean", "± draws"]
    lines = [_row(head), _row(["---", *["---:"] * (len(tasks) + 2)])]
    for entry in ranking["encoders"]:
        scores = results[entry["encoder"]]
        cells = [f"{score.score:.3f}" for score in scores]
        lines.append(
            _row([entry["encoder"], *cells, f"{entry['mean']:.3f}", _shown(entry["spread"])])
        )
    if ranking["differences"]:
        lines += ["", _row(["better", "than", "by", "95% interval", "ahead in"])]
        lines.append(_row(["---", "---", "---:", "---:", "---:"]))
        for d in ranking["differences"]:
            interval = f"{d['low']:+.3f} to {d['high']:+.3f}"
            share = f"{d['share_above']:.0%}"
            lines.append(_row([d["first"], d["second"], f"{d['difference']:.3f}", interval, share]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
