"""The vector index of a version: when it is extended, when trained anew, and what it finds.

Its kind is a measured choice, ``docs/store.md`` has the figures. Recall is measured each time on a
sample of the documents' own vectors, against exact search among all of them; where an index was
extended also on what is new, which it rounds as suited the vectors that it was trained on: Lance
cuts off what lies beyond their range.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.store.columns import EMBEDDING, matrix
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
        fresh = 0 if earlier is None or held is None else held[1]  # the last ones
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
    queries = unit(matrix(table[EMBEDDING].combine_chunks()))
    wanted = min(NEIGHBOURS, documents.count() - 1)
    best = np.full((len(queries), wanted), -np.inf, dtype=np.float32)
    start = 0
    for batch in documents.batches([EMBEDDING]):
        cosines = queries @ unit(matrix(batch.column(EMBEDDING))).T
        inside = (positions >= start) & (positions < start + batch.num_rows)
        cosines[np.flatnonzero(inside), positions[inside] - start] = -np.inf  # itself
        best = np.partition(np.hstack([best, cosines]), -wanted, axis=1)[:, -wanted:]
        start += batch.num_rows
    return _Sample(table["id"].to_pylist(), queries, best.min(axis=1), wanted)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of float32 (n, d) scaled to length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
