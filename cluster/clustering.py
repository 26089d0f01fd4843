"""The whole job: embeddings on disk in; assignments, centroids, scores and a report out."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.census import Census, assign_shard, merge_censuses
from cluster.errors import InputError
from cluster.kmeans import TWO_LEVEL_FROM, Fit, FitOptions, fit_in_memory
from cluster.outcome import describe_outcome, write_outcome
from cluster.sample import SamplePlan, Scan, merge_scans, scan_shard
from cluster.storage import delete_others, join
from cluster.vectors import Columns, Shard, VectorSource, open_vectors
from cluster.workers import count_cpus, run_on_shards

KEPT_DOCUMENTS = 5
"""Nearest and farthest documents kept of every cluster."""

log = logging.getLogger(__name__)


def _default_folder(job: str) -> str:
    home = Path(os.environ.get("SHOAL_HOME") or "~/.cache/shoal").expanduser().absolute()
    return str(home / "outputs" / job)


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of one clustering run."""

    embeddings: str = field(default_factory=lambda: _default_folder("embed_corpus"))
    """Vectors: output of embed_corpus, or any Parquet, .npy or Lance; file, folder or glob."""
    output: str = field(default_factory=lambda: _default_folder("cluster_corpus"))
    """Folder to write to."""
    num_clusters: str = "auto"
    """How many clusters: a number, 'auto', or several ('10,20,50') for one level each."""
    label_column: str | None = None
    """Column of known labels to score against; rows without a label are left out of the scores."""
    text_column: str = "text"
    """Column of texts for keywords and examples; without it the report has none."""
    id_column: str = "id"
    """Column of unique ids, strings or integers."""
    embedding_column: str = "embedding"
    """Column of vectors."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """'cosine' scales vectors and centroids to length 1 (spherical k-means)."""
    fit: str = "sample:200000"
    """Vectors to fit centroids on: 'sample:N' draws N rows by a hash of their ids, or 'all'."""
    restarts: int = 3
    """Independent k-means++ starts, of which the best is kept."""
    max_iterations: int = 25
    """Iterations of k-means at most."""
    sample_documents: int = 20_000
    """Documents drawn for keywords, diverse examples and scores without labels."""
    map_documents: int = 3_000
    """Documents drawn for the report's map."""
    drop_bad_vectors: bool = False
    """Leave out vectors that cannot be clustered and list them, instead of stopping."""
    num_workers: int = 0
    """Workers that read and assign; 0 for one a CPU of the Ray cluster."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a worker."""
    seed: int = 0
    """Decides every draw; the same seed gives the same bits."""

    def __post_init__(self) -> None:
        self.levels()
        self.fit_rows()
        for name in ("restarts", "max_iterations", "sample_documents", "map_documents"):
            if getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.num_workers < 0 or self.cpus_per_worker <= 0:
            raise InputError("--num-workers must not be negative, --cpus-per-worker be positive")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed is {self.seed}; it must be from 0 to {2**31 - 1}")

    def levels(self) -> list[int]:
        """The numbers of clusters asked for, ascending; empty for 'auto'."""
        if self.num_clusters == "auto":
            return []
        try:
            levels = sorted({int(part) for part in self.num_clusters.split(",")})
        except ValueError as error:
            raise InputError(
                f"--num-clusters is {self.num_clusters!r}; it must be a number, 'auto', or numbers "
                "joined by commas"
            ) from error
        if levels[0] < 1:
            raise InputError(f"--num-clusters is {self.num_clusters}; at least 1 is needed")
        return levels

    def fit_rows(self) -> int | None:
        """Rows to fit on, None for all."""
        kind, _, number = self.fit.partition(":")
        if self.fit == "all":
            return None
        if kind == "sample" and number.isdecimal() and int(number) > 0:
            return int(number)
        raise InputError(f"--fit is {self.fit!r}; it must be 'all' or 'sample:N' with N above 0")


@dataclass(frozen=True)
class ClusterResult:
    """Figures for ``run.json`` and a short table for people."""

    counts: dict[str, int]
    metrics: dict[str, Any]
    summary: dict[str, str]


