"""Names that an instruct LLM writes for clusters; each is kept while its cluster lives."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pyarrow as pa

from cluster.config import NamingOptions
from cluster.describe import Description
from cluster.outcome import MOST_NAMED, brief_of
from pipelines.encoder.titles import TitleWriter
from pipelines.store.version import Version

log = logging.getLogger(__name__)

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


def check_writer(config: NamingOptions, before: Version | None) -> None:
    """Raise :class:`InputError` where ``config`` wants names and nobody can be asked for them.

    Not where the version ``before`` has some: its night goes on, and only new clusters lack one.
    """
    if config.name_model is None or (before is not None and TITLES in before.record.artifacts):
        return
    TitleWriter(config.name_model, config.name_url).check()


def write_titles(
    config: NamingOptions,
    clusters: list[Description],
    before: Mapping[int, str],
    taken: Mapping[int, str],
) -> dict[int, str]:
    """A title by id: those of ``before`` that still live, and new ones where ``config`` says so.

    Args:
        config: names an instruct LLM, or none.
        clusters: as they are published, with their ids.
        before: titles of the version before.
        taken: names that people gave, which no other cluster may get.

    Raises:
        InputError: a local model that follows no instructions.
    """
    titles = {c.cluster_id: before[c.cluster_id] for c in clusters if c.cluster_id in before}
    if config.name_model is None:
        return titles
    largest = sorted((c for c in clusters if c.size), key=lambda c: (-c.size, c.cluster_id))
    untitled = [c for c in largest[:MOST_NAMED] if c.cluster_id not in titles]
    if not untitled:
        return titles
    owners = {c.cluster_id: brief_of(c) for c in clusters}
    names = {**titles, **taken}  # a person's name stands above a title
    (answers,) = TitleWriter(config.name_model, config.name_url).name(
        [[owners[c.cluster_id] for c in untitled]],
        taken={name: owners[i] for i, name in names.items() if i in owners},
    )
    if missing := answers.count(None):
        log.warning("%d of %d new clusters got no name", missing, len(answers))
    given = zip(untitled, answers, strict=True)
    return titles | {cluster.cluster_id: title for cluster, title in given if title}
