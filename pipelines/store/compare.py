"""Two versions of a store side by side, before one is switched for the other.

Neighbours of a sample of documents that both have, how clusters map, which documents moved and
why, recall of search, scores and cost. Memory holds ids, clusters and digests of texts of both
versions (about 100 bytes a document), and vectors of the sample.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.runtime.arrow import column_to_vectors
from pipelines.runtime.command import Answer
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import exists, write_bytes
from pipelines.store.columns import EMBEDDING
from pipelines.store.config import CompareConfig
from pipelines.store.documents import Documents
from pipelines.store.edits import follow, pinned_rows, read_applied
from pipelines.store.index import NEIGHBOURS, unit
from pipelines.store.store import Store
from pipelines.store.version import Version

_LISTED = 25
_DIGEST_BYTES = 8
"""Of a text's SHA-256: enough to tell two texts of one document apart."""
_NO_NEIGHBOURS = {"overlap": None, "standard_error": None, "documents": 0, "neighbours": 0}
_COSTS = ("embedded", "reused", "tokens", "novel")


def compare_versions(config: CompareConfig) -> Answer:
    """The comparison as a table, as JSON, and where asked for as a page."""
    store = Store.open(config.store)
    new, old = store.version(config.version), store.version(config.with_)
    if new.number == old.number:
        raise InputError(f"version {new.number} is compared with itself: name another --with")
    if config.output and exists(config.output):
        raise InputError(f"--output {config.output} is there already: name a new file")
    data = compare(Side.of(old), Side.of(new), sample=config.sample, seed=config.seed)
    rows = summary_rows(data)
    title = f"{config.store}: version {new.number} against {old.number}"
    if config.output:
        write_bytes(config.output, render_page(title, data).encode())
        rows.append(["page", config.output])
    return Answer(data, title, ("", "before", "after"), [[*row, ""][:3] for row in rows])


@dataclass(frozen=True)
class Side:
    """One of the two: a version, or a candidate that is to become one."""

    documents: Documents
    figures: Mapping[str, Any]
    """What its record says of it, as :func:`figures_of` gives it."""
    edits: Sequence[Mapping[str, Any]]
    """People's, as they were applied: rows of ``edits.parquet``."""

    @classmethod
    def of(cls, version: Version) -> Side:
        """A sealed version."""
        record = version.record
        figures = figures_of(
            version.number,
            record.fingerprint,
            counts=record.counts,
            scores=record.scores,
            recall=None if record.index is None else record.index["recall_at_10"],
            reasons=record.reasons,
            seconds=record.details.get("seconds"),
        )
        return cls(version.documents, figures, read_applied(version).to_pylist())


def compare(old: Side, new: Side, *, sample: int, seed: int) -> dict[str, Any]:
    """What is different between two versions; JSON values. ``sample`` 0 leaves out neighbours."""
    if old.documents.schema.field("id").type != new.documents.schema.field("id").type:
        raise InputError("the two versions have ids of different types")
    both = _joined(old.documents, new.documents)
    near = compare_neighbours(old.documents, new.documents, sample=sample, seed=seed)
    return {
        "old": dict(old.figures),
        "new": dict(new.figures),
        "same_encoder": _same_encoder(old, new),
        "documents": {
            "both": len(both),
            "only_old": old.documents.count() - len(both),
            "only_new": new.documents.count() - len(both),
        },
        "neighbours": near,
        "clusters": _flows(both),
        "moved": _moved(old, new, both),
    }


def figures_of(
    version: int,
    fingerprint: str,
    *,
    counts: Mapping[str, int],
    scores: Mapping[str, Any],
    recall: float | None,
    reasons: Sequence[str],
    seconds: float | None,
) -> dict[str, Any]:
    """What is known of a version beside its documents."""
    return {
        "version": version,
        "fingerprint": fingerprint,
        **{name: counts.get(name) for name in ("documents", "passages") if name in counts},
        "scores": dict(scores),
        "recall_at_10": recall,
        "reasons": list(reasons),
        "cost": {name: counts[name] for name in _COSTS if name in counts}
        | ({} if seconds is None else {"seconds": seconds}),
    }


def _same_encoder(old: Side, new: Side) -> bool:
    return old.figures["fingerprint"] == new.figures["fingerprint"]


def _joined(old: Documents, new: Documents) -> pa.Table:
    """id, cluster and digest of the text of documents that both have: ``*_old`` and ``*_new``."""
    before, after = _keys(old), _keys(new)
    place = pc.index_in(after["id"], value_set=before["id"])
    both = pc.is_valid(place)
    before, after = before.take(place.filter(both)), after.filter(both)
    columns = {"id": after["id"]}
    for name in ("cluster", "text"):
        columns |= {f"{name}_old": before[name], f"{name}_new": after[name]}
    return pa.table(columns)


