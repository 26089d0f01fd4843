"""Which pairs are trained on in which step, settled before training starts.

In: Parquet files of pairs. Out: ``batches.parquet``, whose row group s - 1 is the global batch of
step s, and ``heldout.parquet``. A rank reads its own slice of one row group a step. A batch is
therefore a function of seed and step alone: however many workers there are and however often a
run was interrupted, step s sees the same pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import atomic_output, join, open_filesystem

BATCHES = "batches.parquet"
HELDOUT = "heldout.parquet"
_FEWEST_PAIRS = 2
MOST_HELDOUT = 128


@dataclass(frozen=True)
class BatchPlan:
    """How many pairs go where."""

    steps: int
    batch_pairs: int
    heldout_pairs: int
    seed: int


def choose_heldout(pairs: int, enough: int) -> int:
    """How many of some pairs to hold out: all that is useful where there are enough, else a tenth.

    Args:
        pairs: how many there are.
        enough: how many would do for every training step and the most that are held out.
    """
    return MOST_HELDOUT if pairs >= enough else max(2, min(MOST_HELDOUT, pairs // 10))


def write_batches(pairs: pa.Table, plan: BatchPlan, folder: str) -> dict[str, int]:
    """Write ``batches.parquet`` and ``heldout.parquet`` into ``folder``; the counts.

    Pairs are shuffled anew each time they have all been seen. Pairs of one document are held out
    together, so that no held-out text is trained on.

    Args:
        pairs: columns ``anchor``, ``positive``, ``id``; optionally ``negative`` and ``label``.
        plan: how many of them go where.
        folder: where to, local or remote.

    Raises:
        InputError: no or too few pairs, or pairs that teach nothing because all are equal.
    """
    check_pairs(pairs, plan)
    heldout, training = split_heldout(pairs, plan)
    needed = plan.steps * plan.batch_pairs
    epochs = math.ceil(needed / len(training))
    generator = np.random.default_rng([plan.seed, 1])
    order = np.concatenate([generator.permutation(len(training)) for _ in range(epochs)])[:needed]
    _write(join(folder, BATCHES), training, order, plan.batch_pairs)
    _write(join(folder, HELDOUT), heldout, np.arange(len(heldout)), max(1, len(heldout)))
    return {
        "pairs": len(pairs),
        "training_pairs": len(training),
        "heldout_pairs": len(heldout),
        "epochs": epochs,
    }


def check_pairs(pairs: pa.Table, plan: BatchPlan) -> None:
    """Raise :class:`InputError` for pairs from which nothing can be learned."""
    if len(pairs) < _FEWEST_PAIRS:
        raise InputError(
            f"{len(pairs)} pairs found; at least {_FEWEST_PAIRS} are required, and hundreds to "
            "learn something: each pair's negatives are the other pairs"
        )
    available = max(0, len(pairs) - plan.heldout_pairs)
    if plan.batch_pairs > available:
        raise InputError(
            f"batch_pairs is {plan.batch_pairs}, but only {available} of {len(pairs)} pairs are "
            f"for training ({plan.heldout_pairs} are held out): lower --batch-pairs or "
            "--heldout-pairs, or make more pairs"
        )
    if len(pc.unique(pairs["anchor"])) == 1 and len(pc.unique(pairs["positive"])) == 1:
        raise InputError(
            f"all {len(pairs)} pairs are equal: nothing tells a pair from its negatives"
        )


def split_heldout(pairs: pa.Table, plan: BatchPlan) -> tuple[pa.Table, pa.Table]:
    """Held-out pairs, of two documents at least, and training pairs, by a hash of documents' ids.

    Pairs of one document are no negatives of each other, so one document alone has no loss.
    """
    ids = [str(value).encode() for value in pairs["id"].to_pylist()]
    salt = str(plan.seed).encode() + b"\0"
    digests = np.frombuffer(
        b"".join(hashlib.sha256(salt + value).digest()[:8] for value in ids), "<u8"
    )
    order = np.argsort(digests, kind="stable")
    cut = plan.heldout_pairs
    sorted_digests = digests[order]
    if 0 < cut < len(order):
        second = np.searchsorted(sorted_digests, sorted_digests[0], side="right")
        last = max(cut - 1, min(second, len(order) - 1))
        cut = int(np.searchsorted(sorted_digests, sorted_digests[last], side="right"))
    if len(order) - cut < plan.batch_pairs:
        raise InputError(
            f"too few documents: {len(np.unique(digests))} found, and holding out "
            f"{plan.heldout_pairs} pairs by document, of two documents at least, leaves "
            f"{len(order) - cut} for batches of {plan.batch_pairs}; lower --heldout-pairs or "
            "--batch-pairs, or make pairs of more documents"
        )
    return pairs.take(order[:cut]), pairs.take(order[cut:])


def read_batch(folder: str, step: int, rank: int, world_size: int) -> pa.Table:
    """The pairs of one rank in a step, counted from 1; the batch is cut as evenly as it goes."""
    filesystem, inner = open_filesystem(join(folder, BATCHES))
    with pq.ParquetFile(inner, filesystem=filesystem) as file:
        table = file.read_row_group(step - 1)
    return rank_slice(table, rank, world_size)


def read_heldout(folder: str, rank: int, world_size: int) -> pa.Table:
    """The held-out pairs of one rank."""
    filesystem, inner = open_filesystem(join(folder, HELDOUT))
    return rank_slice(pq.read_table(inner, filesystem=filesystem), rank, world_size)


def rank_slice(table: pa.Table, rank: int, world_size: int) -> pa.Table:
    """Rows of one rank: consecutive, and at most one more than any other rank's."""
    start, stop = (len(table) * place // world_size for place in (rank, rank + 1))
    return table.slice(start, stop - start)


def text_keys(*columns: Sequence[str]) -> np.ndarray:
    """int64 (n, k): hashes of n texts in each of k columns, by which equal texts are known."""
    keys = [
        [hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8] for text in column]
        for column in columns
    ]
    return np.frombuffer(b"".join(b"".join(row) for row in zip(*keys, strict=True)), "<i8").reshape(
        -1, len(columns)
    )


def _write(path: str, table: pa.Table, order: np.ndarray, group_rows: int) -> None:
    with atomic_output(path) as sink, pq.ParquetWriter(sink, table.schema) as writer:
        for start in range(0, len(order), group_rows):
            rows = table.take(order[start : start + group_rows])
            writer.write_table(rows, row_group_size=group_rows)
