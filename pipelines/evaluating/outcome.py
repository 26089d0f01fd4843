"""What an evaluation found, as files and as a short table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipelines.command_line import JobResult
from pipelines.errors import InputError
from pipelines.evaluating.earlier_runs import check_same_documents, read_scores
from pipelines.evaluating.leaderboard import TaskScore, rank, to_csv, to_markdown
from pipelines.run_record import RunRecord
from pipelines.storage import join, remove_folder, write_bytes

WORK_FOLDER = "_work"


def progress_table(units: Mapping[str, Any], done: Mapping[str, Any]) -> str:
    """Scores so far, a line an encoder and a column a task; dots are still to come."""
    tasks = list(dict.fromkeys(unit["task"]["name"] for unit in units.values()))
    rows: dict[str, dict[str, str]] = {}
    for name, unit in units.items():
        score = f"{done[name]['score']:.4f}" if name in done else "…"
        rows.setdefault(unit["contestant"]["label"], {})[unit["task"]["name"]] = score
    first = max(map(len, rows))
    lines = ["  ".join([" " * first, *tasks])]
    for label, scores in rows.items():
        cells = [scores[task].ljust(len(task)) for task in tasks]
        lines.append("  ".join([label.ljust(first), *cells]).rstrip())
    return "\n".join(lines)


def collect(units: Mapping[str, Any], receipts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every encoder's description and scores, by its label."""
    results: dict[str, dict[str, Any]] = {}
    for name, unit in units.items():
        contestant = unit["contestant"]
        entry = results.setdefault(
            contestant["label"],
            {
                "revision": contestant["key"],
                "encoder": contestant["description"],
                "task_prompts": contestant["prompts"],
                "tasks": {},
            },
        )
        entry["tasks"][unit["task"]["name"]] = receipts[name]
    return results


def write_outcome(
    output: str,
    record: RunRecord,
    results: Mapping[str, dict[str, Any]],
    unreachable: Mapping[str, str],
) -> JobResult:
    """Write the tables; the job's own short one.

    Encoders are ranked over the tasks that all of them have scores of.
    """
    scores = {label: read_scores(entry["tasks"]) for label, entry in results.items()}
    shared = [t for t in next(iter(scores.values())) if all(t in s for s in scores.values())]
    if not shared:
        raise InputError("the encoders compared have no task in common: nothing to rank them by")
    check_same_documents(results, shared)
    table: dict[str, list[TaskScore]] = {
        label: [found[task] for task in shared] for label, found in scores.items()
    }
    ranking = rank(table)
    content = {
        "tasks": shared,
        "results": results,
        "ranking": ranking["encoders"],
        "differences": ranking["differences"],
        "unreachable": dict(unreachable),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_bytes(join(output, "scores.json"), text.encode())
    write_bytes(join(output, "leaderboard.md"), to_markdown(table).encode())
    write_bytes(join(output, "leaderboard.csv"), to_csv(table).encode())
    summary = {
        f"{row['encoder']}": ", ".join(
            [f"{s.task} {s.score:.3f}" for s in table[row["encoder"]]]
            + ([f"mean {row['mean']:.3f}"] if len(shared) > 1 else [])
        )
        for row in ranking["encoders"]
    }
    metrics = {row["encoder"]: row["mean"] for row in ranking["encoders"]}
    counts = {"encoders": len(results), "tasks": len(shared), "unreachable": len(unreachable)}
    record.counts.update(counts)
    record.metrics.update(metrics)
    record.complete()
    remove_folder(join(output, WORK_FOLDER))
    left = {f"not reached: {name}": why for name, why in unreachable.items()}
    return JobResult(counts, metrics, {**summary, **left, "output": output})
