"""Near-duplicates, exactly: pairs of vectors by their cosine, and the rule that says who is kept.

Documents stand in one order, their ranks; 0 comes first. A document is removed exactly if one that
is kept comes before it and is at least that similar, and the first such keeps it. So a removed
document never keeps another, and what is removed depends on vectors and ranks alone.

Pairs are sought in cells of a k-means. Of two unit vectors at most r apart on either side of the
plane halfway between two centroids, one lies within r/2 of that plane: where every vector visits
the cells across a plane that near, each pair meets in a cell, and none is missed.

Most of both is done with vectors' shadows in a space of few dimensions, that of the leading
principal axes. Shadows are no farther apart than their vectors, so that cells of shadows miss no
pair either; and with the lengths of what the shadows leave out, their product bounds the cosine
from above (Cauchy-Schwarz), so that few other pairs have to be looked at whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from cluster.assign import one_thread_each, side_by_side, split_by
from cluster.distances import squared_lengths

MOST_PAIRS = 16
"""Pairs of a document that are looked at in one round, those with the earliest documents."""
_LEFT_ROWS = 1_024
_RIGHT_ROWS = 4_096
_EXACT_BYTES = 32 << 20
_VISIT_ROWS = 512
_CELLS_AT_A_TIME = 16
_EARLY = 512
_MOST_CELLS = 2_048
_ROUNDING = 1e-6
_HIDDEN = 0.25
_AXES_STEP = 16
_DRAWN = 512
_MOST_CANDIDATES = 64
"""Where more than one pair in so many may be near, all are multiplied whole."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of ranks with their similarity, by ``later``, then ``earlier``; each pair once."""

    later: np.ndarray
    """int64 (m,)."""
    earlier: np.ndarray
    """int64 (m,), each below its ``later``."""
    similarities: np.ndarray
    """float32 (m,), of the two."""
    overfull: np.ndarray
    """int64: ranks of which only the first 16 pairs are listed."""


@dataclass(frozen=True)
class Decisions:
    """What becomes of each rank."""

    keepers: np.ndarray
    """int64 (n,): the rank that keeps a removed document; -1 where it is kept, or undecided."""
    similarities: np.ndarray
    """float32 (n,), of the removed to its keeper; NaN elsewhere."""
    undecided: np.ndarray
    """bool (n,): all the pairs looked at so far are with removed documents, and there are more."""


def to_units(vectors: np.ndarray) -> np.ndarray:
    """float32 (n, d) of length 1; rows of zeros stay as they are."""
    lengths = np.sqrt(squared_lengths(vectors)).astype(np.float32)
    return vectors / np.where(lengths > 0, lengths, np.float32(1))[:, None]


def exact_cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 (m,): the cosine of each row of ``left`` with its row of ``right``, by float64.

    The same bits whatever rows stand beside it; 1 for rows that are equal.
    """
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    products = np.einsum("ij,ij->i", wide_left, wide_right)
    lengths = squared_lengths(left) * squared_lengths(right)
    return (products / np.sqrt(lengths)).astype(np.float32)


@dataclass(frozen=True)
class Shadows:
    """The space of few dimensions that vectors cast their shadows into."""

    axes: np.ndarray
    """float32 (d, p), orthonormal columns."""

    @classmethod
    def of(cls, units: np.ndarray) -> Shadows:
        """The first principal axis, and those that show three quarters of what it does not show.

        Of the squared length of some of the unit vectors (n, d); what is found does not depend on
        them. The first may be little more than the direction that all have in common.
        """
        some = units[:: max(1, len(units) // _DRAWN)][:_DRAWN].astype(np.float64)
        _, lengths, axes = np.linalg.svd(some, full_matrices=False)
        hidden = np.cumsum(lengths[::-1] ** 2)[::-1] - lengths**2
        count = int(np.argmax(hidden <= _HIDDEN * hidden[0])) + 1 if len(hidden) else 0
        count = -(-count // _AXES_STEP) * _AXES_STEP
        return cls(np.ascontiguousarray(axes[:count].T, dtype=np.float32))

    def cast(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (n, p), the shadows of vectors (n, d)."""
        return vectors @ self.axes

    def bounds(self, units: np.ndarray) -> np.ndarray:
        """float32 (n, p + 1) of unit vectors; a product of two is at least their cosine's."""
        shadows = self.cast(units)
        hidden = 1 - squared_lengths(shadows)
        hidden = np.sqrt(np.maximum(hidden, 0) + _margin(units.shape[1]))
        return np.concatenate([shadows, hidden[:, None].astype(np.float32)], axis=1)


