"""The history of a training run as a picture: SVG bytes, drawn with nothing but the numbers."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pyarrow as pa

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 640, 180, 56, 28, 44
_PANELS = (
    ("loss", "training loss", "#4c78a8"),
    ("heldout_loss", "held-out loss", "#f58518"),
    ("mrr", "held-out retrieval of the partner (MRR)", "#59a14f"),
    ("v_measure", "held-out V-measure", "#b07aa1"),
)


def plot_history(history: pa.Table, best_step: int) -> bytes:
    """One panel a measure over the steps, with a line at the best step.

    Args:
        history: columns ``step`` and some of ``loss``, ``heldout_loss``, ``mrr``,
            ``v_measure``, with nulls where there was no measure.
        best_step: the step of the adapter that is kept.
    """
    panels = [panel for panel in _PANELS if panel[0] in history.column_names]
    height = len(panels) * (_HEIGHT + _GAP) + _TOP
    steps = history["step"].to_pylist()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + _LEFT + 24}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, (name, title, color) in enumerate(panels):
        values = history[name].to_pylist()
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        top = _TOP + place * (_HEIGHT + _GAP)
        parts += _panel(points, title, color, top, max(1, *steps), best_step)
    return "\n".join([*parts, "</svg>\n"]).encode()


def _panel(
    points: Sequence[tuple[int, float]],
    title: str,
    color: str,
    top: float,
    last_step: int,
    best_step: int,
) -> list[str]:
    low, high = min(v for _, v in points), max(v for _, v in points)
    spread = (high - low) or 1.0

    def at(step: float, value: float) -> str:
        x = _LEFT + _WIDTH * step / last_step
        return f"{x:.1f},{top + _HEIGHT * (1 - (value - low) / spread):.1f}"

    line = " ".join(at(step, value) for step, value in points)
    best = _LEFT + _WIDTH * best_step / last_step
    marks = [
        f'<circle cx="{xy.split(",")[0]}" cy="{xy.split(",")[1]}" r="2.5" fill="{color}"/>'
        for xy in line.split()
    ]
    return [
        f'<text x="{_LEFT}" y="{top - 8}" font-weight="bold">{html.escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" '
        'stroke="#ccc"/>',
        f'<text x="{_LEFT - 6}" y="{top + 10}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{_LEFT - 6}" y="{top + _HEIGHT}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{_LEFT + _WIDTH}" y="{top + _HEIGHT + 16}" text-anchor="end">'
        f"step {last_step}</text>",
        f'<line x1="{best:.1f}" x2="{best:.1f}" y1="{top}" y2="{top + _HEIGHT}" stroke="#e15759" '
        'stroke-dasharray="4 3"/>',
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>',
        *(marks if len(points) < 60 else []),
    ]
