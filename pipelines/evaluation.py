"""Encoders scored by mteb, over the Ray cluster.

In: names of tasks, maybe a labelled corpus, and one encoder or several. Out: mteb's own result
files in ``results/``, which ``mteb.ResultCache(folder).load_results()`` reads; ``scores.json``;
``leaderboard.md`` and ``leaderboard.csv``. A unit of work is one encoder on one task; what is done
is not done again when a run is repeated after a kill.

In any script of yours, without this job:
``mteb.evaluate(MtebEncoder.load(EncoderConfig(...)), mteb.get_tasks(["STS12"]))``, with
:class:`pipelines.evaluating.mteb_encoder.MtebEncoder`.
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

from pipelines.command_line import JobResult
from pipelines.corpus import find_files
from pipelines.embedding.actor_stage import plan_unit_actors, run_actor_stage
from pipelines.embedding.stages import configure_ray_data
from pipelines.embedding.work_plan import listing_digest, listing_of
from pipelines.encoder import describe_encoder
from pipelines.errors import InputError
from pipelines.evaluating.contestants import (
    Contestant,
    distinct,
    encoder_contestant,
    parse_contestant,
)
from pipelines.evaluating.earlier_runs import (
    add_results,
    is_finished_evaluation,
    take_over,
)
from pipelines.evaluating.evaluate_config import MAY_CHANGE, EvaluateConfig
from pipelines.evaluating.outcome import (
    WORK_FOLDER,
    collect,
    progress_table,
    write_outcome,
)
from pipelines.ray_nodes import find_nodes
from pipelines.run_record import RunRecord
from pipelines.sampling import sample_corpus
from pipelines.storage import join, read_bytes, write_bytes

__all__ = ["MAY_CHANGE", "EvaluateConfig", "evaluate_encoders"]

log = logging.getLogger(__name__)


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
    corpus = corpus_digest(config.corpus)
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


def corpus_digest(corpus: str) -> str | None:
    """What tells the state of a corpus's files, None without a corpus."""
    return listing_digest(listing_of(find_files(corpus))) if corpus else None


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
    if previous["metrics"].get("corpus_digest") != corpus:
        raise InputError(
            f"{config.output} holds scores on this corpus as it was at "
            f"{previous['started_at']}; it has changed since: choose another --output"
        )
    return JobResult(summary={"nothing to do": f"{config.output} is complete, nothing changed"})


def find_contestants(config: EvaluateConfig, names: Sequence[str]) -> list[Contestant]:
    """The encoders to run: those of ``names``, or the one that the flags describe."""
    device = "cuda" if find_nodes().resources()["GPU"] else "cpu"
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
    from pipelines.evaluating.tasks import expand_names, labelled_task, make_task, why_unreachable

    tasks: dict[str, dict[str, Any]] = {}
    unreachable: dict[str, str] = {}
    if not needed:
        return tasks, unreachable
    if config.corpus:
        name = config.task_name or stem_of(config.corpus)
        sample = sample_corpus(
            config.corpus, work, text_column=config.text_column, label_column=config.label_column,
            documents=config.max_documents, distinct=False,
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
    from pipelines.evaluating.task_runner import ContestantCache, run_unit

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
