"""From rows of all shards to decisions, over Ray, whatever tells which rows are alike.

``read`` keeps of every row its id, its place in the order and a digest of what is compared; pairs
then come in rounds, a unit of work at a time, and the driver decides. It holds some 60 bytes a
document. Stages that are done in the folder of unfinished work stay done.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.duplicates import (
    Decisions,
    Pairs,
    decide,
    merge_pairs,
    no_decisions,
    repeat_decisions,
)
from cluster.sample import refuse_repeats
from cluster.vectors import Block, VectorSource
from pipelines.runtime.arrow import vectors_to_column
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, make_folder, read_bytes, write_bytes
from pipelines.runtime.segments import read_segment, write_segments
from pipelines.runtime.units import Receipt, run_stage

log = logging.getLogger(__name__)

REMOVED, UNDECIDED = 1, 2
"""States of a rank between rounds; 0 is kept."""


@dataclass(frozen=True)
class SearchPlan:
    """What is sought, and in which order documents stand."""

    similarity: float
    keep: str = "first"
    """'first', 'longest', 'central', 'column:NAME', or 'hash': by the hash of their ids alone."""
    seed: int = 0
    checked: int = 0
    """Documents that are compared with all others besides, to measure the search; 0: by size."""


@dataclass(frozen=True)
class Part:
    """The rows of one shard."""

    name: str
    source: int
    """Place of its source: 0 for the documents that are sought in, 1 for those of another set."""
    shard: int
    rows: int
    start: int
    """Position of its first row; rows of another set come after all others."""


@dataclass(frozen=True)
class Order:
    """Positions, which are places in the corpus, and ranks, which are places in the order."""

    parts: tuple[Part, ...]
    ranks: np.ndarray
    """int64 (n,), the rank of each position."""
    fixed: int
    """Ranks below are another set's."""
    same_as: np.ndarray
    """int64 (n,), by rank: the first rank with the same vector or text; itself for the first."""
    empty: np.ndarray
    """bool (n,), by rank: a zero vector or an empty text, which is like nothing."""
    rejected: pa.Table

    @property
    def searched(self) -> np.ndarray:
        """bool (n,), by rank: the first of its kind, and comparable."""
        return (self.same_as == np.arange(len(self.ranks))) & ~self.empty

    def positions(self) -> np.ndarray:
        """int64 (n,), the position of each rank."""
        found = np.empty(len(self.ranks), dtype=np.int64)
        found[self.ranks] = np.arange(len(self.ranks))
        return found

    def expand(self, decisions: Decisions) -> Decisions:
        """The same with what equals an earlier document decided as that is."""
        return repeat_decisions(decisions, self.same_as, ~self.empty, self.fixed)


@dataclass(frozen=True)
class Checked:
    """Documents of the sample that was compared with all others."""

    ranks: np.ndarray
    """int64 (q,)."""
    nearest: np.ndarray
    """int64 (q,): the most similar earlier rank, -1 for none."""
    similarities: np.ndarray
    """float32 (q,), to it; -1 for none."""
    pairs: Pairs
    """Those of at least the similarity sought, whose later document is in the sample."""

    def recall(self, decisions: Decisions) -> tuple[int, int]:
        """How many of the sample were removed, of those that a kept one before them is like."""
        kept = decisions.keepers[self.pairs.earlier] < 0
        ought = np.unique(self.pairs.later[kept])
        return int((decisions.keepers[ought] >= 0).sum()), len(ought)


@dataclass(frozen=True)
class Search:
    """What was found."""

    order: Order
    decisions: Decisions
    pairs: Pairs
    """Of the first round, those of each document with the first others like it."""
    checked: Checked | None
    rounds: int
    cells: int = 0


def owners_of(parts: Sequence[Part], positions: np.ndarray) -> np.ndarray:
    """int64 (m,): places of the parts that rows at ``positions`` of the corpus, int64 (m,), lie in.

    A part without rows starts where the next one does, and has none.
    """
    return np.searchsorted([part.start for part in parts], positions, side="right") - 1


def take_rows(
    parts: Sequence[Part],
    positions: np.ndarray,
    read: Callable[[Part], pa.Table],
    empty: pa.Table,
) -> pa.Table:
    """The rows at ``positions``, int64 (m,), of what ``read`` gives of each part they lie in."""
    if not len(positions):
        return empty
    owners = owners_of(parts, positions)
    tables = [
        read(parts[number]).take(pa.array(positions[owners == number] - parts[number].start))
        for number in np.unique(owners).tolist()
    ]
    back = np.argsort(np.argsort(owners, kind="stable"), kind="stable")
    return pa.concat_tables(tables).take(pa.array(back))


