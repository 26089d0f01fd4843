"""Encoders scored by mteb, over the Ray cluster.

In: names of tasks, maybe a labelled corpus, and one encoder or several. Out: mteb's own result
files in ``results/``, which ``mteb.ResultCache(folder).load_results()`` reads; ``scores.json``;
``leaderboard.md`` and ``leaderboard.csv``. A unit of work is one encoder on one task; what is done
is not done again when a run is repeated after a kill.

In any script of yours, without this job:
``mteb.evaluate(MtebEncoder.load(EncoderConfig(...)), mteb.get_tasks(["STS12"]))``, with
:class:`pipelines.evaluation.mteb.MtebEncoder`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.corpus.files import find_files, listing_digest, listing_of
from pipelines.corpus.sample import sample_corpus
from pipelines.encoder.describe import describe_encoder
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.contestants import (
    Contestant,
    distinct,
    encoder_contestant,
    parse_contestant,
    worker_device,
)
from pipelines.evaluation.leaderboard import (
    TaskScore,
    add_results,
    check_same_documents,
    is_finished_evaluation,
    rank,
    read_scores,
    take_over,
    to_csv,
    to_markdown,
)
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, json_bytes, read_bytes, remove_folder, write_bytes
from pipelines.runtime.run_record import RunRecord, require_unchanged
from pipelines.runtime.units import configure_ray_data, plan_unit_actors, run_actor_stage

log = logging.getLogger(__name__)


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
    write_bytes(join(output, "scores.json"), json_bytes(content))
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
    record.complete(counts, metrics)
    remove_folder(join(output, WORK_FOLDER))
    left = {f"not reached: {name}": why for name, why in unreachable.items()}
    return JobResult(counts, metrics, {**summary, **left, "output": output})


def evaluate_encoders(config: EvaluateConfig, record: RunRecord) -> JobResult:
    """Score encoders on tasks into ``config.output``, going on with what is there.

    Raises :class:`InputError` for unknown tasks and encoders, for a corpus that cannot be read,
    and where a task's data cannot be had (unless ``skip_unreachable_tasks``).
    """
    if importlib.util.find_spec("mteb") is None:
        raise InputError("mteb is not installed: pip install 'shoal[evaluate]'")
    configure_ray_data()
    work = join(config.output, WORK_FOLDER)
    folders = [name for name in config.compare if is_finished_evaluation(name)]
    contestants = find_contestants(config, [n for n in config.compare if n not in folders])
    corpus = corpus_digest(config)
    if record.previous is not None and record.previous.get("status") == "complete":
        return confirm_complete(config, record.previous, contestants, corpus)
    tasks, unreachable = find_tasks(config, work, needed=bool(contestants))
    units = {
        unit_name(contestant, task): {"contestant": asdict(contestant), "task": task}
        for contestant in contestants
        for task in tasks.values()
    }
    receipts = run_units(config, work, units, list(tasks))
    results = collect(units, receipts)
    for folder in folders:
        add_results(results, take_over(folder, config.output))
    record.metrics["corpus_digest"] = corpus
    return write_outcome(config.output, record, results, unreachable)


def corpus_digest(config: EvaluateConfig) -> str | None:
    """What tells the state of a corpus's files, None without a corpus."""
    if not config.corpus:
        return None
    return listing_digest(listing_of(find_files(config.corpus, config.reading)))


def confirm_complete(
    config: EvaluateConfig,
    previous: Mapping[str, Any],
    contestants: Sequence[Contestant],
    corpus: str | None,
) -> JobResult:
    """The result of a complete run, where encoders and corpus are still those it was made of.

    Raises :class:`InputError` where one of them has changed.
    """
    results = json.loads(read_bytes(join(config.output, "scores.json")))["results"]
    for contestant in contestants:
        if results.get(contestant.label, {}).get("revision") != contestant.key:
            raise InputError(
                f"{config.output} holds scores of {contestant.label} as it was at "
                f"{previous['started_at']}; its files have changed since: choose another --output"
            )
    require_unchanged(config.output, previous, "corpus_digest", corpus)
    return JobResult(summary={"nothing to do": f"{config.output} is complete, nothing changed"})


