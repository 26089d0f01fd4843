"""Near-duplicates among all vectors of a corpus, over Ray, however many.

``place`` writes vectors by groups of neighbouring cells; ``pairs`` compares within each group,
which holds its own vectors in memory and streams those that visit it from other cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.assign import NearestCentroids, one_thread_each, split_by
from cluster.duplicate_search import (
    REMOVED,
    UNDECIDED,
    Checked,
    Order,
    Part,
    Search,
    SearchPlan,
    decide_in_rounds,
    order_rows,
    pair_tables,
    read_pairs,
    read_parts,
    read_ranks,
    row_table,
    vector_table,
    write_ranks,
    write_rows,
)
from cluster.duplicates import (
    Cells,
    Pairs,
    PairSearch,
    Rows,
    Shadows,
    digests,
    exact_cosines,
    merge_pairs,
    to_units,
)
from cluster.kmeans import FitOptions, count_distinct, fit_in_memory
from cluster.sample import SamplePlan
from cluster.vectors import BLOCK_BYTES, VectorSource, hash_ids, read_blocks
from pipelines.runtime.arrow import column_to_vectors
from pipelines.runtime.files import exists, join, make_folder, read_bytes, write_bytes
from pipelines.runtime.segments import bytes_to_table, read_segment, table_to_bytes, write_segments
from pipelines.runtime.units import Receipt, run_stage

MOST_CELLS = 8_192
_FITTED_ON_PER_CELL = 32
_GROUP_BYTES = 64 << 20
_AXES = "axes.arrow"


def search_vectors(
    source: VectorSource, plan: SearchPlan, work: str, *, against: VectorSource | None = None
) -> Search:
    """Decide on every row of ``source``; stages that are done in the folder ``work`` stay done."""
    sources = (source,) if against is None else (source, against)
    parts = read_parts(sources, plan, work, partial(_read_shard, sources, plan, work))
    table, centroids = _cells(parts, source, plan, work)
    keys = None
    if plan.keep == "central":
        keys = _central_keys(sources, parts, centroids, work)
    order = order_rows(parts, work, plan, source, keys)
    sample = _sample_to_check(parts, order, plan, work, source.dimension)
    write_ranks(order, work)
    units = {part.name: [part.source, part.shard] for part in parts}
    place = partial(_place_shard, sources, plan.similarity, order.fixed, work)
    placed = run_stage(work, "place", units, place)
    checked = _merge_checked(sample, order, work, list(placed))
    groups = int(pc.max(table["group"]).as_py()) + 1
    files = [f"{name}-{i:03d}" for name, told in placed.items() for i in range(told["files"])]
    find = partial(_pairs_of_group, plan.similarity, order.fixed, work, files)
    first, decisions, rounds = decide_in_rounds(order, groups, find, work)
    return Search(order, order.expand(decisions), first, checked, rounds, len(centroids))


def _read_shard(
    sources: Sequence[VectorSource], plan: SearchPlan, work: str, name: str, unit: list[int]
) -> Receipt:
    source = sources[unit[0]]
    if plan.keep != "longest":
        source = replace(source, columns=replace(source.columns, text=None))
    with_key = not unit[0] and plan.keep not in ("first", "central", "hash")
    wanted = _sample_rows(source.rows)
    limit = SamplePlan(source.rows, wanted, 0, plan.seed).limit(wanted)
    rows, drawn, rejected = [], [], []
    for block in read_blocks(source, source.shards[unit[1]], with_text=with_key):
        units = to_units(block.vectors) + np.float32(0)  # -0.0 and 0.0 are the same number
        hashes = hash_ids(block.ids, plan.seed)
        rows.append(row_table(block, hashes, digests(units), plan.keep))
        rejected.append(block.rejected)
        if unit[0] == 0:
            near = np.flatnonzero((hashes <= limit) & units.any(axis=1))
            drawn.append(vector_table(units[near], hash=hashes[near]))
    return write_rows(work, name, rows, [*drawn], rejected)


def _sample_rows(rows: int) -> int:
    return max(20_000, _FITTED_ON_PER_CELL * _num_cells(rows))


def _num_cells(rows: int) -> int:
    return int(min(MOST_CELLS, max(1, 2 * np.sqrt(rows))))


def _cells(
    parts: Sequence[Part], source: VectorSource, plan: SearchPlan, work: str
) -> tuple[pa.Table, np.ndarray]:
    """The centroids of all cells with the group of each, fitted once."""
    path = join(work, "cells.arrow")
    if not exists(path):
        sample = _drawn(parts, work, source.dimension)
        vectors = column_to_vectors(sample["vector"])[: _sample_rows(source.rows)]
        k = min(_num_cells(source.rows), max(1, count_distinct(vectors) // 8))
        if k == 1:
            centroids = np.zeros((1, source.dimension), dtype=np.float32)
        else:
            options = FitOptions(seed=plan.seed, max_iterations=8, two_level=k >= 512)
            centroids = fit_in_memory(vectors, k, options).centroids
        room = max(1, _GROUP_BYTES // (4 * source.dimension))
        groups = _neighbouring(centroids, max(1, -(-source.rows // room)))
        axes = Shadows.of(vectors).axes
        write_bytes(join(work, _AXES), table_to_bytes(vector_table(axes.T)))
        write_bytes(path, table_to_bytes(vector_table(centroids, group=groups)))
    table = bytes_to_table(read_bytes(path))
    return table, column_to_vectors(table["vector"])


def _shadows(work: str) -> Shadows:
    table = bytes_to_table(read_bytes(join(work, _AXES)))
    return Shadows(np.ascontiguousarray(column_to_vectors(table["vector"]).T))


def _drawn(parts: Sequence[Part], work: str, dimension: int) -> pa.Table:
    tables = [read_segment(join(work, "rows", part.name), 1) for part in parts if not part.source]
    empty = vector_table(np.empty((0, dimension), np.float32), hash=np.empty(0, np.uint64))
    return pa.concat_tables([empty, *(t for t in tables if t is not None)]).sort_by("hash")


def _neighbouring(centroids: np.ndarray, count: int) -> np.ndarray:
    """int32 (k,): ``count`` groups of cells that lie near each other and are about as many.

    Halves, again and again, along the coordinate in which a part's centroids differ most.
    """
    groups = np.zeros(len(centroids), dtype=np.int32)
    count = min(count, len(centroids))
    parts = [(np.arange(len(centroids)), count)]
    ready = []
    while parts:
        members, wanted = parts.pop()
        if wanted == 1:
            ready.append(members)
            continue
        widest = int(centroids[members].var(axis=0).argmax())
        members = members[np.argsort(centroids[members, widest], kind="stable")]
        cut = len(members) * (wanted // 2) // wanted
        parts += [(members[:cut], wanted // 2), (members[cut:], wanted - wanted // 2)]
    for number, members in enumerate(ready):
        groups[members] = number
    return groups


def _central_keys(
    sources: Sequence[VectorSource], parts: Sequence[Part], centroids: np.ndarray, work: str
) -> np.ndarray:
    """float64 (n,): minus the distance of each row to its nearest centroid."""
    make_folder(join(work, "keys"))
    units = {part.name: [part.source, part.shard] for part in parts}
    run_stage(work, "central", units, partial(_central_shard, sources, centroids, work))
    tables = [bytes_to_table(read_bytes(join(work, "keys", part.name))) for part in parts]
    return np.concatenate([table["key"].to_numpy() for table in tables])


def _central_shard(
    sources: Sequence[VectorSource], centroids: np.ndarray, work: str, name: str, unit: list[int]
) -> Receipt:
    source = sources[unit[0]]
    nearest = NearestCentroids(centroids)
    keys = [
        -nearest.assign(to_units(block.vectors)).distances
        for block in read_blocks(source, source.shards[unit[1]], with_text=False)
    ]
    table = pa.table({"key": np.concatenate(keys) if keys else np.empty(0)})
    write_bytes(join(work, "keys", name), table_to_bytes(table), create_folder=False)
    return {"rows": len(table)}


def _sample_to_check(
    parts: Sequence[Part], order: Order, plan: SearchPlan, work: str, dimension: int
) -> np.ndarray:
    """Ranks of the sample that is compared with all; its vectors are written for the workers."""
    own = sum(part.rows for part in parts if not part.source)
    wanted = plan.checked or int(np.clip(1e8 / max(own, 1), 256, 4_096))
    sample = _drawn(parts, work, dimension)[:wanted]
    own_parts = [part for part in parts if not part.source]
    tables = [read_segment(join(work, "rows", part.name), 0) for part in own_parts]
    every = np.concatenate([t["hash"].to_numpy() for t in tables if t is not None])
    by_hash = np.argsort(every, kind="stable")
    positions = by_hash[np.searchsorted(every[by_hash], sample["hash"].to_numpy())]
    ranks = order.ranks[positions]
    table = vector_table(column_to_vectors(sample["vector"]), rank=ranks)
    write_bytes(join(work, "sample.arrow"), table_to_bytes(table))
    return ranks


def _place_shard(
    sources: Sequence[VectorSource],
    similarity: float,
    fixed: int,
    work: str,
    name: str,
    unit: list[int],
) -> Receipt:
    """Write a shard's vectors to the groups of cells that they lie in or visit."""
    table = bytes_to_table(read_bytes(join(work, "cells.arrow")))
    groups = table["group"].to_numpy()
    shadows = _shadows(work)
    cells = Cells(shadows.cast(column_to_vectors(table["vector"])), similarity)
    sample = bytes_to_table(read_bytes(join(work, "sample.arrow")))
    check = _SampleCheck(
        sample["rank"].to_numpy(), column_to_vectors(sample["vector"]), similarity, fixed
    )
    count = visits = 0
    for ranks, units in _ranked_blocks(sources[unit[0]], unit[1], read_ranks(work, name)):
        tables, seen = _by_group(ranks, units, cells.visits(shadows.cast(units)), groups)
        write_segments(join(work, "placed", f"{name}-{count:03d}"), tables, compression=None)
        check.add(ranks, units)
        count, visits = count + 1, visits + seen
    write_segments(join(work, "placed", f"{name}.checked"), check.tables())
    return {"files": count, "visits": visits}


