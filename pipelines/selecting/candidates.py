"""Candidates with their scores as a table, and as what a person sees at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.encoder import EncoderDescription
from pipelines.pooling import Pooling, pooled_dimension
from pipelines.selecting.ranking import Ranking


@dataclass(frozen=True)
class Selection:
    """What was tried on what, and how it came out; ``names`` are the candidates' prompts."""

    names: list[str]
    candidates: list[tuple[int, Pooling]]
    ranking: Ranking
    documents: int


def candidates_table(selection: Selection, encoders: Mapping[str, EncoderDescription]) -> pa.Table:
    """Every candidate with its scores, best first: the content of ``candidates.parquet``."""
    ranking = selection.ranking
    order = sorted(range(len(ranking.score)), key=lambda i: (-ranking.score[i], i))
    best = ranking.score[order[0]]
    wide = {name: e.dimension // len(e.pooling.split("+")) for name, e in encoders.items()}
    rows = []
    for rank, place in enumerate(order, start=1):
        name, (layer, pooling) = selection.names[place], selection.candidates[place]
        optional = (ranking.v_measure, ranking.half_agreement, ranking.partner_rank)
        v_measure, halves, partner = (None if v is None else float(v[place]) for v in optional)
        rows.append(
            {
                "prompt": name,
                "template": encoders[name].prompt,
                "pooling": pooling,
                "layer": layer,
                "rank": rank,
                "score": float(ranking.score[place]),
                "standard_error": float(ranking.standard_error[place]),
                "behind": float(best - ranking.score[place]),
                "behind_error": float(ranking.behind_error[place]),
                "probability_best": float(ranking.probability_best[place]),
                "v_measure": v_measure,
                "half_agreement": halves,
                "partner_rank": partner,
                "dimension": pooled_dimension(pooling, wide[name]),
            }
        )
    floats = {"v_measure", "half_agreement", "partner_rank"}
    table = pa.Table.from_pylist(rows)
    for name in floats:  # all null where it was not measured
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].cast(pa.float64()))
    return table


def summarize(table: pa.Table, metrics: Mapping[str, Any], output: str) -> dict[str, str]:
    """The table that a person sees at the end: the first five, and how sure it is."""
    summary = {"candidates": f"{len(table):,}", "scored by": metrics["scored_by"]}
    for row in table.slice(0, 5).to_pylist():
        what = f"{row['prompt']}, {row['pooling']}, layer {row['layer']}"
        measured = (
            f"V-measure {row['v_measure']:.3f}"
            if row["v_measure"] is not None
            else f"halves agree {row['half_agreement']:.3f}, "
            f"partner's rank {row['partner_rank']:.1f}"
        )
        summary[f"{row['rank']}. {what}"] = measured
    sure = metrics["winner"]["probability_best"]
    summary["how sure"] = (
        f"first in {sure:.0%} of resamples; {metrics['as_good']} candidates are within two "
        "standard errors of the first"
    )
    return {**summary, "output": output}
