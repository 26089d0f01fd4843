"""What a report shows, and the part of it that its script reads: JSON of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cluster.census import Census
from cluster.describe import Description, Example
from cluster.document_map import Density, MapLayout
from cluster.kept_columns import KeptColumn
from cluster.page_text import bytes_in_page, shorten
from cluster.report_columns import columns_data

_FOLDER = Path(__file__).parent
MAP_POINTS = 5_000
"""Documents that the map shows as points, at most."""
_MAP_TEXT_BYTES = 1_000_000
_MAP_ID_BYTES = 800_000
_EXAMPLE_TEXT_BYTES = 1_400_000
_CONFUSION_CELLS = 3_000
_SIZE_BARS = 1_000


_LABELS = 120


@dataclass(frozen=True)
class MapLevel:
    """One number of clusters, as the map shows it."""

    cluster_ids: np.ndarray
    """int (n,), of the documents on the map; -1 for noise."""
    names: Mapping[int, str]
    """What each cluster is about, in a word or two; clusters without are not labelled."""


@dataclass(frozen=True)
class MappedDocuments:
    """The documents on the map."""

    layout: MapLayout
    cluster_ids: np.ndarray
    """int (n,)."""
    ids: Sequence[Any]
    texts: Sequence[str | None] | None
    levels: Sequence[MapLevel] = ()
    """By rising number of clusters, the finest last; none for a map without labels."""
    density: Density | None = None
    """Of all documents; None where that is not known, or where all are shown as points."""


@dataclass(frozen=True)
class Listing:
    """A small table of the page."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Changes:
    """What is different from an earlier result."""

    title: str
    note: str
    lists: Sequence[Listing]


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
    ids: np.ndarray | None = None
    """Ids of the census's clusters, where they are not their places."""
    changes: Changes | None = None
    columns: Sequence[KeptColumn] = ()
    """Kept columns, with the values of the documents on the map."""


def page_data(report: Report, shown: list[Description], room: float = 1.0) -> dict[str, Any]:
    """What the page's script draws, of the clusters ``shown``.

    Texts are cut to fit the page: to the share ``room`` of what they may have in all.
    """
    examples = sum(len(c.central) + len(c.diverse) for c in shown)
    text_room = min(600, int(room * _EXAMPLE_TEXT_BYTES / max(1, examples)))
    size_step = -(-len(report.census.sizes) // _SIZE_BARS)
    return {
        "numClusters": len(report.census.sizes),
        "hasTexts": report.has_texts,
        "clusters": [_cluster_data(cluster, text_room) for cluster in shown],
        "map": _map_data(report.mapped, room),
        "columns": columns_data(report.columns, [c.cluster_id for c in shown], room),
        "sizes": np.sort(report.census.sizes)[::-1][::size_step].tolist(),
        "sizeStep": size_step,
        "curve": report.curve,
        "curveTicks": _ticks([int(row["k"]) for row in report.curve or ()]),
        "confusion": _confusion(report.census, report.ids),
    }


def _map_data(mapped: MappedDocuments, room: float) -> dict[str, Any]:
    """The documents as points; ``cut`` are the places of ids that are too long for the page."""
    digits = _digits(mapped.layout.points)
    points = np.round(mapped.layout.points.astype(np.float64), digits)
    text_room, id_room = (
        int(room * most / max(1, len(points))) for most in (_MAP_TEXT_BYTES, _MAP_ID_BYTES)
    )
    texts = mapped.texts or [None] * len(points)
    ids = [str(value) for value in mapped.ids]
    fits = [bytes_in_page(value) <= id_room for value in ids]
    return {
        "x": points[:, 0].tolist(),
        "y": points[:, 1].tolist(),
        "cluster": mapped.cluster_ids.tolist(),
        "text": [shorten(text, min(240, text_room)) for text in texts],
        "id": [
            i if fit else shorten(i, min(64, id_room)) for i, fit in zip(ids, fits, strict=True)
        ],
        "cut": [place for place, fit in enumerate(fits) if not fit],
        "levels": [_level_data(level, points) for level in mapped.levels],
        "density": None if mapped.density is None else _density_data(mapped.density),
    }


def _digits(points: np.ndarray) -> int:
    """Decimals that tell places on the map apart, however wide it is."""
    span = float(np.ptp(points, axis=0).max()) if len(points) else 0.0
    return 4 - int(np.floor(np.log10(span))) if span else 3


def _density_data(density: Density) -> dict[str, Any]:
    return {
        "rows": density.counts.shape[0],
        "columns": density.counts.shape[1],
        "left": density.left,
        "bottom": density.bottom,
        "side": density.side,
        "counts": density.counts.ravel().tolist(),
    }


def _level_data(level: MapLevel, points: np.ndarray) -> dict[str, Any]:
    """Each document's cluster, and where the labels of the largest stand: on a document amid it."""
    ids, sizes = np.unique(level.cluster_ids[level.cluster_ids >= 0], return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    largest = zip(ids[order].tolist(), sizes[order].tolist(), strict=True)
    labelled = [pair for pair in largest if level.names.get(pair[0])][:_LABELS]
    labels = []
    for cluster, size in labelled:
        members = points[level.cluster_ids == cluster]
        amid = ((members - np.median(members, axis=0)) ** 2).sum(axis=1).argmin()
        x, y = members[amid].tolist()
        text = shorten(level.names[cluster], 40)
        labels.append({"c": cluster, "n": size, "x": x, "y": y, "t": text})
    return {
        "clusters": len(level.names),
        "cluster": level.cluster_ids.tolist(),
        "labels": labels,
    }


def render_template(name: str, scripts: Sequence[str], **content: Any) -> str:
    """A page as HTML, with its style and ``scripts``; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(f"{name}.html.jinja").render(
        css=(_FOLDER / "report.css").read_text(encoding="utf-8"),
        javascript="".join((_FOLDER / f"{s}.js").read_text(encoding="utf-8") for s in scripts),
        **content,
    )


def settings_in_words(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a page lists them, those that are not set left out."""
    shown = {name.replace("_", " "): str(value) for name, value in settings.items()}
    return {name: value for name, value in shown.items() if value not in ("None", "")}


def _cluster_data(cluster: Description, room: int) -> dict[str, Any]:
    def examples(found: list[Example]) -> list[dict[str, Any]]:
        return [
            {
                "id": shorten(str(example.id), 64),
                "distance": example.distance,
                "text": shorten(example.text, room),
                "label": shorten(example.label, 64),
            }
            for example in found
        ]

    return {
        "id": cluster.cluster_id,
        "size": cluster.size,
        "name": shorten(cluster.name, 96),
        "share": cluster.share,
        "keywords": [shorten(word, 48) for word in cluster.keywords],
        "label": shorten(cluster.top_label, 64),
        "labelShare": cluster.top_label_share,
        "central": examples(cluster.central),
        "diverse": examples(cluster.diverse),
    }


def _confusion(census: Census, ids: np.ndarray | None) -> dict[str, Any] | None:
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
        "labels": [shorten(str(name), 64) for name in names],
        "clusters": (clusters if ids is None else ids[clusters]).tolist(),
        "counts": counts[:, clusters].tolist(),
        "shares": np.round(shares[:, clusters], 4).tolist(),
    }


def _ticks(tried: list[int]) -> list[int]:
    wanted = (2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)
    return [k for k in wanted if tried and min(tried) <= k <= max(tried)]
