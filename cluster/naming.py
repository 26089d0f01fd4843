"""Names for clusters: what a namer is shown of each, and its answers put where they belong.

What writes the names, such as an instruct LLM, is handed in by whoever runs the job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.describe import Description
from cluster.outcome import Outcome

MOST_NAMED = 500
"""Clusters that are named, the largest first."""
_EXCERPT_CHARACTERS = 300
_EXCERPTS = 5


@dataclass(frozen=True)
class Brief:
    """What a namer is shown of one cluster."""

    keywords: list[str]
    texts: list[str]
    """Beginnings of documents, central ones first."""


Namer = Callable[[str, Sequence[Brief]], list[str | None]]
"""From a model's name and briefs to a name each; None where the model gave none that serves."""


def name_clusters(outcome: Outcome, ask: Callable[[Sequence[Brief]], list[str | None]]) -> Outcome:
    """The outcome with names for the largest clusters of its finest level."""
    finest = outcome.levels[-1]
    wanted = [cluster for cluster in finest.clusters if cluster.size]
    wanted = sorted(wanted, key=lambda c: (-c.size, c.cluster_id))[:MOST_NAMED]
    answers = ask([brief_of(cluster) for cluster in wanted])
    names = {c.cluster_id: name for c, name in zip(wanted, answers, strict=True)}
    named = [replace(c, name=names.get(c.cluster_id)) for c in finest.clusters]
    return replace(outcome, levels=[*outcome.levels[:-1], replace(finest, clusters=named)])


def brief_of(cluster: Description) -> Brief:
    """Keywords and the beginnings of a few different documents."""
    texts = [example.text for example in [*cluster.central[:3], *cluster.diverse[1:]]]
    cut = [" ".join(text[: 2 * _EXCERPT_CHARACTERS].split()) for text in texts if text]
    short = dict.fromkeys(text[:_EXCERPT_CHARACTERS] for text in cut if text)
    return Brief(cluster.keywords, list(short)[:_EXCERPTS])