def cluster_corpus(config: ClusterConfig, record: object = None) -> ClusterResult:
    """Cluster the vectors of ``config.embeddings`` into the folder ``config.output``.

    Needs a running Ray. Raises :class:`InputError` for vectors or settings that cannot be used.
    """
    source = find_source(config)
    scan = scan_corpus(source, config)
    fits = {k: fit_level(scan, k, config) for k in config.levels()}
    census, _ = assign_corpus(source, {k: fit.centroids for k, fit in fits.items()}, config)
    documents = scan.sample.head(config.sample_documents)
    has_labels = config.label_column is not None
    outcome = describe_outcome(scan, fits, census, documents, has_labels=has_labels)
    write_outcome(outcome, config.output, asdict(config))
    summary = {**outcome.summary(), "report": join(config.output, "report.html")}
    return ClusterResult(outcome.counts(), {"scores": outcome.scores}, summary)


def find_source(config: ClusterConfig) -> VectorSource:
    """The vectors that ``config`` names, checked but not read."""
    columns = Columns(config.id_column, config.embedding_column, None, config.label_column)
    source = open_vectors(config.embeddings, columns, optional_text=config.text_column)
    if source.columns.text is None:
        log.info("no column %r: the report has no keywords and no texts", config.text_column)
    return replace(source, unit_norm=config.metric == "cosine", drop_bad=config.drop_bad_vectors)


def scan_corpus(source: VectorSource, config: ClusterConfig) -> Scan:
    """Check every vector once and draw the sample."""
    rows = config.fit_rows() or 0
    wanted = max(rows, config.sample_documents, config.map_documents)
    plan = SamplePlan(source.rows, wanted, config.sample_documents, config.seed)
    scans = run_on_shards(partial(scan_shard, source, plan=plan), source.shards, **pool_of(config))
    scan = merge_scans(scans, source, plan)
    if scan.zeros:
        log.warning(
            "%d of %d vectors are zero; they are clustered as points", scan.zeros, scan.rows
        )
    return scan


def fit_level(scan: Scan, k: int, config: ClusterConfig) -> Fit:
    """Centroids for ``k`` clusters from the sample."""
    rows = config.fit_rows() or 0
    vectors = scan.sample.head(rows).vectors
    options = FitOptions(
        seed=config.seed,
        restarts=config.restarts,
        max_iterations=config.max_iterations,
        unit_norm=config.metric == "cosine",
        two_level=k >= TWO_LEVEL_FROM,
    )
    log.info("fitting %d centroids on %d of %d vectors", k, len(vectors), scan.rows)
    return fit_in_memory(vectors, k, options)


def assign_corpus(
    source: VectorSource, levels: dict[int, np.ndarray], config: ClusterConfig
) -> tuple[Census, dict[int, np.ndarray]]:
    """Assign every document, one file of ``assignments/`` a shard."""
    folder = join(config.output, "assignments")
    assign = partial(_assign_to_file, source, levels, folder, config.seed)
    results = list(run_on_shards(assign, source.shards, **pool_of(config)))
    delete_others(folder, {f"{shard.name}.parquet" for shard in source.shards})
    census = merge_censuses([part for part, _ in results], KEPT_DOCUMENTS)
    coarser = [k for k in levels if k != max(levels)]
    return census, {k: sum(shared[k] for _, shared in results) for k in coarser}


def _assign_to_file(
    source: VectorSource, levels: dict[int, np.ndarray], folder: str, seed: int, shard: Shard
) -> tuple[Census, dict[int, np.ndarray]]:
    path = join(folder, f"{shard.name}.parquet")
    return assign_shard(source, shard, levels, path, seed=seed, kept=KEPT_DOCUMENTS)


def pool_of(config: ClusterConfig) -> dict[str, Any]:
    """The size of the pool of workers, as :func:`run_on_shards` takes it."""
    workers = config.num_workers or max(1, int(count_cpus() / config.cpus_per_worker))
    return {"num_workers": workers, "num_cpus": config.cpus_per_worker}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
