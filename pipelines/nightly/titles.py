"""Names that an instruct LLM writes for clusters; each is kept while its cluster lives."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from cluster.describe import Description
from cluster.outcome import MOST_NAMED, brief_of
from pipelines.store.version import Version

TITLES = "titles.parquet"


def read_titles(version: Version) -> dict[int, tuple[str, str]]:
    """By cluster id what a model called it, and what it is called by its keywords."""
    if TITLES not in version.record.artifacts:
        return {}
    rows = version.read_table(TITLES).to_pylist()
    return {row["cluster_id"]: (row["title"], row["keywords_name"]) for row in rows}


def titles_table(titles: Mapping[int, str], by_keywords: Mapping[int, str]) -> pa.Table:
    """``titles.parquet``: what :func:`read_titles` reads."""
    ids = sorted(titles)
    return pa.table(
        {
            "cluster_id": pa.array(ids, pa.int32()),
            "title": pa.array([titles[i] for i in ids], pa.string()),
            "keywords_name": pa.array([by_keywords[i] for i in ids], pa.string()),
        }
    )


def write_titles(
    model: str | None,
    clusters: list[Description],
    before: Mapping[int, str],
    taken: Mapping[int, str],
) -> dict[int, str]:
    """A title by id: those of ``before`` that still live, and new ones by ``model``, if given.

    Args:
        model: instruct LLM; a packaged name, a folder or a hub id.
        clusters: as they are published, with their ids.
        before: titles of the version before.
        taken: names that people gave, which no other cluster may get.

    Raises:
        InputError: a model that follows no instructions.
    """
    titles = {c.cluster_id: before[c.cluster_id] for c in clusters if c.cluster_id in before}
    if model is None:
        return titles
    largest = sorted((c for c in clusters if c.size), key=lambda c: (-c.size, c.cluster_id))
    untitled = [c for c in largest[:MOST_NAMED] if c.cluster_id not in titles]
    if not untitled:
        return titles
    from pipelines.encoder.titles import name_levels  # torch: most nights ask for no names

    owners = {c.cluster_id: brief_of(c) for c in clusters}
    names = {**titles, **taken}  # a person's name stands above a title
    (answers,) = name_levels(
        model,
        [[owners[c.cluster_id] for c in untitled]],
        taken={name: owners[i] for i, name in names.items() if i in owners},
    )
    given = zip(untitled, answers, strict=True)
    return titles | {cluster.cluster_id: title for cluster, title in given if title}
