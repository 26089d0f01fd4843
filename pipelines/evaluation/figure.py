"""The attention as a picture: shares of the groups, and weights along the text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import vl_convert

from pipelines.evaluation.token_kinds import GROUPS

MOST_TOKENS_SHOWN = 80
_BODY_PIECES = 10
_WIDTH = 720
_PNG_SCALE = 2.0
_PART_COLORS = {"prefix": "#9c9ede", "body": "#4c78a8", "suffix": "#e4883b"}
_ENCODER_COLORS = ("#9aa5b1", "#d1495b", "#2e7d5b", "#7b5ea7", "#c98a1b", "#2a6f97")
_VEGA_LITE = "https://vega.github.io/schema/vega-lite/v5.json"


@dataclass(frozen=True)
class Picture:
    """One figure in two formats."""

    png: bytes
    svg: str


def draw_attention(table: pa.Table, shares: Mapping[str, Mapping[str, Any]]) -> Picture:
    """Draw the rows of ``attention.parquet`` and the shares of every encoder.

    Above, how much of the attention each group of tokens gets, with the standard error over
    texts. Below, the weights along the text without its first token: token by token of one short
    text; else the prompt's tokens, and the body in ten pieces of equal length.
    """
    spec = attention_spec(table, shares)
    return Picture(
        vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE), vl_convert.vegalite_to_svg(spec)
    )


def attention_spec(table: pa.Table, shares: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The picture as a Vega-Lite specification."""
    texts = len(set(table["document"].to_pylist()))
    layer = table["layer"][0].as_py()
    over = "one text" if texts == 1 else f"mean over {texts} texts"
    return {
        "$schema": _VEGA_LITE,
        "background": "white",
        "title": {
            "text": f"What the last token attends to (layer {layer}, heads averaged, {over})",
            "anchor": "start",
            "fontSize": 15,
        },
        "vconcat": [_shares_panel(shares), _tokens_panel(table, list(shares))],
        "config": {
            "font": "sans-serif",
            "axis": {"labelFontSize": 11, "titleFontSize": 12, "labelLimit": 160},
            "legend": {"labelFontSize": 11, "titleFontSize": 12},
        },
        "resolve": {"scale": {"color": "independent"}},
        "spacing": 28,
    }


def _shares_panel(shares: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    values = []
    for encoder, by_group in shares.items():
        for group in GROUPS:
            mean, error = by_group[group]["mean"], by_group[group]["standard_error"] or 0.0
            low, high = max(0.0, mean - error), mean + error
            values.append(
                {"encoder": encoder, "group": group, "share": mean, "low": low, "high": high}
            )
    across = {
        "y": {"field": "group", "type": "nominal", "sort": list(GROUPS), "title": None},
        "yOffset": {"field": "encoder", "sort": list(shares)},
    }
    color = {
        "field": "encoder",
        "type": "nominal",
        "sort": list(shares),
        "scale": {"domain": list(shares), "range": _colors(len(shares))},
        "title": "encoder",
    }
    along = {"field": "share", "type": "quantitative", "axis": {"format": "%", "tickCount": 8}}
    return {
        "data": {"values": values},
        "width": _WIDTH,
        "height": {"step": 14},
        "layer": [
            {
                "mark": {"type": "bar", "tooltip": True},
                "encoding": {
                    **across,
                    "x": {**along, "title": "share of attention"},
                    "color": color,
                },
            },
            {
                "mark": {"type": "rule", "color": "#333"},
                "encoding": {
                    **across,
                    "x": {"field": "low", "type": "quantitative"},
                    "x2": {"field": "high"},
                },
            },
        ],
    }


def _tokens_panel(table: pa.Table, encoders: list[str]) -> dict[str, Any]:
    values = list(_slots(table))
    labels = {value["slot"]: value["label"] for value in values}
    return {
        "data": {"values": values},
        "facet": {
            "row": {
                "field": "encoder",
                "sort": encoders,
                "title": None,
                "header": {"labelFontSize": 12, "labelAngle": 0, "labelAlign": "left"},
            }
        },
        "spec": {
            "width": _WIDTH,
            "height": 110,
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {
                "x": {
                    "field": "slot",
                    "type": "ordinal",
                    "title": "tokens in their order, the first left out",
                    "axis": {
                        "labelExpr": f"{json.dumps(labels)}[datum.value]",
                        "labelAngle": -60,
                        "labelFontSize": 10,
                        "labelOverlap": False,
                    },
                },
                "y": {
                    "field": "attention",
                    "type": "quantitative",
                    "title": "attention",
                    "axis": {"format": ".1%"},
                },
                "color": {
                    "field": "part",
                    "type": "nominal",
                    "sort": list(_PART_COLORS),
                    "scale": {
                        "domain": list(_PART_COLORS), "range": list(_PART_COLORS.values())
                    },
                },
            },
        },
    }  # fmt: skip


def _slots(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Mean attention on each place along the texts, without the first token."""
    texts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        texts.setdefault((row["encoder"], row["document"]), []).append(row)
    count = len({document for _, document in texts})
    whole = count == 1 and max(map(len, texts.values())) <= MOST_TOKENS_SHOWN
    sums: dict[tuple[str, int], dict[str, Any]] = {}
    for (encoder, _), rows in texts.items():
        for slot, label, row in _placed(rows, whole):
            entry = sums.setdefault(
                (encoder, slot),
                {"encoder": encoder, "slot": slot, "label": label, "part": row["part"]}
                | {"attention": 0.0},
            )
            entry["attention"] += row["attention"] / count
    yield from sums.values()


def _placed(rows: list[dict[str, Any]], whole: bool) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Slot, its label, and the row, for every token of one text but the first."""
    body = [row for row in rows if row["part"] == "body"]
    before = sum(row["part"] == "prefix" for row in rows)
    pieces = len(body) if whole else _BODY_PIECES
    for row in rows[1:]:
        place = row["position"]
        if row["part"] == "prefix":
            yield place, _label(row["token"]), row
        elif row["part"] == "suffix":
            yield before + pieces + place - before - len(body), _label(row["token"]), row
        elif whole:
            yield place, _label(row["token"]), row
        else:
            piece = (place - before) * pieces // len(body)
            label = f"body {piece * 100 // pieces}–{(piece + 1) * 100 // pieces}%"
            yield before + piece, label, row


def _label(token: str) -> str:
    return token.strip() or "␣"


def _colors(count: int) -> list[str]:
    return [_ENCODER_COLORS[place % len(_ENCODER_COLORS)] for place in range(count)]
