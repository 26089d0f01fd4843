"""One HTML page that a person opens: no network, no server, under 5 MB for any corpus."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import vl_convert

from cluster.census import Census
from cluster.describe import Description, Example
from cluster.layout import MapLayout
from cluster.metrics import LABEL_SCORES, MEANINGS

SHOWN_CLUSTERS = 500
MAP_TEXT_BYTES = 1_000_000
EXAMPLE_TEXT_BYTES = 1_400_000
_FOLDER = Path(__file__).parent
_CONFUSION_CELLS = 3_000
_SIZE_BARS = 1_000


@dataclass(frozen=True)
class MappedDocuments:
    """The documents on the map."""

    layout: MapLayout
    cluster_ids: np.ndarray
    """int (n,)."""
    ids: Sequence[Any]
    texts: Sequence[str | None] | None


@dataclass(frozen=True)
class Listing:
    """A small table of the page."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    lead: str
    notices: list[str]
    census: Census
    clusters: list[Description]
    scores: dict[str, Any]
    mapped: MappedDocuments
    facts: dict[str, str]
    """How the result was made, setting by setting."""
    curve: list[dict[str, float]] | None = None
    """For every number of clusters tried: k, silhouette, stability, elbow."""
    curve_note: str = ""
    levels: Sequence[dict[str, Any]] = ()
    lists: Sequence[Listing] = ()
    has_texts: bool = True


def render_report(report: Report) -> str:
    """The page as HTML; every text in it is escaped."""
    shown = sorted(report.clusters, key=lambda c: (-c.size, c.cluster_id))[:SHOWN_CLUSTERS]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        title=report.title,
        lead=report.lead,
        notices=report.notices,
        figures=_figures(report),
        map_note=_map_note(report),
        map_size=f"{len(report.mapped.cluster_ids):,}",
        columns=_columns(report),
        rows=_rows(report, shown),
        table_note=_table_note(report, shown),
        has_texts=report.has_texts,
        has_labels=bool(report.census.labels),
        scores=_score_cards(report.scores),
        even_size=f"{report.census.sizes.mean():,.0f}",
        has_curve=report.curve is not None,
        curve_note=report.curve_note,
        has_levels=bool(report.levels),
        levels=report.levels,
        confusion_note=_confusion_note(report),
        lists=[_listing(listing) for listing in report.lists],
        facts=list(report.facts.items()),
        css=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        javascript=(_FOLDER / "report.js").read_text(encoding="utf-8"),
        vega_bundle=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
            "</script", "<\\/script"
        ),
        data_json=_inline_json(_page_data(report, shown)),
    )