def _ranked_blocks(
    source: VectorSource, shard: int, ranks: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ranks and unit vectors of the rows that are compared, about 32 MiB at a time."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    start = held = 0
    for block in read_blocks(source, source.shards[shard], with_text=False):
        own = ranks[start : start + len(block.vectors)]
        start += len(own)
        kept = np.flatnonzero(own >= 0)
        if not len(kept):
            continue
        waiting.append((own[kept], to_units(block.vectors[kept]) + np.float32(0)))
        held += waiting[-1][1].nbytes
        if held >= BLOCK_BYTES:
            yield np.concatenate([r for r, _ in waiting]), np.concatenate([u for _, u in waiting])
            waiting, held = [], 0
    if waiting:
        yield np.concatenate([r for r, _ in waiting]), np.concatenate([u for _, u in waiting])


def _by_group(
    ranks: np.ndarray,
    units: np.ndarray,
    visits_of: tuple[np.ndarray, np.ndarray, np.ndarray],
    groups: np.ndarray,
) -> tuple[list[pa.Table | None], int]:
    """Three tables a group: its own vectors, the visiting ones, and which cells they visit."""
    home, rows, visited = visits_of
    count = int(groups.max()) + 1
    members = split_by(np.arange(len(units)), groups[home], count)
    visits = split_by(np.arange(len(rows)), groups[visited], count)
    tables: list[pa.Table | None] = []
    for own, coming in zip(members, visits, strict=True):
        there, places = np.unique(rows[coming], return_inverse=True)
        tables += [
            vector_table(units[own], rank=ranks[own], cell=home[own]) if len(own) else None,
            vector_table(units[there], rank=ranks[there]) if len(there) else None,
            pa.table({"row": places, "cell": visited[coming]}) if len(there) else None,
        ]
    return tables, len(rows)


class _SampleCheck:
    """Compares the sample with every row that passes."""

    def __init__(self, ranks: np.ndarray, units: np.ndarray, similarity: float, fixed: int) -> None:
        self._ranks, self._units, self._similarity = ranks, units, np.float32(similarity)
        self._fixed = fixed
        self._nearest = np.full(len(ranks), -1, dtype=np.int64)
        self._best = np.full(len(ranks), -1, dtype=np.float32)
        self._found: list[Pairs] = []

    def add(self, ranks: np.ndarray, units: np.ndarray) -> None:
        margin = np.float32(1e-6 * np.sqrt(units.shape[1]))
        for start in range(0, len(units), 4_096):
            block, own = units[start : start + 4_096], ranks[start : start + 4_096]
            products = self._units @ block.T
            earlier = own[None, :] < self._ranks[:, None]
            if self._fixed:
                earlier &= own[None, :] < self._fixed
            products[~earlier] = -1
            place = products.argmax(axis=1)
            found = products[np.arange(len(place)), place]
            better = found > self._best
            self._best[better], self._nearest[better] = found[better], own[place[better]]
            i, j = np.nonzero(products >= self._similarity - margin)
            cosines = exact_cosines(self._units[i], block[j])
            kept = cosines >= self._similarity
            none = np.empty(0, np.int64)
            self._found.append(Pairs(self._ranks[i[kept]], own[j[kept]], cosines[kept], none))
            if sum(len(part.later) for part in self._found) > 1_000_000:
                self._found = [merge_pairs(self._found)]

    def tables(self) -> list[pa.Table | None]:
        best = pa.table({"nearest": self._nearest, "similarity": self._best})
        return [best, *pair_tables(merge_pairs(self._found))]


def _merge_checked(ranks: np.ndarray, order: Order, work: str, names: Sequence[str]) -> Checked:
    nearest = np.full(len(ranks), -1, dtype=np.int64)
    best = np.full(len(ranks), -1, dtype=np.float32)
    pairs = []
    for name in names:
        path = join(work, "placed", f"{name}.checked")
        table = read_segment(path, 0)
        pairs.append(read_pairs(path, 1))
        if table is None:
            continue
        found, other = table["similarity"].to_numpy(), table["nearest"].to_numpy()
        better = (found > best) | ((found == best) & (other < nearest))
        best[better], nearest[better] = found[better], other[better]
    repeats = order.same_as[ranks] != ranks
    if order.fixed:
        repeats &= order.same_as[ranks] < order.fixed
    best[repeats], nearest[repeats] = 1, order.same_as[ranks[repeats]]
    return Checked(ranks, nearest, np.minimum(best, 1), merge_pairs(pairs))


def _pairs_of_group(
    similarity: float,
    fixed: int,
    work: str,
    files: Sequence[str],
    number: int,
    states: str,
    name: str,
    group: int,
) -> Receipt:
    """Compare a group's vectors with each other and with all that visit it."""
    state = np.frombuffer(read_bytes(states), dtype=np.uint8) if states else None
    search = PairSearch(similarity, fixed)
    own = [_left(read_segment(join(work, "placed", f), 3 * group), state) for f in files]
    filled = [table for table in own if table is not None and len(table)]
    if filled:
        members = pa.concat_tables(filled)
        shadows, cells = _shadows(work), members["cell"].to_numpy()
        every = _rows(members, shadows)
        held = {int(c): every[np.flatnonzero(cells == c)] for c in np.unique(cells)}
        del members, every, filled, own
        with one_thread_each():
            for inside in held.values():
                search.add_members(inside)
            for file in files:
                path = join(work, "placed", file)
                _compare_visitors(search, held, path, group, state, shadows)
    pairs = search.pairs()
    if state is not None:
        open_ones = state[pairs.later] == UNDECIDED
        pairs = replace(
            pairs,
            later=pairs.later[open_ones],
            earlier=pairs.earlier[open_ones],
            similarities=pairs.similarities[open_ones],
        )
    write_segments(join(work, f"found-{number}", name), pair_tables(pairs))
    return {"pairs": len(pairs.later)}


def _compare_visitors(
    search: PairSearch,
    held: Mapping[int, Rows],
    path: str,
    group: int,
    state: np.ndarray | None,
    shadows: Shadows,
) -> None:
    table, visits = read_segment(path, 3 * group + 1), read_segment(path, 3 * group + 2)
    if table is None or visits is None:
        return
    every = _rows(table, shadows)
    rows, cells = visits["row"].to_numpy(), visits["cell"].to_numpy()
    order = np.argsort(cells, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(cells[order])) + 1):
        inside = held.get(int(cells[part[0]]))
        coming = rows[part]
        if state is not None:
            coming = coming[state[every.ranks[coming]] != REMOVED]
        if inside is not None and len(coming):
            search.add_cell(inside, every[coming])


def _rows(table: pa.Table, shadows: Shadows) -> Rows:
    units = column_to_vectors(table["vector"])
    return Rows(units, shadows.bounds(units), table["rank"].to_numpy())


def _left(table: pa.Table | None, state: np.ndarray | None) -> pa.Table | None:
    """The rows that are not removed."""
    if table is None or state is None:
        return table
    return table.filter(pa.array(state[table["rank"].to_numpy()] != REMOVED))
