"""The whole job: embeddings on disk in; assignments, centroids, scores and a report out."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.census import (
    AssignPlan,
    Census,
    CensusPlan,
    assign_shard,
    census_from_tables,
    merge_censuses,
)
from cluster.comparison import check_comparable, compare, comparison_section
from cluster.config import AssignConfig, ClusterConfig, Workers
from cluster.document_map import MAP_FILE, MapLayout, join_maps, lay_out, measure_density
from cluster.duplicate_search import Part, SearchPlan, take_rows
from cluster.hierarchy import Nesting, divide, nest
from cluster.kept_columns import read_kept_columns
from cluster.kmeans import (
    TWO_LEVEL_FROM,
    Fit,
    FitOptions,
    by_size,
    fit_in_memory,
    in_order,
    refine_on_all,
)
from cluster.known import ASSIGNMENTS, ENCODER_FILE
from cluster.noise import DenseRegions
from cluster.num_clusters import Candidate, Choice, choose_num_clusters
from cluster.on_ray import RayVectors
from cluster.outcome import Namer, Outcome, describe_outcome, name_clusters, write_tables
from cluster.report import build_report, render_report, shown_documents
from cluster.roll_up import DOCUMENT, roll_up_passages
from cluster.sample import SamplePlan, Scan, merge_scans, scan_from_tables, scan_shard
from cluster.vector_duplicates import search_vectors
from cluster.vectors import Columns, Shard, VectorSource, open_vectors, read_centroids
from cluster.work import WORK_FOLDER, Work, remove_stale
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    exists,
    join,
    make_folder,
    open_filesystem,
    read_bytes,
    read_table,
    state_mark,
    write_bytes,
)
from pipelines.runtime.machines import find_nodes
from pipelines.runtime.run_record import RunRecord, deciding_settings
from pipelines.runtime.table_view import TableView
from pipelines.runtime.tables import lance_state, open_lance

log = logging.getLogger(__name__)

NOT_KEPT = Work()
"""Where nothing is kept of what is done."""
KEPT_DOCUMENTS = 5
"""Nearest and farthest documents kept of every cluster."""
_MOST_CELLS = 5_000_000
START_ROWS = 100_000
"""Vectors that the start of a fit on all vectors is found on."""


def cluster_corpus(
    config: ClusterConfig, record: RunRecord | None = None, *, namer: Namer | None = None
) -> JobResult:
    """Cluster the vectors of ``config.embeddings`` into the folder ``config.output``.

    Goes on with what an earlier run of the same vectors and code has left there. Needs a running
    Ray; ``record`` is the open run record, which takes what this returns. ``namer`` is asked for
    names, and first of all whether it can be asked. Raises :class:`InputError` for vectors or
    settings that cannot be used.
    """
    source = find_source(config)
    digest = digest_of(source)
    if done := Work.confirm(record, config.output, "vectors_digest", digest):
        return done
    if config.compare is not None:
        check_comparable(config.compare)
    if namer is not None:
        namer.check()
    work = Work.begin(config.output, {"vectors": digest, "settings": deciding_settings(config)})
    outcome, layout = find_clusters(source, config, work)
    if namer is not None:
        outcome = name_clusters(outcome, namer)
    map_path = join(config.output, MAP_FILE)
    columns = read_kept_columns(map_path, shown_documents(outcome, layout).ids)
    write_tables(outcome, config.output, columns)
    encoder = join(config.embeddings, ENCODER_FILE)
    if exists(encoder):
        write_bytes(join(config.output, ENCODER_FILE), read_bytes(encoder))
    changes = None
    if config.compare is not None:
        compared = compare(config.output, len(outcome.clusters), config.compare)
        changes = comparison_section(compared, outcome.clusters)
    density = measure_density(map_path, layout.points)
    report = build_report(
        outcome, asdict(config), layout, changes=changes, density=density, columns=columns
    )
    page = join(config.output, "report.html")
    write_bytes(page, render_report(report).encode())
    result = JobResult(
        outcome.counts(),
        {"scores": outcome.scores, "vectors_digest": digest},
        {**outcome.summary(), "report": page},
    )
    result = roll_up_passages(result, config.output, source, work, **pool_of(config))
    if record is not None:
        record.complete(result.counts, result.metrics)
    work.end()
    return result


def find_clusters(
    source: VectorSource, config: ClusterConfig, work: Work
) -> tuple[Outcome, MapLayout]:
    """Scan, fit, assign and describe; what ``work`` holds is not done again."""
    scan = scan_corpus(source, config, work)
    choice = choose_levels(scan, config, work)
    levels = [choice.k] if choice is not None else config.levels()
    _check_table_of_labels(scan, levels, config)
    finest, groups = kept_fit(source, scan, levels, config, work)
    fits, nesting = nest(finest, groups, unit_norm=source.unit_norm)
    sample = mapped_sample(scan, config)
    layout = MapLayout(**work.once("layout", lambda: vars(lay_out(sample, config.seed))))
    regions = dense_regions(scan, config, work)
    census = assign_corpus(source, scan, fits, nesting, layout, regions, config, work)
    outcome = describe_outcome(
        scan,
        fits,
        choice,
        census,
        nesting=nesting,
        documents=config.sample_documents,
        has_labels=config.label_column is not None,
        similarity=config.duplicate_similarity or None,
        fingerprint=source.fingerprint,
        duplicates=duplicates_among_all(source, scan, config, work),
        regions=regions,
    )
    return outcome, layout


def dense_regions(scan: Scan, config: ClusterConfig, work: Work) -> DenseRegions | None:
    """What tells noise, where it is asked for."""
    if not config.noise:
        return None
    sample = scan.sample
    learn = partial(DenseRegions.learn, sample.vectors, sample.orders, config.seed)
    return DenseRegions(**work.once("noise", lambda: vars(learn())))


def mapped_sample(scan: Scan, config: ClusterConfig) -> np.ndarray:
    """float32 (m, d): the documents that are laid out, of which the report's map consists."""
    return scan.sample.head(min(config.map_documents, config.sample_documents)).vectors