def read_parts(
    sources: Sequence[VectorSource], plan: SearchPlan, work: str, read: Any
) -> tuple[Part, ...]:
    """Read every shard once, by ``read(name, unit)``, to a file of ``rows``; what each holds."""
    make_folder(join(work, "rows"))
    prefixes = ("part", "against")
    units = {
        f"{prefixes[place]}-{number:05d}": [place, number]
        for place, source in enumerate(sources)
        for number in range(len(source.shards))
    }
    receipts = run_stage(work, "read", units, read)
    parts, start = [], 0
    for name, (place, number) in units.items():
        parts.append(Part(name, place, number, receipts[name]["rows"], start))
        start += receipts[name]["rows"]
    return tuple(parts)


def write_rows(
    work: str,
    name: str,
    rows: Sequence[pa.Table],
    drawn: Sequence[pa.Table],
    rejected: Sequence[pa.Table],
) -> Receipt:
    """Write what is kept of a shard's rows."""
    tables = [pa.concat_tables(part) if part else None for part in (rows, drawn, rejected)]
    write_segments(join(work, "rows", name), tables)
    return {"rows": sum(len(table) for table in rows)}


def row_table(block: Block, hashes: np.ndarray, digests: list[bytes | None], keep: str) -> pa.Table:
    """id, hash, digest (null: like nothing), and the key that the order goes by."""
    columns = {
        "id": block.ids,
        "hash": pa.array(hashes),
        "digest": pa.array(digests, pa.binary(16)),
    }
    if keep == "longest" and block.texts is not None:
        columns["key"] = _lengths(block.texts)
    elif keep.startswith("column:") and block.kept is not None:
        column = block.kept.column(0)
        if pa.types.is_nested(column.type) or pa.types.is_interval(column.type):
            raise InputError(
                f"--keep {keep}: that column is {column.type}, which has no order; required are "
                "numbers, dates or words"
            )
        columns["key"] = column
    return pa.table(columns)


def _lengths(texts: pa.Array) -> pa.Array:
    """Characters of each text, none where it is null; bytes need not be UTF-8."""
    if pa.types.is_binary(texts.type) or pa.types.is_large_binary(texts.type):
        texts = texts.cast(pa.binary()).view(pa.string())
    return pc.fill_null(pc.utf8_length(texts.cast(pa.string())), 0)


def vector_table(vectors: np.ndarray, **columns: np.ndarray) -> pa.Table:
    """Float32 (n, d) as the column ``vector`` beside others."""
    return pa.table({**columns, "vector": vectors_to_column(vectors)})


def order_rows(
    parts: Sequence[Part],
    work: str,
    plan: SearchPlan,
    source: VectorSource,
    keys: np.ndarray | None = None,
) -> Order:
    """The order of all rows by the rule; :class:`InputError` for an id that two rows share."""
    tables = [read_segment(join(work, "rows", part.name), 0) for part in parts]
    filled = [table for table in tables if table is not None]
    if not filled:
        raise InputError(f"{source.uri} holds no usable rows: nothing to compare")
    rows = pa.concat_tables([table.select(["hash", "digest"]) for table in filled])
    own_rows = sum(part.rows for part in parts if not part.source)
    hashes = rows["hash"].to_numpy()
    refuse_repeats(np.sort(hashes[:own_rows]), source)
    ranks = np.empty(len(rows), dtype=np.int64)
    fixed = len(rows) - own_rows
    ranks[own_rows:] = np.arange(fixed)
    if plan.keep == "first":
        ranks[:own_rows] = fixed + np.arange(own_rows)
    elif plan.keep == "hash":
        ranks[np.argsort(hashes[:own_rows])] = fixed + np.arange(own_rows)
    else:
        keys = _rising([table["key"] for table in filled]) if keys is None else keys[:own_rows]
        ranks[np.lexsort((hashes[:own_rows], -keys))] = fixed + np.arange(own_rows)
    by_rank = np.empty(len(rows), dtype=np.int64)
    by_rank[ranks] = np.arange(len(rows))
    same_as, empty = _same(rows["digest"].combine_chunks().take(pa.array(by_rank)))
    rejected = [read_segment(join(work, "rows", part.name), 2) for part in parts if not part.source]
    rejected_tables = [table for table in rejected if table is not None]
    none = pa.table({"id": pa.array([], source.id_kind), "reason": pa.array([], pa.string())})
    return Order(
        tuple(parts), ranks, fixed, same_as, empty, pa.concat_tables([none, *rejected_tables])
    )


