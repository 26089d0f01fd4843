"""The two indexes of a version: of vectors, and of words for who wants them.

When the vector index is extended, when trained anew, and what it finds. Its kind is a measured
choice, ``docs/store.md`` has the figures. Recall is measured each time on a sample of the
documents' own vectors, against exact search among all of them; where an index was extended also on
what is new, which it rounds as suited the vectors that it was trained on: Lance cuts off what lies
beyond their range.

Indexes are part of the documents, and so of a version. Lance does not answer for words and vectors
in one call: their rankings are joined here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.runtime.arrow import column_to_vectors
from pipelines.runtime.errors import InputError
from pipelines.store.columns import EMBEDDING
from pipelines.store.documents import Documents

EXACT_BELOW = 4096
"""Documents below which all vectors are compared: that takes milliseconds."""
LEAST_RECALL = 0.95
AIMED_RECALL = 0.98
"""What is aimed at, so that a version passes :data:`LEAST_RECALL` on other queries too."""
NEIGHBOURS = 10
FIRST_PROBES = 8
FIRST_REFINE = 4
MOST_REFINE = 64
_GROWTH = 2.0
_NEW_QUERIES = 50
_SAME_COSINE = 1e-5


@dataclass(frozen=True)
class IndexReport:
    """The vector index of a version; goes into its record."""

    kind: str
    """``exact`` where there are too few vectors for an index, else the index's type."""
    rows: int
    trained_rows: int
    """Rows there were when it was trained."""
    partitions: int
    probes: int
    """Partitions that a search looks into."""
    refine: int
    """It finds this many times the wanted documents; their full vectors decide the order."""
    recall_at_10: float
    """Share of the ten nearest others that it finds, of a sample of the documents' own vectors."""
    recall_queries: int
    trained: bool
    """Whether it was trained anew, rather than updated by what changed."""
    seconds: float


@dataclass(frozen=True)
class _Sample:
    """Queries with what exact search finds."""

    ids: list[Any]
    vectors: np.ndarray
    """float32 (q, d), rows unit-norm."""
    least: np.ndarray
    """float32 (q,): cosine of the tenth nearest other document, or of the last there is."""
    wanted: int
    """How many others there are to be found, at most ten."""

    def part(self, start: int, stop: int) -> _Sample:
        """Some of the queries."""
        some = slice(start, stop)
        return _Sample(self.ids[some], self.vectors[some], self.least[some], self.wanted)


def update_index(
    documents: Documents, earlier: Mapping[str, Any] | None, *, recall_queries: int, seed: int
) -> IndexReport:
    """Bring the index up to date with what changed and measure it.

    Args:
        documents: of the candidate; the index is part of them.
        earlier: the base's report, None without one.
        recall_queries: size of the sample.
        seed: decides the sample.
    """
    started = time.monotonic()
    rows = documents.count()
    sample, held = None, documents.index_rows()
    if rows >= EXACT_BELOW:
        # the last ones; rows that are deleted already count among them
        fresh = 0 if earlier is None or held is None else min(rows, held[1])
        random = np.random.default_rng(seed)
        drawn = random.choice(rows, min(recall_queries, rows), replace=False)
        newest = rows - 1 - random.choice(fresh, min(_NEW_QUERIES, fresh), replace=False)
        both = _answer(documents, np.concatenate([drawn, newest]))
        sample, newcomers = both.part(0, len(drawn)), both.part(len(drawn), len(both.ids))
    if sample is None or not sample.vectors.any():
        documents.drop_index()
        seconds = round(time.monotonic() - started, 3)
        return IndexReport("exact", rows, rows, 0, 0, 0, 1.0, 0, False, seconds)
    report = None
    if earlier is not None and held is not None:
        last = IndexReport(**earlier)
        if last.kind != "exact" and rows <= _GROWTH * last.trained_rows:
            documents.extend_index()
            report = _tune(documents, sample, replace(last, rows=rows))
            effort = report.probes, report.refine
            if newcomers.ids and _recall(documents, newcomers, *effort) < LEAST_RECALL:
                report = None
    trained = report is None or report.recall_at_10 < LEAST_RECALL
    if trained:
        partitions = documents.train_index()
        start = IndexReport("IVF_SQ", rows, rows, partitions, 0, 0, 0.0, 0, True, 0.0)
        report = _tune(documents, sample, start)
    assert report is not None
    return replace(report, trained=trained, seconds=round(time.monotonic() - started, 3))


def _tune(documents: Documents, sample: _Sample, report: IndexReport) -> IndexReport:
    """The report with as much searching as the aimed recall takes, and the recall.

    First more partitions are looked into; where all of them do not reach :data:`LEAST_RECALL`, the
    index's rounding hides near neighbours, and more of what it finds is compared exactly.
    """
    probes, refine = min(FIRST_PROBES, report.partitions), FIRST_REFINE
    while True:
        recall = _recall(documents, sample, probes, refine)
        if recall < AIMED_RECALL and probes < report.partitions:
            probes = min(2 * probes, report.partitions)
        elif recall < LEAST_RECALL and refine < MOST_REFINE:
            refine *= 4
        else:
            break
    found = round(recall, 4)
    return replace(
        report,
        probes=probes,
        refine=refine,
        recall_at_10=found,
        recall_queries=len(sample.vectors),
    )


def _recall(documents: Documents, sample: _Sample, probes: int, refine: int) -> float:
    """Share of the wanted neighbours that are found; equally near ones count alike."""
    found = 0
    for own, vector, least in zip(sample.ids, sample.vectors, sample.least, strict=True):
        hits = documents.nearest(vector, sample.wanted + 1, ["id"], probes=probes, refine=refine)
        cosines = 1 - hits["_distance"].to_numpy()
        others = np.array([hit != own for hit in hits["id"].to_pylist()], dtype=bool)
        near = int(np.count_nonzero(cosines[others] >= least - _SAME_COSINE))
        found += min(near, sample.wanted)
    return found / (sample.wanted * len(sample.vectors))


def _answer(documents: Documents, positions: np.ndarray) -> _Sample:
    """Documents at ``positions``, int64 (q,), and the exact answer by a pass over all vectors."""
    table = documents.at(positions, ["id", EMBEDDING])
    queries = unit(column_to_vectors(table[EMBEDDING]))
    wanted = min(NEIGHBOURS, documents.count() - 1)
    best = np.full((len(queries), wanted), -np.inf, dtype=np.float32)
    start = 0
    for batch in documents.batches([EMBEDDING]):
        cosines = queries @ unit(column_to_vectors(batch.column(EMBEDDING))).T
        inside = (positions >= start) & (positions < start + batch.num_rows)
        cosines[np.flatnonzero(inside), positions[inside] - start] = -np.inf  # itself
        best = np.partition(np.hstack([best, cosines]), -wanted, axis=1)[:, -wanted:]
        start += batch.num_rows
    return _Sample(table["id"].to_pylist(), queries, best.min(axis=1), wanted)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of float32 (n, d) scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


_WORD_INDEX = "words"
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
    return any(index.name == _WORD_INDEX for index in documents.dataset.describe_indices())


def index_text(documents: Documents) -> None:
    """Bring the index of words up to date, or make it."""
    if has_text_index(documents):
        documents.dataset.optimize.optimize_indices(index_names=[_WORD_INDEX])
    elif documents.count():
        documents.dataset.create_scalar_index("text", "INVERTED", name=_WORD_INDEX, **_WORDS)


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