def duplicates_among_all(
    source: VectorSource, scan: Scan, config: ClusterConfig, work: Work
) -> pa.Table | None:
    """``near_duplicates.parquet`` by all vectors; None where the sample holds them all, or none.

    Their order is that of the sample, so that the two agree.
    """
    if not config.duplicate_similarity or work.folder is None or scan.rows <= len(scan.sample):
        return None
    plan = SearchPlan(config.duplicate_similarity, "hash", config.seed)
    search = search_vectors(source, plan, join(work.folder, "duplicates"))
    removed = np.flatnonzero(search.decisions.keepers >= 0)
    positions = search.order.positions()
    folder = join(config.output, "assignments")

    def read(part: Part) -> pa.Table:
        path = join(folder, f"{source.shards[part.shard].name}.parquet")
        return read_table(path, ["id", "cluster_id"])

    ids = pa.array([], source.id_kind)
    empty = pa.table({"id": ids, "cluster_id": pa.array([], pa.int32())})
    take = partial(take_rows, search.order.parts, read=read, empty=empty)
    rows = take(positions[removed])
    return pa.table(
        {
            "id": rows["id"],
            "duplicate_of": take(positions[search.decisions.keepers[removed]])["id"],
            "similarity": search.decisions.similarities[removed],
            "cluster_id": rows["cluster_id"],
        }
    )


_GROUP = "group-"


def kept_fit(
    source: VectorSource, scan: Scan, levels: Sequence[int], config: ClusterConfig, work: Work
) -> tuple[Fit, dict[int, np.ndarray]]:
    """What :func:`fit_levels` gives, now or in the run that this one goes on with."""

    def fit() -> dict[str, Any]:
        start = load_start(config, source, levels[-1])
        finest, groups = fit_levels(source, scan, levels, config, start)
        return {**vars(finest), **{f"{_GROUP}{k}": group for k, group in groups.items()}}

    kept = work.once("fit-" + "-".join(map(str, levels)), fit)
    groups = {int(k.removeprefix(_GROUP)): v for k, v in kept.items() if k.startswith(_GROUP)}
    return Fit(**{k: v for k, v in kept.items() if not k.startswith(_GROUP)}), groups


