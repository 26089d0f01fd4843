"""One pass over all vectors: check them, count them, and draw a sample that file order cannot sway.

A row is drawn by a seeded hash of its id, so the same ids give the same sample however they are
spread over files, and a sample of fewer rows is the beginning of a sample of more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.vectors import Shard, VectorSource, hash_ids, read_blocks, shorten_texts
from pipelines.runtime.arrow import column_to_vectors, vectors_to_column
from pipelines.runtime.errors import InputError

TEXT_CHARACTERS = 2_000
MOST_LABELS = 10_000
"""Different labels that can be scored against."""
_CHECKED_IDS = 20_000_000
_LAST = float(2**64)


@dataclass(frozen=True)
class SamplePlan:
    """How many rows to draw from how many."""

    rows: int
    """Rows of the whole source."""
    vectors: int
    """Rows to keep the vector of."""
    documents: int
    """Rows to keep the vector, text and label of."""
    seed: int

    def limit(self, wanted: int) -> float:
        """The hash below which about ``wanted`` rows lie, with room for chance (6 sigma)."""
        if wanted >= self.rows:
            return _LAST
        return _LAST * min(1.0, (wanted + 6 * wanted**0.5 + 10) / self.rows)


@dataclass(frozen=True)
class Sample:
    """Rows in the order of their hashes."""

    ids: pa.Array
    orders: np.ndarray
    """uint64 (n,), the hash of each id."""
    vectors: np.ndarray
    """float32 (n, d)."""
    texts: pa.Array | None
    """The first 2,000 characters; null beyond the rows that were drawn as documents."""
    labels: pa.Array | None

    def head(self, rows: int) -> Sample:
        """The first ``rows`` rows: itself a sample."""
        return Sample(
            self.ids[:rows],
            self.orders[:rows],
            self.vectors[:rows],
            None if self.texts is None else self.texts[:rows],
            None if self.labels is None else self.labels[:rows],
        )

    def take(self, rows: np.ndarray) -> Sample:
        """The ``rows``, int (m,), in their order."""
        chosen = pa.array(rows)
        return Sample(
            self.ids.take(chosen),
            self.orders[rows],
            self.vectors[rows],
            None if self.texts is None else self.texts.take(chosen),
            None if self.labels is None else self.labels.take(chosen),
        )

    def __len__(self) -> int:
        return len(self.orders)


@dataclass(frozen=True)
class Scan:
    """What one pass over a shard, or over all of them, found."""

    rows: int
    zeros: int
    """Vectors of length zero among ``rows``."""
    labelled: int
    """Rows with a label."""
    labels: frozenset[str]
    """All different labels."""
    largest: float
    """The largest absolute coordinate."""
    rejected: pa.Table
    """id and reason of rows that were left out."""
    hashes: np.ndarray
    """uint64: hashes of ids, all or (beyond 20 million rows) the lowest, to find repeats."""
    sample: Sample

    def to_tables(self) -> dict[str, pa.Table]:
        """The same as Arrow tables, to travel between workers and driver."""
        numbers = {"rows": self.rows, "zeros": self.zeros, "labelled": self.labelled}
        columns = {"id": self.sample.ids, "order": self.sample.orders}
        columns["vector"] = vectors_to_column(self.sample.vectors)
        if self.sample.texts is not None:
            columns["text"] = self.sample.texts
        if self.sample.labels is not None:
            columns["label"] = self.sample.labels
        return {
            "totals": pa.table({k: [v] for k, v in {**numbers, "largest": self.largest}.items()}),
            "rejected": self.rejected,
            "hashes": pa.table({"hash": self.hashes}),
            "labels": pa.table({"label": pa.array(sorted(self.labels), pa.string())}),
            "sample": pa.table(columns),
        }


def scan_shard(source: VectorSource, shard: Shard, plan: SamplePlan) -> Scan:
    """Read one shard once; raises :class:`InputError` for vectors that cannot be clustered."""
    rows = zeros = labelled = 0
    largest = 0.0
    found_labels: set[str] = set()
    rejected, hashes, drawn = [], [], []
    keep_below, text_below = plan.limit(plan.vectors), plan.limit(plan.documents)
    for block in read_blocks(source, shard):
        orders = hash_ids(block.ids, plan.seed)
        rows += len(orders)
        zeros += int((~block.vectors.any(axis=1)).sum())
        largest = max(largest, float(np.abs(block.vectors).max(initial=0)))
        rejected.append(block.rejected)
        hashes.append(orders[orders <= plan.limit(_CHECKED_IDS)])
        keep = np.flatnonzero(orders <= keep_below)
        chosen = pa.array(keep)
        texts = labels = None
        if block.labels is not None:
            labelled += len(block.labels) - block.labels.null_count
            labels = block.labels.take(chosen)
            found_labels.update(block.labels.unique().drop_null().to_pylist())
            _refuse_too_many(found_labels, source)
        if block.texts is not None:
            wanted = orders[keep] <= text_below
            texts = shorten_texts(block.texts.take(chosen), TEXT_CHARACTERS, wanted)
        drawn.append(
            Sample(block.ids.take(chosen), orders[keep], block.vectors[keep], texts, labels)
        )
    sample = _join(drawn, source.dimension)
    left_out = pa.concat_tables(rejected)
    return Scan(
        rows,
        zeros,
        labelled,
        frozenset(found_labels),
        largest,
        left_out,
        np.concatenate(hashes),
        sample,
    )


def scan_from_tables(tables: Mapping[str, pa.Table]) -> Scan:
    """The scan that :meth:`Scan.to_tables` took apart."""
    sample = tables["sample"]
    names = sample.column_names
    return Scan(
        **tables["totals"].to_pylist()[0],
        labels=frozenset(tables["labels"].column("label").to_pylist()),
        rejected=tables["rejected"],
        hashes=tables["hashes"].column("hash").to_numpy(),
        sample=Sample(
            sample.column("id").combine_chunks(),
            sample.column("order").to_numpy(),
            column_to_vectors(sample.column("vector")),
            sample.column("text").combine_chunks() if "text" in names else None,
            sample.column("label").combine_chunks() if "label" in names else None,
        ),
    )


def merge_scans(scans: Iterable[Scan], source: VectorSource, plan: SamplePlan) -> Scan:
    """The scan of all shards, its sample cut to exactly the rows planned.

    Raises :class:`InputError` for an id that two rows share.
    """
    parts = list(scans)
    sample = _join([part.sample for part in parts], source.dimension)
    sample = sample.take(np.argsort(sample.orders, kind="stable"))
    hashes = np.sort(np.concatenate([part.hashes for part in parts]))
    twice = np.flatnonzero(sample.orders[1:] == sample.orders[:-1])
    refuse_repeats(hashes, source, [sample.ids[int(place)].as_py() for place in twice[:1]])
    labels = frozenset().union(*(part.labels for part in parts))
    _refuse_too_many(labels, source)
    return Scan(
        sum(part.rows for part in parts),
        sum(part.zeros for part in parts),
        sum(part.labelled for part in parts),
        labels,
        max(part.largest for part in parts),
        pa.concat_tables([part.rejected for part in parts]).sort_by("id"),
        hashes,
        sample.head(plan.vectors),
    )


def _refuse_too_many(labels: Collection[str], source: VectorSource) -> None:
    if len(labels) > MOST_LABELS:
        raise InputError(
            f"{source.uri}: column {source.columns.label!r} holds more than {MOST_LABELS:,} "
            f"different labels, such as {min(labels)[:60]!r}: it looks like an id or a text. Name "
            "another --label-column"
        )


def refuse_repeats(hashes: np.ndarray, source: VectorSource, known: Sequence[Any] = ()) -> None:
    """Raise :class:`InputError` where sorted ``hashes`` of ids repeat; some repeat is ``known``."""
    repeats = int((hashes[1:] == hashes[:-1]).sum())
    if repeats:
        example = f" (for example {known[0]!r})" if known else ""
        raise InputError(
            f"{source.uri}: {repeats} rows repeat the {source.columns.id!r} of another{example}; "
            "ids must be unique. Was the corpus embedded twice into one folder?"
        )


def _join(samples: list[Sample], dimension: int) -> Sample:
    first = samples[0]
    return Sample(
        pa.concat_arrays([sample.ids for sample in samples]),
        np.concatenate([sample.orders for sample in samples]),
        np.concatenate([sample.vectors for sample in samples]).reshape(-1, dimension),
        None if first.texts is None else pa.concat_arrays([s.texts for s in samples]),
        None if first.labels is None else pa.concat_arrays([s.labels for s in samples]),
    )