def _margin(dimension: int) -> np.float32:
    """What rounding may take from a product of two unit vectors."""
    return np.float32(_ROUNDING * np.sqrt(dimension))


@dataclass(frozen=True)
class Rows:
    """Unit vectors that are compared, n of them."""

    units: np.ndarray
    """float32 (n, d)."""
    bounds: np.ndarray
    """float32 (n, p + 1), of :meth:`Shadows.bounds`."""
    ranks: np.ndarray
    """int64 (n,)."""

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, chosen: slice | np.ndarray) -> Rows:
        return Rows(self.units[chosen], self.bounds[chosen], self.ranks[chosen])


class Cells:
    """The Voronoi cells of centroids, float32 (k, p), and which of them a vector visits.

    With all its visits each pair of unit vectors of at least ``similarity`` meets in the cell of
    one of the two, also where centroids and vectors are their shadows.
    """

    def __init__(self, centroids: np.ndarray, similarity: float) -> None:
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self._norms = squared_lengths(self.centroids).astype(np.float32)
        # What rounding may take from a difference of two squared distances near 1.
        slack = 16 * _margin(self.centroids.shape[1])
        apart = self._norms[:, None] + self._norms - 2 * self.centroids @ self.centroids.T
        apart = np.sqrt(np.maximum(apart, 0, out=apart) + slack, out=apart)
        # A vector visits where its squared distances to the two centroids differ by no more.
        apart *= np.float32(np.sqrt(2 - 2 * similarity))
        apart += slack
        np.fill_diagonal(apart, -1)
        self._limits = apart
        self._factors = np.ascontiguousarray(self.centroids.T) * np.float32(-2)

    def __len__(self) -> int:
        return len(self.centroids)

    def visits(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Home cells, int32 (n,), then rows and cells, int64 and int32 (v,), of all visits."""
        starts = range(0, len(units), _VISIT_ROWS)
        if not starts:
            return np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int32)
        parts = side_by_side(lambda start: self._visits(units, start), starts)
        homes, rows, cells = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return homes.astype(np.int32), rows, cells.astype(np.int32)

    def _visits(self, units: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of the rows from ``start`` on that are read at a time."""
        block = units[start : start + _VISIT_ROWS]
        above = block @ self._factors
        above += self._norms
        home = above.argmin(axis=1)
        above -= above[np.arange(len(block)), home][:, None]
        above -= self._limits[home]
        row, cell = np.nonzero(above <= 0)
        return home, start + row, cell


class PairSearch:
    """Pairs of at least ``similarity`` in the cells that it is given, one after the other.

    With ``fixed`` the first so many ranks are another set of documents, all kept: only pairs of one
    of them with one of the others count.
    """

    def __init__(self, similarity: float, fixed: int = 0) -> None:
        self._similarity = np.float32(similarity)
        self._fixed = fixed
        self._found: list[Pairs] = []
        self._count = 0

    def add_cell(self, members: Rows, visitors: Rows) -> None:
        """Pairs of ``visitors`` with ``members`` of a cell."""
        for top in range(0, len(visitors), _LEFT_ROWS):
            left = visitors[top : top + _LEFT_ROWS]
            for start in range(0, len(members), _RIGHT_ROWS):
                self._add_tile(left, members[start : start + _RIGHT_ROWS])

    def add_members(self, members: Rows) -> None:
        """Pairs among the ``members`` of one cell."""
        for start in range(0, len(members), _LEFT_ROWS):
            rows = members[start : start + _LEFT_ROWS]
            self._add_tile(rows, rows)
            self.add_cell(members[start + _LEFT_ROWS :], rows)

    def pairs(self) -> Pairs:
        """All that was found, each pair once."""
        return merge_pairs(self._found)

    def _add_tile(self, left: Rows, right: Rows) -> None:
        margin = _margin(left.units.shape[1])
        i, j, products = _candidates(left, right, self._similarity - margin)
        if not len(i):
            return
        later = np.maximum(left.ranks[i], right.ranks[j])
        earlier = np.minimum(left.ranks[i], right.ranks[j])
        wanted = later != earlier
        if self._fixed:
            wanted &= (earlier < self._fixed) & (later >= self._fixed)
        near = products < self._similarity + margin
        close = np.flatnonzero(wanted & near)
        wanted[close] = (
            _in_steps(exact_cosines, left, right, i[close], j[close]) >= self._similarity
        )
        chosen = np.flatnonzero(wanted)
        order, overfull = _first_pairs(later[chosen], earlier[chosen])
        chosen = chosen[order]
        found = _in_steps(exact_cosines, left, right, i[chosen], j[chosen])
        self._found.append(Pairs(later[chosen], earlier[chosen], found, overfull))
        self._count += len(chosen)
        if self._count > 4_000_000:
            self._found = [merge_pairs(self._found)]
            self._count = 0


def _candidates(
    left: Rows, right: Rows, least: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places int64 (m,) of pairs whose product is at least ``least``, and it, float32 (m,)."""
    far = least - _margin(left.units.shape[1])
    near = left.bounds @ right.bounds.T >= far
    if np.count_nonzero(near) * _MOST_CANDIDATES > near.size:
        products = left.units @ right.units.T
        i, j = np.nonzero(products >= least)
        return i, j, products[i, j]
    i, j = np.divmod(np.flatnonzero(near), len(right))
    products = _in_steps(partial(np.einsum, "ij,ij->i"), left, right, i, j)
    kept = products >= least
    return i[kept], j[kept], products[kept]


def _in_steps(
    multiply: Callable[[np.ndarray, np.ndarray], np.ndarray],
    left: Rows,
    right: Rows,
    i: np.ndarray,
    j: np.ndarray,
) -> np.ndarray:
    """float32 (m,): of pairs of rows, so many at a time as take little memory."""
    step = max(1, _EXACT_BYTES // (8 * left.units.shape[1]))
    parts = [
        multiply(left.units[i[start : start + step]], right.units[j[start : start + step]])
        for start in range(0, len(i), step)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _first_pairs(later: np.ndarray, earlier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of each ``later``'s first 16 different pairs in order, and who has more."""
    order = np.lexsort((earlier, later))
    a, b = later[order], earlier[order]
    order = order[np.append(True, (np.diff(a) != 0) | (np.diff(b) != 0))] if len(order) else order
    a = later[order]
    starts = np.searchsorted(a, a)
    place = np.arange(len(a)) - starts
    return order[place < MOST_PAIRS], np.unique(a[place >= MOST_PAIRS])


def merge_pairs(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of the ``parts``, each once and of each document only the first 16."""
    if not parts:
        none = np.empty(0, dtype=np.int64)
        return Pairs(none, none, np.empty(0, dtype=np.float32), none)
    later = np.concatenate([part.later for part in parts])
    earlier = np.concatenate([part.earlier for part in parts])
    order, overfull = _first_pairs(later, earlier)
    similarities = np.concatenate([part.similarities for part in parts])[order]
    before = [part.overfull for part in parts]
    return Pairs(
        later[order], earlier[order], similarities, np.unique(np.concatenate([*before, overfull]))
    )


def no_decisions(count: int) -> Decisions:
    """Every one of ``count`` ranks undecided."""
    return Decisions(
        np.full(count, -1, dtype=np.int64),
        np.full(count, np.nan, dtype=np.float32),
        np.ones(count, dtype=bool),
    )


def decide(pairs: Pairs, before: Decisions) -> Decisions:
    """What the undecided of ``before`` become by their ``pairs`` with what is not removed.

    A round decides at least the first of them, in practice nearly all: undecided stays one that
    has more pairs than are listed, or whose keeper depends on such a one.
    """
    keepers, similarities = before.keepers.copy(), before.similarities.copy()
    undecided = np.zeros(len(keepers), dtype=bool)
    overfull = set(pairs.overfull.tolist())
    later, starts = np.unique(pairs.later, return_index=True)
    ends = np.append(starts, len(pairs.later))[1:]
    earlier = pairs.earlier.tolist()
    for rank, start, end in zip(later.tolist(), starts.tolist(), ends.tolist(), strict=True):
        if not before.undecided[rank]:
            continue
        for place in range(start, end):
            other = earlier[place]
            if undecided[other]:
                undecided[rank] = True
                break
            if keepers[other] < 0:
                keepers[rank], similarities[rank] = other, pairs.similarities[place]
                break
        else:
            undecided[rank] = rank in overfull
    return Decisions(keepers, similarities, undecided)


def find_duplicates(vectors: np.ndarray, similarity: float) -> Decisions:
    """Decisions on ``vectors``, float32 (n, d), that stand in the order of their ranks.

    Zero vectors have no direction and are kept. All are held in memory, and compared with the first
    few that are kept before anything else, so that a crowd of much the same costs little.
    """
    units = to_units(vectors) + np.float32(0)  # -0.0 and 0.0 are the same number
    first: dict[bytes | None, int] = {}
    same_as = np.array([first.setdefault(d, i) for i, d in enumerate(digests(units))], np.int64)
    rows = np.flatnonzero((same_as == np.arange(len(units))) & units.any(axis=1))
    bounds = Shadows.of(units[rows]).bounds(units)
    every = Rows(units, bounds, np.arange(len(units)))
    early, late = rows[:_EARLY], rows[_EARLY:]
    decisions = _decide_in_cells(every, early, similarity, no_decisions(len(units)))
    kept = early[decisions.keepers[early] < 0]
    search = PairSearch(similarity)
    with one_thread_each():
        search.add_cell(every[kept], every[late])
    decisions = decide(search.pairs(), replace(decisions, undecided=_only(late, len(units))))
    late = late[decisions.keepers[late] < 0]
    decisions = _decide_in_cells(every, late, similarity, decisions)
    comparable: np.ndarray = np.asarray(units.any(axis=1))
    return repeat_decisions(decisions, same_as, comparable)


def _only(rows: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


def _decide_in_cells(
    every: Rows, rows: np.ndarray, similarity: float, before: Decisions
) -> Decisions:
    """Decide on ``rows`` by each other; rows that lie anywhere serve as the cells' centroids."""
    shadows = every.bounds[:, :-1]
    count = int(np.clip(2 * np.sqrt(len(rows)), 1, _MOST_CELLS))
    cells = Cells(shadows[rows[:count]], similarity)
    decisions = replace(before, undecided=_only(rows, len(every)))
    while decisions.undecided.any():
        home, coming, visited = cells.visits(shadows[rows])
        members = split_by(rows, home, len(cells))
        visitors = split_by(rows[coming], visited, len(cells))
        find = partial(_pairs_in_cells, every, members, visitors, similarity)
        starts = range(0, len(cells), _CELLS_AT_A_TIME)
        decisions = decide(merge_pairs(side_by_side(find, starts)), decisions)
        rows = rows[decisions.keepers[rows] < 0]
    return decisions


def _pairs_in_cells(
    every: Rows,
    members: Sequence[np.ndarray],
    visitors: Sequence[np.ndarray],
    similarity: float,
    start: int,
) -> Pairs:
    """The pairs of some cells, from the ``start``-th on."""
    search, some = PairSearch(similarity), slice(start, start + _CELLS_AT_A_TIME)
    for inside, outside in zip(members[some], visitors[some], strict=True):
        search.add_members(every[inside])
        search.add_cell(every[inside], every[outside])
    return search.pairs()


def digests(units: np.ndarray) -> list[bytes | None]:
    """16 bytes that tell each vector, float32 (n, d), from every other; None for zeros."""
    usable: list[bool] = np.any(units, axis=1).tolist()
    return [
        hashlib.blake2b(row.tobytes(), digest_size=16).digest() if there else None
        for row, there in zip(units, usable, strict=True)
    ]


def repeat_decisions(
    decisions: Decisions, same_as: np.ndarray, comparable: np.ndarray, fixed: int = 0
) -> Decisions:
    """The same with what equals an earlier one, ``same_as`` int64 (n,), decided as that is.

    Only where ``comparable``, bool (n,), and from rank ``fixed`` on.
    """
    repeats = np.flatnonzero((same_as != np.arange(len(same_as))) & comparable)
    repeats = repeats[repeats >= fixed]
    first = same_as[repeats]
    keepers, similarities = decisions.keepers.copy(), decisions.similarities.copy()
    keepers[repeats] = decisions.keepers[first]
    similarities[repeats] = decisions.similarities[first]
    kept = first < fixed if fixed else decisions.keepers[first] < 0
    keepers[repeats[kept]], similarities[repeats[kept]] = first[kept], 1
    return Decisions(keepers, similarities, np.zeros(len(keepers), dtype=bool))