def find_contestants(config: EvaluateConfig, names: Sequence[str]) -> list[Contestant]:
    """The encoders to run: those of ``names``, or the one that the flags describe."""
    device = worker_device()
    if not config.compare:
        described = describe_encoder(config.encoder, device=device)
        return [encoder_contestant(described, config.prompts)]
    found = [parse_contestant(name, config.encoder, config.prompts, device) for name in names]
    return distinct(found)


def find_tasks(
    config: EvaluateConfig, work: str, *, needed: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Tasks by the name that people know them by, as units' plain values; and why some are not.

    The data of every task is fetched before any text is embedded.
    """
    from pipelines.evaluation.tasks import expand_names, labelled_task, make_task, why_unreachable

    tasks: dict[str, dict[str, Any]] = {}
    unreachable: dict[str, str] = {}
    if not needed:
        return tasks, unreachable
    if config.corpus:
        name = config.task_name or stem_of(config.corpus)
        sample = sample_corpus(
            config.corpus, work, text_column=config.text_column, label_column=config.label_column,
            documents=config.max_documents, distinct=False, options=config.reading,
        )  # fmt: skip
        revision = labelled_task(name, sample.texts, sample.labels).metadata.revision
        path = join(work, f"corpus-{revision[:12]}.json")
        write_bytes(path, json.dumps([sample.texts, sample.labels]).encode())
        tasks[name] = {"name": name, "documents": None, "path": path}
    for name in expand_names(config.task_names):
        task = make_task(name, config.max_documents)
        reason = why_unreachable(task)
        if reason is None:
            task.unload_data()
            tasks[name] = {"name": name, "documents": config.max_documents, "path": None}
        else:
            unreachable[name] = reason
    if unreachable and (not config.skip_unreachable_tasks or not tasks):
        raise InputError(
            f"the data of {len(unreachable)} of {len(unreachable) + len(tasks)} tasks cannot be "
            f"had: {'; '.join(f'{name}: {why}' for name, why in unreachable.items())}. Check the "
            "network and HF_HUB_OFFLINE, go on without them with --skip-unreachable-tasks, or run "
            "20newsgroups and reuters-r8, which need no hub"
        )
    return tasks, unreachable


def run_units(
    config: EvaluateConfig, work: str, units: Mapping[str, Any], tasks: Sequence[str]
) -> dict[str, Any]:
    """Score every encoder on every task; a table tells of each as it is done."""
    # mteb is an extra, and slow to load
    from pipelines.evaluation.tasks import ContestantCache, run_unit

    if not units:
        return {}
    count, cpus = plan_unit_actors(
        len(units), num_actors=config.num_actors, cpus=config.cpus_per_actor
    )
    log.info("%d units (encoder × task) by %d actors", len(units), count)
    done: dict[str, Any] = {}

    def tell(name: str, receipt: Mapping[str, Any]) -> None:
        done[name] = receipt
        log.info(
            "%d of %d: %s on %s took %.0f s\n%s", len(done), len(units),
            units[name]["contestant"]["label"], units[name]["task"]["name"],
            receipt["seconds"] or 0.0, progress_table(units, done),
        )  # fmt: skip

    return run_actor_stage(
        work,
        "evaluate",
        units,
        functools.partial(run_unit, config.output),
        functools.partial(ContestantCache, max(1, round(cpus))),
        num_actors=count,
        cpus=cpus,
        on_done=tell,
    )


def unit_name(contestant: Contestant, task: Mapping[str, Any]) -> str:
    """What a unit's receipt is called: it changes with encoder and documents."""
    digest = hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()
    return f"{contestant.key[:24]}-{digest[:12]}"


def stem_of(path: str) -> str:
    """A file's or folder's name without its endings."""
    return path.rstrip("/").rpartition("/")[2].split(".")[0] or "corpus"
