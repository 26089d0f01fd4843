"""One HTML page that a person opens: no network, no server, under 5 MB for any corpus."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.describe import Description
from cluster.document_map import Density, MapLayout
from cluster.kept_columns import KeptColumn
from cluster.metrics import LABEL_SCORES, MEANINGS
from cluster.outcome import Level, Outcome, noise_in_words
from cluster.page_text import inline_json, shorten
from cluster.report_columns import SHOWN_COLUMNS, has_colours
from cluster.report_data import (
    MAP_POINTS,
    Changes,
    Listing,
    MapLevel,
    MappedDocuments,
    Report,
    page_data,
    render_template,
    settings_in_words,
)
from cluster.sample import Sample
from cluster.tables import OUTLIER_DEVIATIONS, levels_table
from pipelines.runtime.files import shoal_home, write_bytes

log = logging.getLogger(__name__)

_LISTED = 40
_MAP_LEVELS = 8


def build_report(
    outcome: Outcome,
    settings: Mapping[str, Any],
    layout: MapLayout,
    *,
    changes: Changes | None = None,
    density: Density | None = None,
    columns: Sequence[KeptColumn] = (),
) -> Report:
    """The content of ``report.html``; ``settings`` are shown as they are.

    ``layout`` is that of the first documents of the outcome's sample, ``density`` that of all.
    ``columns`` have the values of :func:`shown_documents`.
    """
    documents = shown_documents(outcome, layout)
    layout = replace(layout, points=layout.points[: len(documents)])
    texts = documents.texts.to_pylist() if documents.texts is not None else None
    mapped = MappedDocuments(
        layout,
        outcome.levels[-1].cluster_ids[: len(documents)],
        documents.ids.to_pylist(),
        texts,
        [_map_level(level, len(documents)) for level in _spread(outcome.levels)],
        density if outcome.scan.rows > len(documents) else None,
    )
    name = str(settings["embeddings"]).rstrip("/").rsplit("/", 1)[-1]
    return Report(
        title=f"Clusters of {name}",
        lead=_lead(outcome, has_texts=texts is not None),
        notices=outcome.notices,
        census=outcome.census,
        clusters=outcome.clusters,
        scores=outcome.scores,
        mapped=mapped,
        facts=_facts(outcome, settings),
        curve=None if outcome.choice is None else [asdict(c) for c in outcome.choice.candidates],
        curve_note="" if outcome.choice is None else outcome.choice.reason,
        levels=_levels(outcome),
        lists=[_outliers(outcome), *_noise(outcome), _duplicates(outcome)],
        has_texts=texts is not None,
        ids=outcome.ids,
        changes=changes,
        columns=columns,
    )


def shown_documents(outcome: Outcome, layout: MapLayout) -> Sample:
    """The documents that the map shows: of those that were laid out, 5,000 at most."""
    return outcome.documents.head(min(len(layout.points), MAP_POINTS))


def _spread(levels: Sequence[Level]) -> list[Level]:
    """At most eight, the coarsest and the finest among them."""
    places = np.linspace(0, len(levels) - 1, min(_MAP_LEVELS, len(levels)))
    return [levels[place] for place in np.round(places).astype(int)]


def _map_level(level: Level, count: int) -> MapLevel:
    names = {c.cluster_id: c.name or ", ".join(c.keywords[:2]) for c in level.clusters}
    return MapLevel(level.cluster_ids[:count], names)


def _lead(outcome: Outcome, *, has_texts: bool) -> str:
    lead = (
        f"k-means put {outcome.scan.rows:,} documents into {len(outcome.census.sizes):,} clusters. "
        f"Centroids were fitted on {outcome.fitted_on()}; every document was then given to its "
        "nearest centroid."
    )
    if outcome.census.noise is not None:
        lead += f" {noise_in_words(outcome.census)} are noise: cluster -1, described apart."
    if has_texts:
        return f"{lead} Keywords come from {len(outcome.documents):,} documents."
    return f"{lead} The vectors came without texts, so there are no keywords."


def _facts(outcome: Outcome, settings: Mapping[str, Any]) -> dict[str, str]:
    fit = outcome.fit
    facts = {
        "vectors": f"{outcome.scan.rows:,} of {fit.centroids.shape[1]:,} numbers each",
        "centroids fitted on": outcome.fitted_on(),
    }
    if fit.vectors:
        facts["iterations"] = str(fit.iterations)
        facts["empty clusters re-seeded while fitting"] = str(fit.reseeded)
    facts |= {
        "inertia": f"{outcome.census.inertia:,.6g} (squared distances, all documents)",
        "imbalance": f"{outcome.scores['imbalance']:.2f} (1 when all clusters are equal)",
    }
    if outcome.choice is not None:
        facts["why so many clusters"] = outcome.choice.reason
    named = settings_in_words(settings)
    return facts | {name: value for name, value in named.items() if name not in facts}


def _levels(outcome: Outcome) -> list[dict[str, Any]]:
    if len(outcome.levels) < 2:
        return []
    return [
        {**row, "share": f"{row['parent_share']:.0%}"}
        for row in levels_table(outcome.census, outcome.nesting).to_pylist()[:1_000]
    ]


def _outliers(outcome: Outcome) -> Listing:
    found = outcome.outliers
    return Listing(
        "Outliers",
        f"Documents {OUTLIER_DEVIATIONS:g} or more standard deviations farther from their centroid "
        f"than their cluster's mean: {len(found):,} among the farthest of each cluster."
        + _only_first(found),
        ("Id", "Cluster", "Deviations", "Text"),
        [
            (row["id"], row["cluster_id"], f"{row['deviations']:.1f}", row.get("text") or "")
            for row in found.slice(0, _LISTED).to_pylist()
        ],
    )


def _noise(outcome: Outcome) -> list[Listing]:
    noise = outcome.census.noise
    if noise is None or noise.nearest is None or noise.farthest is None:
        return []
    limit = outcome.scores["noise"]["distance_of_fifth_neighbour"]
    found = pa.concat_tables([noise.nearest, noise.farthest]).to_pylist()
    rows = {row["id"]: row for row in found}.values()
    note = f"{noise_in_words(outcome.census)}"
    if limit is not None:
        note += f": their fifth neighbour in a sample is farther than {limit:.3f}"
    return [
        Listing(
            "Noise",
            f"{note}. Those nearest to a centroid and farthest from all:",
            ("Id", "Distance", "Text"),
            [(row["id"], f"{row['distance']:.3f}", row.get("text") or "") for row in rows],
        )
    ]


def _duplicates(outcome: Outcome) -> Listing:
    if outcome.duplicates is None:
        return Listing("Near-duplicates", "They were not looked for.", (), [])
    search = outcome.scores["near_duplicates"]
    note = (
        f"Documents with a cosine of at least {search['similarity']:g} to one that would be kept: "
        f"{search['count']:,} among {search['searched']:,} searched."
    )
    most_similar = outcome.duplicates.sort_by([("similarity", "descending")])
    return Listing(
        "Near-duplicates",
        note + _only_first(outcome.duplicates),
        ("Id", "Repeats", "Cosine", "Cluster"),
        [
            (row["id"], row["duplicate_of"], f"{row['similarity']:.4f}", row["cluster_id"])
            for row in most_similar.slice(0, _LISTED).to_pylist()
        ],
    )


def _only_first(table: pa.Table) -> str:
    return f" The first {_LISTED} are shown." if len(table) > _LISTED else ""


SHOWN_CLUSTERS = 500
MOST_BYTES = 5_000_000


def render_report(report: Report) -> str:
    """The page as HTML of less than 5 MB; every text in it is escaped.

    Long texts are cut, and cut shorter where there are so many that the page would be too large.
    """
    for room in (1.0, 0.6, 0.3, 0.1):
        page = _render(report, room)
        if len(page.encode()) < MOST_BYTES:
            break
    return page


def _render(report: Report, room: float) -> str:
    """The page with the share ``room`` of the space that texts may take."""
    shown = sorted(report.clusters, key=lambda c: (-c.size, c.cluster_id))[:SHOWN_CLUSTERS]
    return render_template(
        "report",
        ["map", "report"],
        title=report.title,
        lead=report.lead,
        notices=report.notices,
        figures=_figures(report),
        map_note=_map_note(report),
        map_levels=[len(level.names) for level in report.mapped.levels],
        map_size=f"{len(report.mapped.cluster_ids):,}",
        columns=_columns(report),
        rows=_rows(report, shown, room),
        table_note=_table_note(report, shown),
        has_texts=report.has_texts,
        has_names=_has_names(report),
        has_labels=bool(report.census.labels),
        scores=_score_cards(report.scores),
        even_size=f"{report.census.sizes.mean():,.0f}",
        **_columns_content(report),
        has_curve=bool(report.curve),
        curve_note=report.curve_note,
        has_levels=bool(report.levels),
        levels=report.levels,
        level_scores=_level_scores(report.scores.get("levels", [])),
        confusion_note=_confusion_note(report),
        lists=[_listing(listing, room) for listing in report.lists],
        changes=_changes(report.changes, room),
        facts=[(name, shorten(value, 2_000)) for name, value in report.facts.items()],
        vega_bundle=_chart_library(),
        data_json=inline_json(page_data(report, shown, room)),
    )


def _columns_content(report: Report) -> dict[str, Any]:
    """What the template shows of kept columns: names by their place among those of the page."""
    shown = list(enumerate(report.columns[:SHOWN_COLUMNS]))
    left_out = len(report.columns) - len(shown)
    return {
        "colours": [(p, shorten(c.name, 64)) for p, c in shown if has_colours(c)],
        "measures": [(p, shorten(c.name, 64)) for p, c in shown if c.kind == "number"],
        "times": [(p, shorten(c.name, 64)) for p, c in shown if c.times and c.times.window],
        "columns_note": f"{left_out} more kept columns are not shown." if left_out else "",
    }


@functools.cache
def _chart_library() -> str:
    """Vega and Vega-Embed as one script, so that the page opens without a network.

    Kept for the next page: to join it takes more than a second of each clustering.
    """
    kept = shoal_home() / "charts" / f"vega-{version('vl-convert-python')}.js"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    bundle = bundle.replace("</script", "<\\/script")
    try:
        write_bytes(str(kept), bundle.encode())
    except OSError as error:
        log.info("%s cannot be kept: %s", kept, error)
    return bundle


def _listing(listing: Listing, room: float) -> Listing:
    """The same with every cell short enough for a page."""
    rows = [tuple(shorten(str(cell), int(200 * room)) for cell in row) for row in listing.rows]
    return replace(listing, rows=rows)


def _changes(changes: Changes | None, room: float) -> Changes | None:
    if changes is None:
        return None
    return replace(changes, lists=[_listing(listing, room) for listing in changes.lists])


def _figures(report: Report) -> list[dict[str, str]]:
    sizes = report.census.sizes
    figures = [
        {"name": "documents", "value": f"{report.census.documents:,}"},
        {"name": "clusters", "value": f"{len(sizes):,}"},
        {"name": "smallest and largest", "value": f"{sizes.min():,} – {sizes.max():,}"},
    ]
    if report.census.noise is not None:
        figures.append({"name": "noise", "value": f"{int(report.census.noise.sizes[0]):,}"})
    against = report.scores["labels"] or {}
    for name, values in (("v_measure", against), ("silhouette", report.scores["internal"])):
        if values.get(name) is not None:
            figures.append({"name": MEANINGS[name].title, "value": f"{values[name]:.3f}"})
    return figures


def _columns(report: Report) -> list[dict[str, str]]:
    columns = [{"key": "id", "title": "Cluster"}, {"key": "size", "title": "Documents"}]
    if _has_names(report):
        columns.append({"key": "name", "title": "Name"})
    if report.has_texts:
        columns.append({"key": "keywords", "title": "Keywords"})
    if report.census.labels:
        columns.append({"key": "label", "title": "Most frequent label"})
    columns.append({"key": "spread", "title": "Mean distance"})
    return columns


def _has_names(report: Report) -> bool:
    return any(cluster.name for cluster in report.clusters)


def _rows(report: Report, shown: list[Description], room: float) -> list[dict[str, Any]]:
    largest = max(1, int(report.census.sizes.max()))
    return [
        {
            "id": cluster.cluster_id,
            "size": cluster.size,
            "size_text": f"{cluster.size:,}",
            "bar": round(100 * cluster.size / largest, 1),
            "name": shorten(cluster.name, 96) or "",
            "keywords": ", ".join(shorten(word, 48) or "" for word in cluster.keywords),
            "label": shorten(cluster.top_label, 64) or "",
            "label_share": f"{cluster.top_label_share:.0%}" if cluster.top_label_share else "",
            "spread": cluster.mean_distance if cluster.mean_distance is not None else -1,
            "spread_text": f"{cluster.mean_distance:.3f}"
            if cluster.mean_distance is not None
            else "–",
            "excerpt": shorten(cluster.central[0].text, int(140 * room)) if cluster.central else "",
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


def _level_scores(levels: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row of figures for each level; those that it lacks are a dash."""
    return [
        {
            "num_clusters": f"{level['num_clusters']:,}",
            "nested": f"{level['nested_share']:.0%}" if "nested_share" in level else "–",
            "v_measure": _figure((level["labels"] or {}).get("v_measure")),
            "silhouette": _figure(level["internal"]["silhouette"]),
            "inertia": f"{level['inertia']:,.5g}",
            "imbalance": f"{level['imbalance']:.2f}",
        }
        for level in levels
    ]


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def _map_note(report: Report) -> str:
    shown, total = len(report.mapped.cluster_ids), report.census.documents
    of = (
        f"All {total:,} documents."
        if shown == total
        else f"{shown:,} of {total:,} documents, drawn at random."
    )
    shades = "" if report.mapped.density is None else " Shades show how densely all of them lie."
    return f"{of}{shades} {report.mapped.layout.note}"


def _table_note(report: Report, shown: list[Description]) -> str:
    if len(shown) == len(report.clusters):
        return ""
    total = len(report.clusters)
    return f"The {len(shown):,} largest of {total:,} clusters; clusters.parquet has all."


def _confusion_note(report: Report) -> str:
    if not report.census.labels:
        return ""
    labelled = sum(int(counts.sum()) for counts in report.census.labels.values())
    total = int(report.census.sizes.sum())
    return (
        f"Where the documents of each label went: {labelled:,} of {total:,} documents have a label."
    )
