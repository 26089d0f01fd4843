"""The page of a deduplication: what each threshold would remove, and pairs at its border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.page_text import inline_json, shorten
from cluster.report_data import render_template, settings_in_words


@dataclass(frozen=True)
class Judged:
    """All that the page shows."""

    settings: Mapping[str, Any]
    similarity: float
    counts: Mapping[str, int]
    metrics: Mapping[str, Any]
    curve: pa.Table
    pairs: Sequence[Mapping[str, Any]]
    """similarity, id, text, kept_id, kept_text; by rising similarity."""


def render_page(judged: Judged) -> str:
    """The page as HTML; every text in it is escaped, and nothing is loaded from elsewhere."""
    name = str(judged.settings["embeddings"]).rstrip("/").rsplit("/", 1)[-1]
    rows = judged.curve.to_pylist()
    return render_template(
        "duplicate_report",
        ["duplicate_report"],
        title=f"Near-duplicates of {name}",
        lead=_lead(judged),
        figures=_figures(judged),
        notices=_notices(judged),
        has_pairs=bool(judged.pairs),
        rows=[_row(row, judged.similarity) for row in rows],
        facts=list(settings_in_words(judged.settings).items()),
        data_json=inline_json(
            {
                "similarity": judged.similarity,
                "documents": judged.counts["documents"],
                "curve": rows,
                "pairs": [_shown(pair) for pair in judged.pairs],
            }
        ),
    )


def _lead(judged: Judged) -> str:
    measure = (
        "Jaccard similarity of their 5-character shingles"
        if judged.settings["method"] == "text"
        else "cosine of their vectors"
    )
    if judged.settings["against"]:
        return (
            f"A document is removed if the {measure} to one of {judged.settings['against']} is at "
            f"least {judged.similarity:g}."
        )
    order = {
        "first": "in the order of the corpus",
        "longest": "the longest text first",
        "central": "those nearest to the centre of their cluster first",
    }.get(judged.settings["keep"], f"by falling {judged.settings['keep'].partition(':')[2]}")
    return (
        f"Documents were gone through {order}; one is removed if the {measure} to one that was "
        f"kept before it is at least {judged.similarity:g}. So whatever is removed has a kept one "
        "like it."
    )


def _figures(judged: Judged) -> list[dict[str, str]]:
    counts = judged.counts
    share = counts["removed"] / max(1, counts["documents"])
    figures = [
        {"name": "documents", "value": f"{counts['documents']:,}"},
        {"name": "kept", "value": f"{counts['kept']:,}"},
        {"name": f"removed ({share:.1%})", "value": f"{counts['removed']:,}"},
        {"name": "groups", "value": f"{counts['groups']:,}"},
    ]
    recall = judged.metrics.get("recall")
    if recall and recall["expected"]:
        figures.append(
            {
                "name": f"recall ({recall['removed']:,} of {recall['expected']:,} expected, "
                f"{recall['sample']:,} compared with all)",
                "value": f"{recall['value']:.3f}",
            }
        )
    return figures


def _notices(judged: Judged) -> list[str]:
    counts = judged.counts
    notices = []
    if counts["not_comparable"]:
        kind = "Empty texts" if judged.settings["method"] == "text" else "Zero vectors"
        notices.append(f"{kind}: {counts['not_comparable']:,}. They are like nothing and are kept.")
    if counts["rejected"]:
        notices.append(f"Vectors left out: {counts['rejected']:,}. rejected.parquet says why.")
    return notices


def _row(row: Mapping[str, Any], similarity: float) -> dict[str, Any]:
    known = row["removed"] is not None
    return {
        "similarity": f"{row['similarity']:g}",
        "removed": f"{row['removed']:,}" if known else "–",
        "share": f"{row['share']:.2%}" if known else "–",
        "basis": ("counted" if row["exact"] else _basis(row, similarity))
        if known
        else "not sought",
        "is_chosen": abs(row["similarity"] - similarity) < 1e-6,
    }


def _basis(row: Mapping[str, Any], similarity: float) -> str:
    return "at most" if row["similarity"] < similarity - 1e-9 else "about"


def _shown(pair: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "similarity": round(pair["similarity"], 4),
        "id": shorten(str(pair["id"]), 80),
        "text": shorten(pair["text"], 500),
        "kept": shorten(str(pair["kept_id"]), 80),
        "keptText": shorten(pair["kept_text"], 500),
    }