@functools.cache
def _chart_library() -> str:
    """Vega and Vega-Embed as one script, so that the page opens without a network."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def _inline_json(data: object) -> str:
    """JSON that no HTML parser can take for markup, whatever the texts in it hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _page_data(report: Report, shown: list[Description]) -> dict[str, Any]:
    examples = sum(len(c.central) + len(c.diverse) for c in shown)
    room = EXAMPLE_TEXT_BYTES // max(1, examples)
    points = np.round(report.mapped.layout.points.astype(np.float64), 3)
    map_room = min(240, MAP_TEXT_BYTES // max(1, len(points)))
    texts = report.mapped.texts or [None] * len(points)
    size_step = -(-len(report.census.sizes) // _SIZE_BARS)
    return {
        "numClusters": len(report.census.sizes),
        "hasTexts": report.has_texts,
        "clusters": [_cluster_data(cluster, min(600, room)) for cluster in shown],
        "map": {
            "x": points[:, 0].tolist(),
            "y": points[:, 1].tolist(),
            "cluster": report.mapped.cluster_ids.tolist(),
            "text": [_cut(text, map_room) for text in texts],
            "id": [_cut(str(value), 64) for value in report.mapped.ids],
        },
        "sizes": np.sort(report.census.sizes)[::-1][::size_step].tolist(),
        "sizeStep": size_step,
        "curve": report.curve,
        "curveTicks": _ticks([int(row["k"]) for row in report.curve or ()]),
        "confusion": _confusion(report.census),
    }


def _cluster_data(cluster: Description, room: int) -> dict[str, Any]:
    def examples(found: list[Example]) -> list[dict[str, Any]]:
        return [
            {
                "id": _cut(str(example.id), 64),
                "distance": example.distance,
                "text": _cut(example.text, room),
                "label": _cut(example.label, 64),
            }
            for example in found
        ]

    return {
        "id": cluster.cluster_id,
        "size": cluster.size,
        "share": cluster.share,
        "keywords": [_cut(word, 48) for word in cluster.keywords],
        "label": _cut(cluster.top_label, 64),
        "labelShare": cluster.top_label_share,
        "central": examples(cluster.central),
        "diverse": examples(cluster.diverse),
    }


def _listing(listing: Listing) -> Listing:
    """The same with every cell short enough for a page."""
    rows = [tuple(_cut(str(cell), 200) for cell in row) for row in listing.rows]
    return replace(listing, rows=rows)


def _figures(report: Report) -> list[dict[str, str]]:
    sizes = report.census.sizes
    figures = [
        {"name": "documents", "value": f"{int(sizes.sum()):,}"},
        {"name": "clusters", "value": f"{len(sizes):,}"},
        {"name": "smallest and largest", "value": f"{sizes.min():,} – {sizes.max():,}"},
    ]
    against = report.scores["labels"] or {}
    for name, values in (("v_measure", against), ("silhouette", report.scores["internal"])):
        if values.get(name) is not None:
            figures.append({"name": MEANINGS[name].title, "value": f"{values[name]:.3f}"})
    return figures


def _columns(report: Report) -> list[dict[str, str]]:
    columns = [{"key": "id", "title": "Cluster"}, {"key": "size", "title": "Documents"}]
    if report.has_texts:
        columns.append({"key": "keywords", "title": "Keywords"})
    if report.census.labels:
        columns.append({"key": "label", "title": "Most frequent label"})
    columns.append({"key": "spread", "title": "Mean distance"})
    return columns


def _rows(report: Report, shown: list[Description]) -> list[dict[str, Any]]:
    largest = max(1, int(report.census.sizes.max()))
    return [
        {
            "id": cluster.cluster_id,
            "size": cluster.size,
            "size_text": f"{cluster.size:,}",
            "bar": round(100 * cluster.size / largest, 1),
            "keywords": ", ".join(_cut(word, 48) or "" for word in cluster.keywords),
            "label": _cut(cluster.top_label, 64) or "",
            "label_share": f"{cluster.top_label_share:.0%}" if cluster.top_label_share else "",
            "spread": cluster.mean_distance if cluster.mean_distance is not None else -1,
            "spread_text": f"{cluster.mean_distance:.3f}"
            if cluster.mean_distance is not None
            else "–",
            "excerpt": _cut(cluster.central[0].text, 140) if cluster.central else "",
        }
        for cluster in shown
    ]


def _score_cards(scores: dict[str, Any]) -> list[dict[str, str]]:
    cards = []
    labelled = scores["labels"] or {}
    for name, meaning in MEANINGS.items():
        against = name in LABEL_SCORES
        if against and not labelled:
            continue
        value = labelled.get(name) if against else scores["internal"][name]
        size = labelled["labelled_documents"] if against else scores["internal"]["sample_size"]
        note = scores["undefined"].get(name, f"{size:,} documents.")
        error = scores["internal"].get(f"{name}_standard_error")
        cards.append(
            {
                "title": meaning.title,
                "value": _figure(value),
                "error": f"{error:.3f}" if error is not None else "",
                "says": meaning.says[0].upper() + meaning.says[1:],
                "range": meaning.range,
                "better": meaning.better,
                "note": note if value is not None else f"Undefined: {note}.",
            }
        )
    return cards


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _map_note(report: Report) -> str:
    shown, total = len(report.mapped.cluster_ids), int(report.census.sizes.sum())
    of = (
        f"All {total:,} documents."
        if shown == total
        else f"{shown:,} of {total:,} documents, drawn at random."
    )
    return f"{of} {report.mapped.layout.note}"


def _table_note(report: Report, shown: list[Description]) -> str:
    if len(shown) == len(report.clusters):
        return ""
    total = len(report.clusters)
    return f"The {len(shown):,} largest of {total:,} clusters; clusters.parquet has all."


def _confusion(census: Census) -> dict[str, Any] | None:
    """The largest labels and clusters, ordered so that what belongs together lies on a diagonal."""
    if not census.labels:
        return None
    names = np.array(list(census.labels))
    counts = np.array(list(census.labels.values()))
    keep = np.argsort(-counts.sum(axis=1), kind="stable")[:60]
    names, counts = names[keep], counts[keep]
    clusters = np.argsort(-counts.sum(axis=0), kind="stable")[: _CONFUSION_CELLS // len(names)]
    clusters = clusters[np.argsort(counts[:, clusters].argmax(axis=0), kind="stable")]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {
        "labels": [_cut(str(name), 64) for name in names],
        "clusters": clusters.tolist(),
        "counts": counts[:, clusters].tolist(),
        "shares": np.round(shares[:, clusters], 4).tolist(),
    }


def _confusion_note(report: Report) -> str:
    if not report.census.labels:
        return ""
    labelled = sum(int(counts.sum()) for counts in report.census.labels.values())
    total = int(report.census.sizes.sum())
    return (
        f"Where the documents of each label went: {labelled:,} of {total:,} documents have a label."
    )


def _ticks(tried: list[int]) -> list[int]:
    wanted = (2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)
    return [k for k in wanted if tried and min(tried) <= k <= max(tried)]


def _cut(text: str | None, room: int) -> str | None:
    """At most ``room`` bytes of UTF-8, whole characters, spaces collapsed."""
    if text is None:
        return None
    text = " ".join(text.split())
    data = text.encode("utf-8", errors="replace")
    if len(data) <= room:
        return data.decode("utf-8")
    return data[: max(0, room - 3)].decode("utf-8", errors="ignore").rstrip() + "…"