def digest_of(source: VectorSource) -> str:
    """SHA-256 of the state of all files: path, size and time of change, of Lance its version too.

    Where a filesystem tells neither times of change nor ETags, it is another every time: nothing
    says then that the files are as they were.
    """
    filesystem, _ = open_filesystem(source.uri)
    pieces = {piece.path: piece for shard in source.shards for piece in shard.pieces}
    plain = [path for path, piece in pieces.items() if piece.version is None]
    about = {info.path: info for info in filesystem.get_file_info(plain)}
    marks = {path: state_mark(filesystem, info) for path, info in about.items()}
    untimed = [path for path, mark in marks.items() if mark is None]
    if untimed:
        log.warning(
            "%s tells no time of change of %d files, such as %s: whether they are as they were is "
            "not known, so a stopped run begins again and a complete one is of other vectors",
            source.uri, len(untimed), untimed[0],
        )  # fmt: skip
    state = [
        [path, piece.version, *lance_state(open_lance(path, piece.version))]
        if piece.version is not None
        else [path, about[path].size, marks[path], *(piece.view or TableView()).state]
        for path, piece in sorted(pieces.items())
    ]
    if untimed:
        state.append([uuid.uuid4().hex])
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def open_documents(config: ClusterConfig | AssignConfig, columns: Columns) -> VectorSource:
    """The vectors that ``config`` names, with texts and documents' ids where they have them."""
    return open_vectors(
        config.embeddings,
        columns,
        optional_text=config.text_column,
        optional_document=DOCUMENT,
        version=config.version,
    )


def find_source(config: ClusterConfig) -> VectorSource:
    """The vectors that ``config`` names, checked but not read."""
    columns = Columns(
        config.id_column, config.embedding_column, None, config.label_column, config.keep_columns
    )
    source = open_documents(config, columns)
    if source.columns.text is None:
        log.info("no column %r: the report has no keywords and no texts", config.text_column)
        if config.name_model is not None:
            raise InputError(
                f"--name-model names clusters by their texts, but {config.embeddings} has no "
                f"column {config.text_column!r}: name one with --text-column, or leave "
                "--name-model out"
            )
    return replace(source, unit_norm=config.metric == "cosine", drop_bad=config.drop_bad_vectors)


def scan_corpus(source: VectorSource, config: ClusterConfig, work: Work = NOT_KEPT) -> Scan:
    """Check every vector once and draw the sample."""
    rows = config.fit_rows() or START_ROWS
    wanted = max(rows, config.sample_documents, config.map_documents)
    plan = SamplePlan(source.rows, wanted, config.sample_documents, config.seed)
    scanned = partial(scan_shard, source, plan=plan)
    tables = work.on_shards("scan", scanned, source.shards, **pool_of(config))
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


def choose_levels(scan: Scan, config: ClusterConfig, work: Work = NOT_KEPT) -> Choice | None:
    """The number of clusters that suits the sample, where none was given."""
    if config.levels():
        return None

    def choose() -> dict[str, Any]:
        choice = choose_num_clusters(
            scan.sample.vectors, fit_options(2, config), most=config.max_clusters or None
        )
        tried = [asdict(candidate) for candidate in choice.candidates]
        return {**vars(choice), "candidates": json.dumps(tried)}

    kept = work.once("choice", choose)
    tried = [Candidate(**candidate) for candidate in json.loads(kept["candidates"])]
    choice = Choice(kept["k"], kept["reason"], tried)
    log.info("%s", choice.reason)
    return choice


