"""The whole job: embeddings on disk in; assignments, centroids, scores and a report out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from cluster.census import Census, CensusPlan, census_from_tables, merge_censuses
from cluster.cluster_config import ClusterConfig
from cluster.errors import InputError
from cluster.kmeans import TWO_LEVEL_FROM, Fit, FitOptions, fit_in_memory, refine_on_all
from cluster.naming import Namer, name_clusters
from cluster.num_clusters import Choice, choose_num_clusters
from cluster.outcome import describe_outcome, write_tables
from cluster.report import render_report
from cluster.report_content import build_report
from cluster.sample import SamplePlan, Scan, merge_scans, scan_from_tables, scan_shard
from cluster.shard_assignment import assign_shard
from cluster.storage import delete_others, join, write_text
from cluster.vectors import Columns, Shard, VectorSource, open_vectors, read_centroids
from cluster.workers import RayVectors, count_cpus, run_on_shards

KEPT_DOCUMENTS = 5
"""Nearest and farthest documents kept of every cluster."""
_MOST_CELLS = 5_000_000
START_ROWS = 100_000
"""Vectors that the start of a fit on all vectors is found on."""

log = logging.getLogger(__name__)


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
    write_text(join(config.output, "report.html"), render_report(report))
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
