"""What a report shows of kept columns: colours on the map, figures by cluster, topics over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.kept_columns import KeptColumn, Times
from cluster.page_text import shorten

SHOWN_COLUMNS = 8
"""Kept columns that the page shows, the first of them."""
_HUES = 8
_SHADES = 7
_TOP_VALUES = 4
_OTHER, _NONE = -2, -1


def columns_data(
    columns: Sequence[KeptColumn], clusters: Sequence[int], room: float
) -> list[dict[str, Any]]:
    """What the page's script shows of ``columns``, for the ``clusters`` of the page's table.

    ``codes`` are the class of each document on the map, an index of ``legend``, -1 for no value and
    -2 for all values that have no class of their own. ``room`` as in :func:`page_data`.
    """
    text_room = max(12, int(48 * room))
    return [_column_data(column, clusters, text_room) for column in columns[:SHOWN_COLUMNS]]


def has_colours(column: KeptColumn) -> bool:
    """Whether its values have classes; titles and ids, of which hardly one occurs twice, do not."""
    return bool(_classes(column)[0])


def _column_data(column: KeptColumn, clusters: Sequence[int], room: int) -> dict[str, Any]:
    legend, codes = _classes(column)
    data: dict[str, Any] = {
        "name": shorten(column.name, 64),
        "kind": column.kind,
        "legend": [shorten(label, room) for label in legend],
        "codes": codes.tolist() if legend else [],
    }
    if (numbers := column.numbers) is not None:
        data["sum"] = [_figure(numbers.sum_of(cluster)) for cluster in clusters]
        data["mean"] = [_figure(numbers.mean_of(cluster)) for cluster in clusters]
    if column.counts:
        data |= _top_values(column.counts, clusters, room)
    if column.times is not None:
        data["time"] = _time_data(column.times, clusters)
    return data


def _figure(value: float | None) -> float | None:
    """Six digits, as JSON can hold them: without infinity."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


def _top_values(
    counts: Mapping[tuple[int, str | None], int], clusters: Sequence[int], room: int
) -> dict[str, Any]:
    """The most frequent values of each cluster: ``top`` holds pairs of an index and a count."""
    by_cluster: dict[int, list[tuple[int, str | None]]] = {cluster: [] for cluster in clusters}
    for (cluster, value), count in counts.items():
        if cluster in by_cluster:
            by_cluster[cluster].append((count, value))
    places: dict[str | None, int] = {}
    top = []
    for found in by_cluster.values():
        found.sort(key=lambda pair: (-pair[0], pair[1] is None, pair[1] or ""))
        top.append([[places.setdefault(v, len(places)), n] for n, v in found[:_TOP_VALUES]])
    values = ["none" if v is None else shorten(v, room) or "(empty)" for v in places]
    return {"values": values, "top": top}


def _classes(column: KeptColumn) -> tuple[list[str], np.ndarray]:
    """Labels of the classes that colours stand for, and the class of each document shown."""
    if column.kind == "category":
        return _frequent(column.sample)
    is_date = column.kind == "date"
    known = ~(np.isnat(column.sample) if is_date else ~np.isfinite(column.sample))
    codes = np.full(len(known), _NONE)
    if not known.any():
        return [], codes
    values = column.sample[known].astype(np.int64) if is_date else column.sample[known]
    # Of equal shares, so that a few far values do not leave all others in one shade.
    inner = np.quantile(values, np.arange(1, _SHADES) / _SHADES, method="higher")
    unique, parts = np.unique(values, return_inverse=True)
    if len(unique) > _SHADES:
        parts = np.unique(np.searchsorted(inner, values, side="right"), return_inverse=True)[1]
    codes[known] = parts
    ends = [
        (column.sample[codes == part].min(), column.sample[codes == part].max())
        for part in range(int(parts.max()) + 1)
    ]
    write = _date_writer(column) if is_date else _number
    labels = [(write(low), write(high)) for low, high in ends]
    return [low if low == high else f"{low} – {high}" for low, high in labels], codes


def _frequent(sample: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The eight most frequent values; none where hardly one occurs twice, as with titles."""
    counts = Counter(value for value in sample.tolist() if value is not None)
    if len(counts) > max(1, counts.total() // 2):
        return [], np.full(len(sample), _OTHER)
    frequent = sorted(counts, key=lambda value: (-counts[value], value))[:_HUES]
    places: dict[str | None, int] = {value: place for place, value in enumerate(frequent)}
    places[None] = _NONE
    codes = np.array([places.get(value, _OTHER) for value in sample.tolist()])
    return [value if value.strip() else "(empty)" for value in frequent], codes


def _number(value: float) -> str:
    if abs(value) < 10_000:  # among them years
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4g}"


def _date_writer(column: KeptColumn) -> Any:
    hours = column.times is not None and column.times.unit == "hour"
    return lambda value: str(value.astype("datetime64[m]" if hours else "datetime64[D]"))


_LABELS = {"hour": 13, "day": 10, "week": 10, "month": 7, "quarter": 7, "year": 4, "decade": 4}
"""Characters of a time that say which bin it begins."""


def _time_data(times: Times, clusters: Sequence[int]) -> dict[str, Any]:
    """Documents by cluster and bin, and of all clusters; ``outside`` are not in the window."""
    places = {cluster: row for row, cluster in enumerate(clusters)}
    counts = np.zeros((len(clusters), len(times.window)), dtype=np.int64)
    totals = np.zeros(len(times.window), dtype=np.int64)
    outside = 0
    for (cluster, number), count in times.counts.items():
        if number not in times.window:
            outside += count
            continue
        totals[number - times.window.start] += count
        if cluster in places:
            counts[places[cluster], number - times.window.start] = count
    starts = [str(times.start_of(n))[: _LABELS[times.unit]].replace("T", " ") for n in times.window]
    return {
        "unit": times.unit,
        "starts": starts,
        "counts": counts.tolist(),
        "totals": totals.tolist(),
        "outside": outside,
    }