def fit_levels(
    source: VectorSource,
    scan: Scan,
    levels: Sequence[int],
    config: ClusterConfig,
    start: np.ndarray | None = None,
) -> tuple[Fit, dict[int, np.ndarray]]:
    """The finest of ``levels``, ascending, and where its clusters lie in the others.

    Centroids come from the sample or (``--fit all``) from every vector. With ``start``, float32
    (k, d), the fit goes on from there and keeps that order.
    """
    k, rows = levels[-1], config.fit_rows()
    vectors = scan.sample.head(rows or START_ROWS).vectors
    options = fit_options(k, config)
    log.info("fitting %d centroids on %d of %d vectors", k, len(vectors), scan.rows)
    groups: dict[int, np.ndarray] = {}
    if len(levels) > 1:
        fit, groups = divide(vectors, levels, options)
    elif rows is None and start is not None:
        fit = Fit.standing(start)
    else:
        fit = fit_in_memory(vectors, k, options, start=start)
    if rows is None:
        everything = RayVectors(source, count=scan.rows, largest=scan.largest, **pool_of(config))
        try:
            fit = refine_on_all(everything, fit, options)
        finally:
            everything.close()
    if start is not None:
        return fit, groups
    order = by_size(fit)
    return in_order(fit, order), {level: group[order] for level, group in groups.items()}


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
    start, fingerprint = read_centroids(config.initial_centroids)
    if None not in (fingerprint, source.fingerprint) and fingerprint != source.fingerprint:
        raise InputError(
            f"{config.initial_centroids} holds centroids of vectors with fingerprint "
            f"{fingerprint}, {config.embeddings} vectors with {source.fingerprint}: centroids of "
            "another encoder mean nothing here. Leave --initial-centroids out"
        )
    if start.shape != (k, source.dimension):
        raise InputError(
            f"{config.initial_centroids} holds {start.shape[0]} centroids of {start.shape[1]} "
            f"numbers; required are {k} of {source.dimension}"
        )
    return start


def assign_corpus(
    source: VectorSource,
    scan: Scan,
    fits: Mapping[int, Fit],
    nesting: Nesting,
    layout: MapLayout,
    regions: DenseRegions | None,
    config: ClusterConfig,
    work: Work,
) -> Census:
    """Assign every document, one file of ``assignments/`` a shard, and place it on the map."""
    folder = join(config.output, "assignments")
    map_folder = join(config.output, WORK_FOLDER, "map")
    levels = {k: fit.centroids for k, fit in fits.items()}
    largest = max(scan.largest, max(float(np.abs(c).max()) for c in levels.values()))
    longest = 2 * largest * float(np.sqrt(source.dimension))
    ascending = tuple(sorted(levels))
    counted = CensusPlan(ascending, KEPT_DOCUMENTS, scan.rows, longest, regions is not None)
    sample = mapped_sample(scan, config)
    plan = AssignPlan(levels, nesting.groups, counted, sample, layout.points, config.seed, regions)
    for name in (folder, map_folder):
        make_folder(name)
    assign = partial(_assign_to_files, source, plan, folder, map_folder)
    stage = f"assign-{plan.digest()}"
    tables = work.on_shards(stage, assign, source.shards, **pool_of(config))
    census = merge_censuses([census_from_tables(table, counted) for table in tables])
    if census.documents != scan.rows:
        raise RuntimeError(
            f"{scan.rows:,} documents were read and {census.documents:,} assigned: the vectors "
            "changed meanwhile. Run again"
        )
    written = {f"{shard.name}.parquet" for shard in source.shards}
    remove_stale(folder, ASSIGNMENTS, written)
    parts = [join(map_folder, f"{shard.name}.parquet") for shard in source.shards]
    join_maps(parts, join(config.output, MAP_FILE))
    return census


def _assign_to_files(
    source: VectorSource, plan: AssignPlan, folder: str, map_folder: str, shard: Shard
) -> Census:
    name = f"{shard.name}.parquet"
    return assign_shard(source, shard, plan, join(folder, name), join(map_folder, name))


def pool_of(config: Workers) -> dict[str, Any]:
    """The size of the pool of workers, as :func:`run_on_shards` takes it."""
    workers = config.num_workers or max(1, int(find_nodes().cpus / config.cpus_per_worker))
    return {
        "num_workers": workers,
        "num_cpus": config.cpus_per_worker,
        "num_gpus": config.gpus_per_worker,
    }
