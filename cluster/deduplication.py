"""The whole job: a corpus in; what to remove, what to keep, and a page to judge it by, out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.clean import write_clean
from cluster.clustering import digest_of
from cluster.config import DeduplicateConfig
from cluster.duplicate_report import Judged, render_page
from cluster.duplicate_search import (
    Order,
    Part,
    Search,
    SearchPlan,
    owners_of,
    take_rows,
)
from cluster.duplicates import Pairs, decide, no_decisions
from cluster.text_duplicates import open_texts, search_texts
from cluster.vector_duplicates import search_vectors
from cluster.vector_files import Columns, read_batches
from cluster.vectors import VectorSource, open_vectors, shorten_texts
from cluster.work import Work, remove_stale
from pipelines.runtime.arrow import plain_column
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    atomic_output,
    join,
    make_folder,
    open_filesystem,
    read_bytes,
    write_bytes,
    write_table,
)
from pipelines.runtime.run_record import RunRecord, read_run, require_complete
from pipelines.runtime.segments import bytes_to_table, read_segment, table_to_bytes
from pipelines.runtime.units import Receipt, run_stage

log = logging.getLogger(__name__)

THRESHOLDS = (*(i / 100 for i in range(80, 100)), 0.995, 0.999)
"""Similarities that the curve speaks of."""
_PAIRS_SHOWN = 4
_EXCERPT = 400
_READ_ROWS = 4_096


def deduplicate_corpus(config: DeduplicateConfig, record: RunRecord | None = None) -> JobResult:
    """Find what is to be removed of ``config.embeddings`` and write it to ``config.output``.

    Needs a running Ray. Raises :class:`InputError` for documents or settings that cannot be used.
    """
    source = open_source(config, config.embeddings)
    other = open_other(config, source)
    digest = digest_of(source) + ("" if other is None else digest_of(other))
    if done := Work.confirm(record, config.output, "vectors_digest", digest):
        return done
    work = Work.begin(config.output, {"vectors": digest, "settings": _plain(config)})
    assert work.folder is not None
    search, below = find(config, source, other, work.folder)
    sources = (source,) if other is None else (source, other)
    removed = write_lists(search, config, work.folder)
    curve = curve_table(search, config.threshold())
    write_table(join(config.output, "curve.parquet"), curve)
    parts = search.order.parts
    write_clean(parts, source, config.output, work.folder, wanted=config.write_clean)
    counts = _counts(search, removed)
    metrics = _metrics(search, config, digest)
    pairs = border_pairs(search, below, config, sources, work.folder)
    judged = Judged(asdict(config), config.threshold(), counts, metrics, curve, pairs)
    page = join(config.output, "report.html")
    write_bytes(page, render_page(judged).encode())
    work.end()
    return JobResult(counts, metrics, {**_summary(counts, metrics), "report": page})


def _plain(config: DeduplicateConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "output"}


def open_source(config: DeduplicateConfig, uri: str) -> VectorSource:
    """The documents at ``uri``, checked but not read."""
    own = uri == config.embeddings
    key = config.keep.partition(":")[2] if own else ""
    compared = config.text_column if config.method == "text" else config.embedding_column
    columns = Columns(config.id_column, compared, keep=(key,) if key else (), keep_flag="--keep")
    if config.method == "text":
        return open_texts(uri, columns)
    if config.keep == "longest" and own:
        columns = replace(columns, text=config.text_column)
    source = open_vectors(uri, columns, optional_text=config.text_column)
    return replace(source, drop_bad=config.drop_bad_vectors)


def open_other(config: DeduplicateConfig, source: VectorSource) -> VectorSource | None:
    """The set of ``--against``, made by the same encoder."""
    if config.against is None:
        return None
    if read_run(config.against) is not None:
        require_complete(config.against)
    other = open_source(config, config.against)
    if other.dimension != source.dimension:
        raise InputError(
            f"{config.against} holds vectors of {other.dimension} numbers, {config.embeddings} of "
            f"{source.dimension}: embed both with one encoder"
        )
    if other.fingerprint and source.fingerprint and other.fingerprint != source.fingerprint:
        raise InputError(
            f"{config.against} was embedded with fingerprint {other.fingerprint}, "
            f"{config.embeddings} with {source.fingerprint}: embed both with one encoder"
        )
    return other


def find(
    config: DeduplicateConfig, source: VectorSource, other: VectorSource | None, work: str
) -> tuple[Search, Pairs | None]:
    """The search, and verified pairs below the threshold where it meets any."""
    plan = SearchPlan(config.threshold(), config.keep, config.seed)
    if config.method == "text":
        return search_texts(source, plan, work, against=other)
    return search_vectors(source, plan, work, against=other), None


def write_lists(search: Search, config: DeduplicateConfig, work: str) -> pa.Table:
    """Write ``removed.parquet``, ``kept.parquet`` and, where there are any, ``rejected.parquet``.

    Removed ones stand by group, then in the order of the rule; returns their table.
    """
    order, decisions = search.order, search.decisions
    ranks = np.flatnonzero(decisions.keepers >= 0)
    keepers = decisions.keepers[ranks]
    by_group = np.lexsort((ranks, keepers))
    ranks, keepers = ranks[by_group], keepers[by_group]
    positions = order.positions()
    groups = np.unique(keepers, return_inverse=True)[1]
    same = order.same_as[ranks] == order.same_as[keepers]
    kind = np.where(same, "identical", "similar")
    if config.against is not None:
        kind = np.char.add(kind, " to one of --against")
    id_type = order.rejected.schema.field("id").type
    removed = pa.table(
        {
            "id": take_ids(order.parts, positions[ranks], work, id_type),
            "kept_id": take_ids(order.parts, positions[keepers], work, id_type),
            "group_id": pa.array(groups, pa.int64()),
            "similarity": pa.array(decisions.similarities[ranks]),
            "reason": pa.array(kind.tolist(), pa.string()),
        }
    )
    write_table(join(config.output, "removed.parquet"), removed)
    written = {"removed.parquet", "kept.parquet", "curve.parquet"}
    if len(order.rejected):
        write_table(join(config.output, "rejected.parquet"), order.rejected.sort_by("id"))
        written.add("rejected.parquet")
    remove_stale(config.output, r"rejected\.parquet", written)
    write_kept(order, decisions.keepers < 0, config.output, work)
    return removed


def write_kept(order: Order, kept: np.ndarray, output: str, work: str) -> None:
    """``kept.parquet``, in corpus order, and for the workers which ids of each shard stay."""
    parts = [part for part in order.parts if not part.source]
    schema = pa.schema([("id", order.rejected.schema.field("id").type)])
    with (
        atomic_output(join(output, "kept.parquet")) as stream,
        pq.ParquetWriter(stream, schema) as writer,
    ):
        for part in parts:
            table = read_segment(join(work, "rows", part.name), 0)
            if table is None:
                continue
            own = kept[order.ranks[part.start : part.start + part.rows]]
            ids = table.select(["id"]).filter(pa.array(own))
            writer.write_table(ids)
            write_bytes(join(work, "kept", part.name), table_to_bytes(ids))


def take_ids(
    parts: Sequence[Part], positions: np.ndarray, work: str, empty: pa.DataType | None = None
) -> pa.Array:
    """The ids at ``positions``, which are of one source; of type ``empty`` where there are none."""

    def read(part: Part) -> pa.Table:
        table = read_segment(join(work, "rows", part.name), 0)
        assert table is not None
        return table.select(["id"])

    none = pa.table({"id": pa.array([], empty or pa.string())})
    return take_rows(parts, positions, read, none)["id"].combine_chunks()


def curve_table(search: Search, similarity: float) -> pa.Table:
    """``curve.parquet``: what each threshold would remove.

    From the similarity sought on it is counted (``exact``, unless a document has more alike than
    were listed); below it is the share of a sample that has an earlier document so similar, of
    which a little less would be removed. Null where nothing is known.
    """
    order = search.order
    rows: list[tuple[float, int | None, float | None, bool]] = []
    documents = len(order.ranks) - order.fixed
    comparable = documents - int(order.empty[order.fixed :].sum())
    checked = search.checked
    others = [threshold for threshold in THRESHOLDS if abs(threshold - similarity) > 1e-9]
    for threshold in sorted([*others, similarity]):
        if threshold >= similarity:
            kept = search.pairs.similarities >= np.float32(threshold)
            pairs = Pairs(
                search.pairs.later[kept],
                search.pairs.earlier[kept],
                search.pairs.similarities[kept],
                np.empty(0, dtype=np.int64),
            )
            expanded = order.expand(decide(pairs, no_decisions(len(order.ranks))))
            removed = int((expanded.keepers >= 0).sum())
            if threshold == similarity:
                removed = int((search.decisions.keepers >= 0).sum())
            rows.append((threshold, removed, removed / documents, not len(search.pairs.overfull)))
        elif checked is not None and len(checked.ranks):
            estimate = float((checked.similarities >= threshold).mean()) * comparable
            rows.append((threshold, round(estimate), estimate / documents, False))
        else:
            rows.append((threshold, None, None, False))
    names = ("similarity", "removed", "share", "exact")
    kinds = (pa.float64(), pa.int64(), pa.float64(), pa.bool_())
    columns = zip(*rows, strict=True)
    return pa.table({n: pa.array(c, t) for n, c, t in zip(names, columns, kinds, strict=True)})


def border_pairs(
    search: Search,
    below: Pairs | None,
    config: DeduplicateConfig,
    sources: Sequence[VectorSource],
    work: str,
) -> list[dict[str, Any]]:
    """For each threshold a few pairs whose similarity lies next to it, with their texts."""
    later, earlier = [search.pairs.later], [search.pairs.earlier]
    scores = [search.pairs.similarities]
    if below is not None:
        later.append(below.later)
        earlier.append(below.earlier)
        scores.append(below.similarities)
    if search.checked is not None:
        near = search.checked.similarities < config.threshold()
        near &= search.checked.nearest >= 0
        later.append(search.checked.ranks[near])
        earlier.append(search.checked.nearest[near])
        scores.append(search.checked.similarities[near])
    ranks = np.stack([np.concatenate(later), np.concatenate(earlier)])
    similarities = np.concatenate(scores)
    chosen = _next_to_thresholds(similarities, config.threshold())
    positions = search.order.positions()[ranks[:, chosen]]
    shown = [
        take_ids(search.order.parts, side, work).to_pylist() if len(side) else []
        for side in positions
    ]
    texts = read_excerpts(search.order.parts, positions.ravel(), sources, config, work)
    half = len(chosen)
    return [
        {
            "similarity": float(similarities[place]),
            "id": shown[0][i],
            "text": texts[i],
            "kept_id": shown[1][i],
            "kept_text": texts[half + i],
        }
        for i, place in enumerate(chosen)
    ]


def _next_to_thresholds(similarities: np.ndarray, similarity: float) -> np.ndarray:
    """Places of the pairs nearest to each threshold, by rising similarity."""
    wanted: set[int] = set()
    for threshold in (*THRESHOLDS, similarity):
        distance = np.abs(similarities - np.float32(threshold))
        nearest = np.argsort(distance, kind="stable")[:_PAIRS_SHOWN]
        wanted.update(int(i) for i in nearest if distance[i] <= 0.01)
    places = np.array(sorted(wanted), dtype=np.int64)
    return places[np.argsort(similarities[places], kind="stable")]


def read_excerpts(
    parts: Sequence[Part],
    positions: np.ndarray,
    sources: Sequence[VectorSource],
    config: DeduplicateConfig,
    work: str,
) -> list[str | None]:
    """The beginning of the text at each position; None where there are no texts."""
    has_texts = [config.method == "text" or source.columns.text for source in sources]
    owners = owners_of(parts, positions)
    wanted: dict[str, list[int]] = {}
    for number in np.unique(owners).tolist():
        if has_texts[parts[number].source]:
            own = np.unique(positions[owners == number])
            wanted[parts[number].name] = [parts[number].source, parts[number].shard, *own.tolist()]
    make_folder(join(work, "texts"))
    run_stage(work, "excerpts", wanted, partial(_excerpts, sources, parts, config, work))
    texts: dict[int, str | None] = {}
    for name, (_, _, *places) in wanted.items():
        table = bytes_to_table(read_bytes(join(work, "texts", name)))
        texts.update(zip(places, table["text"].to_pylist(), strict=True))
    return [texts.get(int(position)) for position in positions]


def _excerpts(
    sources: Sequence[VectorSource],
    parts: Sequence[Part],
    config: DeduplicateConfig,
    work: str,
    name: str,
    unit: list[int],
) -> Receipt:
    source, part = sources[unit[0]], next(part for part in parts if part.name == name)
    wanted = np.array(unit[2:])
    ids = take_ids((part,), wanted, work)
    columns = Columns(config.id_column, config.text_column)
    texts: dict[Any, str | None] = {}
    for piece in source.shards[unit[1]].pieces:
        filesystem = open_filesystem(source.uri)[0]
        for batch in read_batches(filesystem, piece, columns, _READ_ROWS, vectors=False):
            own = plain_column(batch.column(columns.id)).cast(source.id_kind)
            mask = pc.is_in(own, value_set=ids)
            if pc.any(mask).as_py():
                rows = batch.filter(mask)
                cut = shorten_texts(plain_column(rows.column(config.text_column)), _EXCERPT)
                texts.update(zip(own.filter(mask).to_pylist(), cut.to_pylist(), strict=True))
    table = pa.table({"text": pa.array([texts.get(i) for i in ids.to_pylist()], pa.string())})
    write_bytes(join(work, "texts", name), table_to_bytes(table), create_folder=False)
    return {"texts": len(table)}


def _counts(search: Search, removed: pa.Table) -> dict[str, int]:
    order = search.order
    documents = len(order.ranks) - order.fixed
    counts = {
        "documents": documents + len(order.rejected),
        "kept": documents - len(removed),
        "removed": len(removed),
        "groups": pc.count_distinct(removed["group_id"]).as_py(),
        "rejected": len(order.rejected),
        "not_comparable": int(order.empty[order.fixed :].sum()),
    }
    return counts | ({"against": order.fixed} if order.fixed else {})


def _metrics(search: Search, config: DeduplicateConfig, digest: str) -> dict[str, Any]:
    record: dict[str, Any] = {
        "vectors_digest": digest,
        "similarity": config.threshold(),
        "rounds": search.rounds,
    }
    if search.checked is not None:
        removed, ought = search.checked.recall(search.decisions)
        record["recall"] = {
            "value": removed / ought if ought else None,
            "removed": removed,
            "expected": ought,
            "sample": len(search.checked.ranks),
        }
    return record


def _summary(counts: dict[str, int], metrics: dict[str, Any]) -> dict[str, str]:
    share = counts["removed"] / max(1, counts["documents"])
    summary = {
        "documents": f"{counts['documents']:,}",
        "kept": f"{counts['kept']:,}",
        "removed": f"{counts['removed']:,} ({share:.1%}) in {counts['groups']:,} groups",
    }
    if counts["not_comparable"]:
        summary["nothing to compare"] = f"{counts['not_comparable']:,}, kept"
    recall = metrics.get("recall")
    if recall and recall["expected"]:
        summary["checked by brute force"] = (
            f"{recall['removed']} of {recall['expected']} expected removals "
            f"among {recall['sample']:,} documents"
        )
    return summary
