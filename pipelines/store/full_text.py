"""Documents by their words, with Lance's full-text index, and two rankings made one.

The index is part of the documents, and so of a version. Lance does not answer for words and
vectors in one call: their rankings are joined here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipelines.runtime.errors import InputError
from pipelines.store.documents import Documents

_INDEX = "words"
_WORDS = {
    "base_tokenizer": "icu",  # finds words also where a script has no blanks between them
    # Words as they stand, in any language; likeness is the vectors' part. By default Lance takes
    # every text for English: "The Who" has no word then, and "resume" does not find "résumé".
    "stem": False,
    "remove_stop_words": False,
    "max_token_length": None,  # else identifiers of more than 40 characters are left out
    "memory_limit": 1024,
}
"""How words are indexed; MiB."""
_RANK_OFFSET = 60


def has_text_index(documents: Documents) -> bool:
    """Whether words can be searched for."""
    return any(index.name == _INDEX for index in documents.dataset.describe_indices())


def index_text(documents: Documents) -> None:
    """Bring the index of words up to date, or make it."""
    if has_text_index(documents):
        documents.dataset.optimize.optimize_indices(index_names=[_INDEX])
    elif documents.count():
        documents.dataset.create_scalar_index("text", "INVERTED", name=_INDEX, **_WORDS)


def find_words(
    documents: Documents, words: str, limit: int, *, filter: str | None = None
) -> list[Any]:
    """Ids of the documents that have some of these words, best first (BM25).

    Raises :class:`InputError` where the documents have no index of words, and for a faulty filter.
    """
    if not has_text_index(documents):
        raise InputError(
            "this version has no index of words: a night with --full-text makes one "
            "(jobs/nightly_reindex.py)"
        )
    table = documents.dataset.to_table(
        columns=["id", "_score"],
        full_text_query=words,
        filter=documents.condition(filter),
        prefilter=True,
        limit=limit,
    )
    return table.sort_by([("_score", "descending"), ("id", "ascending")])["id"].to_pylist()


def fuse(rankings: Sequence[Sequence[Any]], limit: int) -> list[tuple[Any, float]]:
    """The best of several rankings of ids, each with the sum of 1 / (60 + rank).

    Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009); equal sums are in the order of the
    first ranking.
    """
    scores: dict[Any, float] = {}
    for ranking in rankings:
        for rank, row_id in enumerate(ranking, 1):
            scores[row_id] = scores.get(row_id, 0.0) + 1 / (_RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda entry: -entry[1])[:limit]


def in_order(table: pa.Table, ids: Sequence[Any]) -> pa.Table:
    """The rows of ``table`` in the order of their ``id`` among ``ids``."""
    place = {row_id: number for number, row_id in enumerate(table["id"].to_pylist())}
    return table.take(pa.array([place[row_id] for row_id in ids], pa.int64()))
