"""The whole job: embeddings on disk in; assignments, centroids, scores and a report out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from cluster.assign import NearestCentroids
from cluster.census import Census, CensusPlan, assign_shard, census_from_tables, merge_censuses
from cluster.kmeans import TWO_LEVEL_FROM, Fit, FitOptions, fit_in_memory, refine_on_all
from cluster.num_clusters import Choice, choose_num_clusters
from cluster.on_ray import RayVectors, count_cpus, run_on_shards
from cluster.outcome import (
    Namer,
    delete_others,
    describe_outcome,
    name_clusters,
    write_tables,
)
from cluster.report import build_report, render_report
from cluster.sample import SamplePlan, Scan, merge_scans, scan_from_tables, scan_shard
from cluster.vectors import Columns, Shard, VectorSource, open_vectors, read_centroids
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import default_output, join, make_folder, write_bytes

log = logging.getLogger(__name__)


def _as_words(value: Any) -> Any:
    """What YAML reads as a number, a list or a truth value, as a command line would have it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    return str(value) if isinstance(value, int) else value


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of one clustering run."""

    embeddings: str = field(default_factory=lambda: default_output("embed_corpus"))
    """Vectors: output of embed_corpus, or any Parquet, .npy or Lance; file, folder or glob."""
    output: str = field(default_factory=lambda: default_output("cluster_corpus"))
    """Folder to write to."""
    num_clusters: Annotated[str, BeforeValidator(_as_words)] = "auto"
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
    two_level: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_as_words)] = "auto"
    """Cluster coarsely first, then within: much faster for many clusters; auto: from 2,000 on."""
    initial_centroids: str | None = None
    """Start from these centroids (centroids.parquet of an earlier run) and keep their numbers."""
    max_clusters: int = 0
    """Most clusters that 'auto' tries; 0 for the square root of the sample, 20 to 150."""
    max_iterations: int = 25
    """Iterations of k-means at most."""
    sample_documents: int = 20_000
    """Documents drawn for keywords, diverse examples and scores without labels."""
    map_documents: int = 3_000
    """Documents drawn for the report's map."""
    duplicate_similarity: float = 0.98
    """Cosine from which documents of a cluster are near-duplicates; 0 for no search."""
    name_model: str | None = None
    """Instruct LLM that names each cluster from its keywords and documents; none by default."""
    drop_bad_vectors: bool = False
    """Leave out vectors that cannot be clustered and list them, instead of stopping."""
    num_workers: int = 0
    """Workers that read and assign; 0 for one a CPU of the Ray cluster."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: int = 0
    """GPUs that Ray reserves for a worker; FAISS uses them where its GPU build is installed."""
    seed: int = 0
    """Decides every draw; the same seed gives the same bits."""

    def __post_init__(self) -> None:
        self.levels()
        self.fit_rows()
        for name in ("restarts", "max_iterations", "sample_documents", "map_documents"):
            if getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.duplicate_similarity <= 1:
            raise InputError(
                f"--duplicate-similarity is {self.duplicate_similarity}; it must be from 0 to 1"
            )
        self._check_combinations()
        if self.num_workers < 0 or self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise InputError(
                f"--num-workers is {self.num_workers}, --cpus-per-worker {self.cpus_per_worker}, "
                f"--gpus-per-worker {self.gpus_per_worker}; CPUs must be above 0, the others not "
                "below"
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed is {self.seed}; it must be from 0 to {2**31 - 1}")

    def _check_combinations(self) -> None:
        """Refuse settings that would have no effect, or none together."""
        if self.max_clusters and self.num_clusters != "auto":
            raise InputError("--max-clusters bounds --num-clusters auto; leave one of them out")
        if self.max_clusters < 0 or self.max_clusters == 1:
            raise InputError(f"--max-clusters is {self.max_clusters}; it must be at least 2")
        if self.initial_centroids is not None and len(self.levels()) != 1:
            raise InputError("--initial-centroids needs --num-clusters with one number")

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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_TRIALS = 8


def start_from(
    centroids: np.ndarray, sizes: np.ndarray, k: int, vectors: np.ndarray, *, seed: int
) -> np.ndarray:
    """float32 (k, d): earlier ``centroids``, float32 (m, d), as the start of ``k`` clusters.

    Where there are too many, those of the smallest ``sizes``, int64 (m,), are left out. Where
    there are too few, rows of ``vectors``, float32 (n, d), are added, each the best of a few drawn
    with probability proportional to squared distance from all centroids so far (greedy k-means++,
    Arthur and Vassilvitskii 2007).
    """
    if k <= len(centroids):
        kept = np.sort(np.argsort(-sizes, kind="stable")[:k])
        return np.ascontiguousarray(centroids[kept], dtype=np.float32)
    random = np.random.default_rng(seed)
    start = np.ascontiguousarray(centroids, dtype=np.float32)
    nearest = _squared_distances(start, vectors)
    while len(start) < k:
        shares = np.cumsum(nearest)
        drawn = np.searchsorted(shares, random.random(_TRIALS) * shares[-1], side="right")
        candidates = vectors[np.minimum(drawn, len(vectors) - 1)]
        left = [np.minimum(nearest, _squared_distances(c[None], vectors)) for c in candidates]
        best = int(np.argmin([distances.sum() for distances in left]))
        start, nearest = np.vstack([start, candidates[best][None]]), left[best]
    return start


def _squared_distances(centroids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return NearestCentroids(centroids).assign(vectors).distances ** 2


KEPT_DOCUMENTS = 5
"""Nearest and farthest documents kept of every cluster."""
_MOST_CELLS = 5_000_000
START_ROWS = 100_000
"""Vectors that the start of a fit on all vectors is found on."""


@dataclass(frozen=True)
class ClusterResult:
    """Figures for ``run.json`` and a short table for people."""

    counts: dict[str, int]
    metrics: dict[str, Any]
    summary: dict[str, str]


def cluster_corpus(
    config: ClusterConfig, record: object = None, *, namer: Namer | None = None
) -> ClusterResult:
    """Cluster the vectors of ``config.embeddings`` into the folder ``config.output``.

    Needs a running Ray; ``record`` is the open run record, which takes what this returns, and
    ``namer`` asks ``config.name_model`` for names. Raises :class:`InputError` for vectors or
    settings that cannot be used.
    """
    source = find_source(config)
    scan = scan_corpus(source, config)
    choice = choose_levels(scan, config)
    levels = [choice.k] if choice is not None else config.levels()
    _check_table_of_labels(scan, levels, config)
    fits = {k: fit_level(source, scan, k, config, load_start(config, source, k)) for k in levels}
    census = assign_corpus(source, scan, fits, config)
    outcome = describe_outcome(
        scan,
        fits,
        choice,
        census,
        documents=config.sample_documents,
        has_labels=config.label_column is not None,
        similarity=config.duplicate_similarity or None,
    )
    if config.name_model is not None and namer is not None:
        outcome = name_clusters(outcome, partial(namer, config.name_model))
    write_tables(outcome, config.output)
    report = build_report(
        outcome, asdict(config), map_documents=config.map_documents, seed=config.seed
    )
    write_bytes(join(config.output, "report.html"), render_report(report).encode())
    summary = {**outcome.summary(), "report": join(config.output, "report.html")}
    return ClusterResult(outcome.counts(), {"scores": outcome.scores}, summary)


def find_source(config: ClusterConfig) -> VectorSource:
    """The vectors that ``config`` names, checked but not read."""
    columns = Columns(config.id_column, config.embedding_column, None, config.label_column)
    source = open_vectors(config.embeddings, columns, optional_text=config.text_column)
    if source.columns.text is None:
        log.info("no column %r: the report has no keywords and no texts", config.text_column)
        if config.name_model is not None:
            raise InputError(
                f"--name-model names clusters by their texts, but {config.embeddings} has no "
                f"column {config.text_column!r}: name one with --text-column, or leave "
                "--name-model out"
            )
    return replace(source, unit_norm=config.metric == "cosine", drop_bad=config.drop_bad_vectors)


def scan_corpus(source: VectorSource, config: ClusterConfig) -> Scan:
    """Check every vector once and draw the sample."""
    rows = config.fit_rows() or START_ROWS
    wanted = max(rows, config.sample_documents, config.map_documents)
    plan = SamplePlan(source.rows, wanted, config.sample_documents, config.seed)
    tables = run_on_shards(
        partial(scan_shard, source, plan=plan), source.shards, stage="scan", **pool_of(config)
    )
    scan = merge_scans([scan_from_tables(table) for table in tables], source, plan)
    if not scan.rows:
        raise InputError(
            f"{config.embeddings}: none of the {len(scan.rejected):,} vectors can be clustered; "
            f"the first is {scan.rejected.column('reason')[0].as_py()}"
        )
    if config.label_column is not None and not scan.labelled:
        raise InputError(
            f"column {config.label_column!r} holds no label in {scan.rows:,} rows: name another "
            "column, or leave --label-column out"
        )
    return scan


def _check_table_of_labels(scan: Scan, levels: list[int], config: ClusterConfig) -> None:
    cells = len(scan.labels) * max(levels)
    if cells > _MOST_CELLS:
        raise InputError(
            f"{len(scan.labels):,} different labels in column {config.label_column!r} times "
            f"{max(levels):,} clusters are more than the {_MOST_CELLS:,} counts that can be kept: "
            "name a coarser --label-column, or ask for fewer clusters"
        )


def choose_levels(scan: Scan, config: ClusterConfig) -> Choice | None:
    """The number of clusters that suits the sample, where none was given."""
    if config.levels() or config.initial_centroids is not None:
        return None
    choice = choose_num_clusters(
        scan.sample.vectors, fit_options(2, config), most=config.max_clusters or None
    )
    log.info("%s", choice.reason)
    return choice


def fit_level(
    source: VectorSource, scan: Scan, k: int, config: ClusterConfig, start: np.ndarray | None = None
) -> Fit:
    """Centroids for ``k`` clusters, from the sample or (``--fit all``) from every vector.

    With ``start``, float32 (k, d), it goes on from there and keeps that order.
    """
    rows = config.fit_rows()
    vectors = scan.sample.head(rows or START_ROWS).vectors
    options = fit_options(k, config)
    log.info("fitting %d centroids on %d of %d vectors", k, len(vectors), scan.rows)
    if rows is not None:
        return fit_in_memory(vectors, k, options, start=start)
    if start is None:
        first = fit_in_memory(vectors, k, options)
    else:
        first = Fit(start, np.zeros(k, dtype=np.int64), 0.0, 0, 0, 0)
    everything = RayVectors(source, count=scan.rows, largest=scan.largest, **pool_of(config))
    try:
        return refine_on_all(everything, first, options, keep_order=start is not None)
    finally:
        everything.close()


def fit_options(k: int, config: ClusterConfig) -> FitOptions:
    """How to fit ``k`` clusters."""
    return FitOptions(
        seed=config.seed,
        restarts=config.restarts,
        max_iterations=config.max_iterations,
        unit_norm=config.metric == "cosine",
        two_level=config.two_level == "yes" or (config.two_level == "auto" and k >= TWO_LEVEL_FROM),
    )


def load_start(config: ClusterConfig, source: VectorSource, k: int) -> np.ndarray | None:
    """The ``--initial-centroids``, checked against vectors and number of clusters."""
    if config.initial_centroids is None:
        return None
    start = read_centroids(config.initial_centroids)
    if start.shape != (k, source.dimension):
        raise InputError(
            f"{config.initial_centroids} holds {start.shape[0]} centroids of {start.shape[1]} "
            f"numbers; required are {k} of {source.dimension}"
        )
    return start


def assign_corpus(
    source: VectorSource, scan: Scan, fits: Mapping[int, Fit], config: ClusterConfig
) -> Census:
    """Assign every document, one file of ``assignments/`` a shard."""
    folder = join(config.output, "assignments")
    levels = {k: fit.centroids for k, fit in fits.items()}
    largest = max(scan.largest, max(float(np.abs(c).max()) for c in levels.values()))
    longest = 2 * largest * float(np.sqrt(source.dimension))
    plan = CensusPlan(tuple(sorted(levels)), KEPT_DOCUMENTS, scan.rows, longest)
    make_folder(folder)
    assign = partial(_assign_to_file, source, levels, plan, folder, config.seed)
    tables = run_on_shards(assign, source.shards, stage="assign", **pool_of(config))
    census = merge_censuses([census_from_tables(table, plan) for table in tables])
    delete_others(folder, {f"{shard.name}.parquet" for shard in source.shards})
    return census


def _assign_to_file(
    source: VectorSource,
    levels: Mapping[int, np.ndarray],
    plan: CensusPlan,
    folder: str,
    seed: int,
    shard: Shard,
) -> Census:
    path = join(folder, f"{shard.name}.parquet")
    return assign_shard(source, shard, levels, plan, path, seed=seed)


def pool_of(config: ClusterConfig) -> dict[str, Any]:
    """The size of the pool of workers, as :func:`run_on_shards` takes it."""
    workers = config.num_workers or max(1, int(count_cpus() / config.cpus_per_worker))
    return {
        "num_workers": workers,
        "num_cpus": config.cpus_per_worker,
        "num_gpus": config.gpus_per_worker,
    }