def _keys(documents: Documents) -> pa.Table:
    """id, cluster and the first bytes of the text's hash of every document."""
    types = [documents.schema.field("id").type, pa.int32(), pa.binary(_DIGEST_BYTES)]
    schema = pa.schema(list(zip(["id", "cluster", "text"], types, strict=True)))
    parts = [schema.empty_table()]
    for batch in documents.batches(["id", "cluster_id", "text_sha256"]):
        digits = pc.utf8_slice_codeunits(batch.column("text_sha256"), 0, 2 * _DIGEST_BYTES)
        raw = bytes.fromhex("".join(digits.to_pylist()))
        buffers = [None, pa.py_buffer(raw)]
        text = pa.FixedSizeBinaryArray.from_buffers(schema.field("text").type, len(digits), buffers)
        parts.append(pa.table([batch.column("id"), batch.column("cluster_id"), text], schema))
    return pa.concat_tables(parts)


def compare_neighbours(old: Documents, new: Documents, *, sample: int, seed: int) -> dict[str, Any]:
    """Share of the ten nearest others, by exact search, that a document keeps; with its error.

    Documents are drawn from the old ones; those that the new ones lack are left out.
    """
    if not sample:
        return dict(_NO_NEIGHBOURS)
    random = np.random.default_rng(seed)
    rows = np.sort(random.choice(old.count(), min(sample, old.count()), replace=False))
    drawn = old.at(rows, ["id"])["id"].to_pylist()
    there = set(new.take(drawn, ["id"])["id"].to_pylist())
    chosen = [row_id for row_id in drawn if row_id in there]
    if not chosen or min(old.count(), new.count()) < 2:
        return dict(_NO_NEIGHBOURS)
    nearest = [_nearest(documents, chosen) for documents in (old, new)]
    shares = np.array(
        [len(a & b) / max(1, min(len(a), len(b))) for a, b in zip(*nearest, strict=True)]
    )
    error = float(shares.std(ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else None
    return {
        "overlap": float(shares.mean()),
        "standard_error": error,
        "documents": len(shares),
        "neighbours": NEIGHBOURS,
    }


def _nearest(documents: Documents, chosen: Sequence[Any]) -> list[set[Any]]:
    """For each of these documents the ids of its nearest others, by one pass over all vectors."""
    table = documents.take(chosen, ["id", EMBEDDING])
    own = pa.array(chosen, documents.schema.field("id").type)
    order = pc.index_in(own, table["id"].combine_chunks())
    queries = unit(column_to_vectors(table[EMBEDDING].combine_chunks().take(order)))
    wanted = min(NEIGHBOURS, documents.count() - 1)
    best = np.full((len(queries), wanted), -np.inf, np.float32)
    places = np.full((len(queries), wanted), -1, np.int64)
    start = 0
    for batch in documents.batches(["id", EMBEDDING]):
        cosines = queries @ unit(column_to_vectors(batch.column(EMBEDDING))).T
        query_of = pc.fill_null(pc.index_in(batch.column("id"), own), -1).to_numpy()
        rows = np.flatnonzero(query_of >= 0)
        cosines[query_of[rows], rows] = -np.inf  # itself
        scores = np.hstack([best, cosines])
        numbers = np.broadcast_to(np.arange(start, start + batch.num_rows), cosines.shape)
        keep = np.argpartition(-scores, wanted - 1, axis=1)[:, :wanted]
        best = np.take_along_axis(scores, keep, axis=1)
        places = np.take_along_axis(np.hstack([places, numbers]), keep, axis=1)
        start += batch.num_rows
    different, inverse = np.unique(places, return_inverse=True)
    ids = np.array(documents.at(different, ["id"])["id"].to_pylist(), dtype=object)
    return [set(row.tolist()) for row in ids[inverse.reshape(places.shape)]]


def _flows(both: pa.Table) -> dict[str, Any]:
    """How clusters map: documents by old and new cluster, and where most of each old one went."""
    counts = both.group_by(["cluster_old", "cluster_new"]).aggregate([("id", "count")])
    rows = sorted(
        zip(counts["cluster_old"].to_pylist(), counts["cluster_new"].to_pylist(),
            counts["id_count"].to_pylist(), strict=True),
        key=lambda row: (-row[2], row[0] or 0, row[1] or 0),
    )  # fmt: skip
    stayed = sum(n for before, after, n in rows if before == after)
    return {
        "stayed": stayed,
        "share": stayed / len(both) if len(both) else None,
        "matrix": [{"old": a, "new": b, "documents": n} for a, b, n in rows],
    }


def _moved(old: Side, new: Side, both: pa.Table) -> dict[str, Any]:
    """Documents in another cluster by the reason, and the first of each.

    ``edit``: people put it there, or merged or parted its cluster; ``text``: it has another text;
    ``encoder``: its vector is another encoder's; ``centroid``: only centroids are elsewhere.
    """
    moved = both.filter(pc.not_equal(both["cluster_old"], both["cluster_new"])).sort_by("id")
    reasons = {
        "edit": _by_edit(moved, both, old, new),
        "text": pc.not_equal(moved["text_old"], moved["text_new"]).to_numpy(),
        "encoder": np.full(len(moved), not _same_encoder(old, new)),
        "centroid": np.ones(len(moved), dtype=bool),
    }
    counts, lists = {}, {}
    left = np.ones(len(moved), dtype=bool)
    for why, holds in reasons.items():
        chosen = np.flatnonzero(left & holds)
        left[chosen] = False
        counts[why] = len(chosen)
        first = moved.select(["id", "cluster_old", "cluster_new"]).take(chosen[:_LISTED])
        lists[why] = first.rename_columns(["id", "old", "new"]).to_pylist()
    return {"count": len(moved), "reasons": counts, "first": lists}


def _by_edit(moved: pa.Table, both: pa.Table, old: Side, new: Side) -> np.ndarray:
    """bool (n,): which documents are elsewhere as people pinned them, merged clusters or split one.

    Only an edit that one of the two versions has applied and the other has not makes a difference.
    """
    applied = [
        {row["edit"]: row for row in side.edits if row["status"] == "applied"}
        for side in (old, new)
    ]
    numbers = applied[0].keys() ^ applied[1].keys()
    edits = [row for number, row in (applied[0] | applied[1]).items() if number in numbers]
    pinned = [row["document_id"] for row in edits if row["action"] == "pin"]
    rows = [pinned_rows(pinned, side.documents).values() for side in (old, new)]
    ids = pa.array({i for side in rows for mine in side for i in mine}, moved["id"].type)
    by_edit = pc.is_in(moved["id"], value_set=ids).to_numpy()
    labels: dict[int, int] = {}
    for row in edits:
        if row["action"] == "merge":
            one, other = (follow(labels, cluster) for cluster in row["cluster_ids"])
            labels |= {other: one} if one != other else {}
    split = {row["cluster_ids"][0] for row in edits if row["action"] == "split"}
    there = [set(pc.unique(both[f"cluster_{side}"]).to_pylist()) for side in ("old", "new")]

    def is_of_people(one: int, other: int) -> bool:
        parted = (one in split and other not in there[0]) or (
            other in split and one not in there[1]
        )
        return parted or follow(labels, one) == follow(labels, other)

    pairs = np.stack([moved["cluster_old"].to_numpy(), moved["cluster_new"].to_numpy()])
    flows, flow_of = np.unique(pairs, axis=1, return_inverse=True)
    by_people = np.array([is_of_people(*flow) for flow in flows.T.tolist()], dtype=bool)
    return by_edit | by_people[flow_of.reshape(-1)]


def summary_rows(data: Mapping[str, Any]) -> list[list[str]]:
    """The comparison as rows of a table: what, before, after."""
    old, new = data["old"], data["new"]
    near, moved = data["neighbours"], data["moved"]
    rows = [["version", str(old["version"]), str(new["version"])]]
    rows.append(["encoder", old["fingerprint"][:12], new["fingerprint"][:12]])
    for name in (name for name in ("documents", "passages") if name in new):
        rows.append([name, _text(old.get(name)), _text(new[name])])
    for name in dict.fromkeys([*old["scores"], *new["scores"]]):
        rows.append([name, _text(old["scores"].get(name)), _text(new["scores"].get(name))])
    rows.append(["recall@10 of search", _text(old["recall_at_10"]), _text(new["recall_at_10"])])
    for name in dict.fromkeys([*old["cost"], *new["cost"]]):
        rows.append([name, _text(old["cost"].get(name)), _text(new["cost"].get(name))])
    both = data["documents"]["both"]
    rows.append(["in both", "", f"{both:,}"])
    if near["overlap"] is not None:
        rows.append([f"same {near['neighbours']} nearest", "", describe_neighbours(near)])
    rows.append(["in the same cluster", "", f"{data['clusters']['stayed']:,}"])
    reasons = ", ".join(f"{n:,} {why}" for why, n in moved["reasons"].items() if n)
    rows.append(["moved", "", f"{moved['count']:,}" + (f" ({reasons})" if reasons else "")])
    flows = [f for f in data["clusters"]["matrix"] if f["old"] != f["new"]][:5]
    for flow in flows:
        rows.append([f"cluster {flow['old']} → {flow['new']}", "", f"{flow['documents']:,}"])
    return rows


def describe_neighbours(near: Mapping[str, Any]) -> str:
    """The figures of :func:`compare_neighbours` for people."""
    if near["overlap"] is None:
        return "–"
    error = "" if near["standard_error"] is None else f" ± {near['standard_error']:.3f}"
    return f"{near['overlap']:.3f}{error} ({near['documents']} documents)"


def render_page(title: str, data: Mapping[str, Any]) -> str:
    """One HTML page without scripts; every text is escaped."""
    parts = [f"<h1>{html.escape(title)}</h1>", _table(("", "before", "after"), summary_rows(data))]
    matrix_rows = [
        [_text(flow["old"]), _text(flow["new"]), _text(flow["documents"])]
        for flow in data["clusters"]["matrix"][:500]
    ]
    parts += ["<h2>Clusters</h2>", _table(("before", "after", "documents"), matrix_rows)]
    for why, moves in data["moved"]["first"].items():
        if moves:
            rows = [[_text(m["id"]), _text(m["old"]), _text(m["new"])] for m in moves]
            parts += [f"<h2>Moved: {why}</h2>", _table(("document", "before", "after"), rows)]
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:left}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style>{''.join(parts)}</html>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