def _rising(keys: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """int64 (n,) that rise with the keys of all shards, and are lowest where there is none.

    Words that are all numbers go by those. Columns of several types go by what they are as text.
    """
    kinds = {part.type for part in keys}
    kind = kinds.pop() if len(kinds) == 1 else pa.string()
    every = pa.chunked_array([chunk for part in keys for chunk in part.cast(kind).chunks], kind)
    for numbers in (pa.int64(), pa.float64()) if pa.types.is_string(kind) else ():
        with contextlib.suppress(pa.ArrowInvalid):
            every = every.cast(numbers)
            break
    if pa.types.is_float16(every.type):
        every = every.cast(pa.float32())
    missing = pc.is_null(every, nan_is_null=True).to_numpy()
    ranked = pc.rank(every, sort_keys="ascending", tiebreaker="dense").to_numpy()
    return np.where(missing, 0, ranked.astype(np.int64))


def _same(digests: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """For each place the first with that digest, int64 (n,), and whether it has none, bool (n,)."""
    empty = pc.is_null(digests).to_numpy(zero_copy_only=False)
    filled = pc.fill_null(digests, pa.scalar(bytes(16), digests.type))
    halves = np.frombuffer(filled.buffers()[1], dtype=np.uint64).reshape(-1, 2)[: len(digests)]
    order = np.lexsort((np.arange(len(halves)), halves[:, 1], halves[:, 0]))
    is_new = np.append(True, (np.diff(halves[order], axis=0) != 0).any(axis=1))[: len(order)]
    same_as = np.empty(len(halves), dtype=np.int64)
    same_as[order] = order[np.flatnonzero(is_new)[np.cumsum(is_new) - 1]]
    same_as[empty] = np.flatnonzero(empty)
    return same_as, empty


def write_ranks(order: Order, work: str) -> None:
    """Tell each shard its rows' ranks; -1 for those that are not compared."""
    make_folder(join(work, "placed"))
    searched = order.searched
    shown = np.where(searched[order.ranks], order.ranks, -1)
    for part in order.parts:
        rows = shown[part.start : part.start + part.rows]
        write_bytes(join(work, "ranks", part.name), rows.astype("<i8").tobytes())


def read_ranks(work: str, name: str) -> np.ndarray:
    """The ranks of a shard's rows, int64."""
    return np.frombuffer(read_bytes(join(work, "ranks", name)), dtype="<i8")


def pair_tables(pairs: Pairs) -> list[pa.Table | None]:
    """Pairs as two tables."""
    columns = {"later": pairs.later, "earlier": pairs.earlier, "similarity": pairs.similarities}
    return [pa.table(columns), pa.table({"rank": pairs.overfull})]


def read_pairs(path: str, first: int = 0) -> Pairs:
    """Undo :func:`pair_tables` for the segments from ``first`` on."""
    table, overfull = read_segment(path, first), read_segment(path, first + 1)
    none = merge_pairs([])
    if table is None:
        return none
    return Pairs(
        table["later"].to_numpy(),
        table["earlier"].to_numpy(),
        table["similarity"].to_numpy(),
        none.overfull if overfull is None else overfull["rank"].to_numpy(),
    )


def decide_in_rounds(
    order: Order, groups: int, find: Any, work: str
) -> tuple[Pairs, Decisions, int]:
    """Pairs of all groups and decisions by them, until nothing is undecided.

    ``find(round, states, name, unit)`` writes the pairs of one group; ``states`` is the path of
    what became of each rank, or "" at first.
    """
    decisions = no_decisions(len(order.ranks))
    first: Pairs | None = None
    number, states = 0, ""
    while first is None or decisions.undecided.any():
        stage = f"pairs-{number}"
        make_folder(join(work, f"found-{number}"))
        units = {f"group-{group:05d}": group for group in range(groups)}
        run_stage(work, stage, units, partial(find, number, states))
        pairs = merge_pairs([read_pairs(join(work, f"found-{number}", name)) for name in units])
        decisions = decide(pairs, decisions)
        first = pairs if first is None else first
        left = int(decisions.undecided.sum())
        log.info("round %d: %d pairs, %d documents undecided", number, len(pairs.later), left)
        number += 1
        states = join(work, f"states-{number}")
        state = np.where(decisions.undecided, UNDECIDED, 0) + REMOVED * (decisions.keepers >= 0)
        write_bytes(states, state.astype(np.uint8).tobytes())
    return first, decisions, number
