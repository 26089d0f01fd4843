"""Near-duplicates by their wording, over Ray: Jaccard similarity of the texts' shingles.

Texts are compared in lower case, with single spaces, as sets of 5-character shingles. MinHash (by
rensa) in bands finds candidates (Broder 1997; Leskovec, Rajaraman and Ullman, ch. 3); each is then
verified on the shingles themselves, so nothing is removed on an estimate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import rensa

from cluster.duplicate_search import (
    Order,
    Part,
    Search,
    SearchPlan,
    order_rows,
    owners_of,
    pair_tables,
    read_pairs,
    read_parts,
    read_ranks,
    row_table,
    write_ranks,
    write_rows,
)
from cluster.duplicates import Pairs, decide, no_decisions
from cluster.vector_files import (
    Columns,
    Piece,
    check_ids,
    check_readable,
    find_files,
    read_batches,
)
from cluster.vectors import (
    Block,
    Shard,
    VectorSource,
    group_into_shards,
    hash_ids,
    shorten_texts,
)
from pipelines.runtime.arrow import open_parquet, parquet_columns, plain_column
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import first_line, join, make_folder, open_filesystem
from pipelines.runtime.segments import read_segment, write_segments
from pipelines.runtime.units import Receipt, run_stage

SHINGLE = 5
PERMUTATIONS = 128
_MISSED_AT_MOST = 0.005
_ROWS_PER_SHARD = 100_000
_ROWS_AT_A_TIME = 4_096
_CROWD = 64
"""In a band with many alike, each is compared with so many first and so many just before it."""
_BUCKET_ROWS = 2_000_000
_WHOLE = 1 << 40
_BELOW = 0.1
"""How far below the similarity sought a verified pair is still shown."""


def open_texts(uri: str, columns: Columns) -> VectorSource:
    """Texts in Parquet files as a source whose ``embedding`` column is that of the texts.

    Raises :class:`InputError` for files that cannot be read or lack a column.
    """
    filesystem = open_filesystem(uri)[0]
    pieces: list[Piece] = []
    kinds = set()
    for place in find_files(uri):
        path = place.path
        try:
            with filesystem.open_input_file(path) as stream:
                file = open_parquet(stream)
                schema, metadata = parquet_columns(file, place.view).schema, file.metadata
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{path} is not a readable Parquet file, which --method text needs: "
                f"{first_line(error)}"
            ) from error
        for name in columns.names():
            if name not in schema.names:
                flag = "--text-column" if name == columns.embedding else columns.flag(name)
                raise InputError(
                    f"{path} has no column {name!r}; its columns are {', '.join(schema.names)}. "
                    f"Name the right one with {flag}"
                )
            check_readable(schema, name, path)
        kinds.add(check_ids(schema, columns.id, path))
        groups = range(metadata.num_row_groups)
        rows = [metadata.row_group(i).num_rows for i in groups]
        pieces += [
            Piece(path, i, count, view=place.view)
            for i, count in zip(groups, rows, strict=True)
            if count
        ]
    if not pieces:
        raise InputError(f"{uri} holds no rows: nothing to compare")
    kind = kinds.pop() if len(kinds) == 1 else "string"
    return VectorSource(uri, columns, 0, kind, group_into_shards(pieces, _ROWS_PER_SHARD))


def search_texts(
    source: VectorSource, plan: SearchPlan, work: str, *, against: VectorSource | None = None
) -> tuple[Search, Pairs]:
    """Decide on every row of ``source``, and the verified pairs a little below the similarity."""
    sources = (source,) if against is None else (source, against)
    for folder in ("shingles", "bands", "candidates", "verified"):
        make_folder(join(work, folder))
    rows = sum(each.rows for each in sources)
    bands, width = choose_bands(plan.similarity)
    buckets = max(1, rows * bands // _BUCKET_ROWS)
    read = partial(_read_shard, sources, plan, work, bands, width)
    parts = read_parts(sources, plan, work, read)
    order = order_rows(parts, work, plan, source)
    write_ranks(order, work)
    names = [part.name for part in parts]
    units = {f"bucket-{number:04d}": number for number in range(buckets)}
    find = partial(_candidates, order.fixed, work, names, buckets)
    run_stage(work, "candidates-of", units, find)
    _write_candidates(order, work, list(units))
    compare = partial(_verify, work, plan.similarity, parts, order.fixed)
    checked = {part.name: number for number, part in enumerate(parts)}
    run_stage(work, "verify", checked, compare)
    verified = _joined([read_pairs(join(work, "verified", name)) for name in checked])
    sought = verified.similarities >= np.float32(plan.similarity)
    pairs = _only(verified, sought)
    decisions = order.expand(decide(pairs, no_decisions(len(order.ranks))))
    return Search(order, decisions, pairs, None, 1), _only(verified, ~sought)


def choose_bands(similarity: float) -> tuple[int, int]:
    """(bands, rows of each): the widest that miss at most 0.5% of the pairs just so similar."""
    for width in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // width
        if (1 - similarity**width) ** bands <= _MISSED_AT_MOST:
            return bands, width
    return PERMUTATIONS, 1


def shingles(text: str) -> np.ndarray:
    """uint64 (s,): sorted hashes of the different shingles of a normal text; none for no text."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), "<u4").astype(np.uint64)
    if not len(codes):
        return codes
    codes = np.pad(codes, (0, max(0, SHINGLE - len(codes))))
    count = len(codes) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(_FACTORS):
        hashes += codes[place : place + count] * factor
    for shift in (33, 29):  # so that all bits depend on all
        hashes ^= hashes >> np.uint64(shift)
        hashes *= np.uint64(0xFF51AFD7ED558CCD)
    return np.unique(hashes ^ (hashes >> np.uint64(32)))


_FACTORS = np.random.default_rng(0).integers(1, 2**63, SHINGLE, dtype=np.uint64) * 2 + 1


def normal_text(text: str | None) -> str:
    """In lower case, with single spaces."""
    return " ".join((text or "").lower().split())


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Shared of all elements of two sorted sets, 0 to 1."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def _texts(source: VectorSource, shard: Shard) -> Iterator[Block]:
    filesystem = open_filesystem(source.uri)[0]
    columns = source.columns
    none = pa.table({"id": pa.array([], source.id_kind), "reason": pa.array([], pa.string())})
    for piece in shard.pieces:
        for batch in read_batches(filesystem, piece, columns, _ROWS_AT_A_TIME, vectors=False):
            ids = plain_column(batch.column(columns.id)).cast(source.id_kind)
            if ids.null_count:
                raise InputError(
                    f"{piece.path}: {ids.null_count} rows have a null {columns.id!r}; ids must "
                    "be set"
                )
            texts = shorten_texts(plain_column(batch.column(columns.embedding)), _WHOLE)
            kept = pa.table({name: plain_column(batch.column(name)) for name in columns.keep})
            yield Block(ids, np.empty((len(ids), 0), np.float32), texts, None, none, kept)


def _read_shard(
    sources: Sequence[VectorSource],
    plan: SearchPlan,
    work: str,
    bands: int,
    width: int,
    name: str,
    unit: list[int],
) -> Receipt:
    source = sources[unit[0]]
    rows, shingle_tables, keys = [], [], []
    for block in _texts(source, source.shards[unit[1]]):
        texts = [normal_text(text) for text in (block.texts or pa.array([])).to_pylist()]
        digests = [
            hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
            if text
            else None
            for text in texts
        ]
        rows.append(row_table(block, hash_ids(block.ids, plan.seed), digests, plan.keep))
        sets = [shingles(text) for text in texts]
        offsets = np.cumsum([0, *map(len, sets)])
        flat = np.concatenate([np.empty(0, np.uint64), *sets])
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
        for start in range(0, len(lists), _ROWS_AT_A_TIME):
            shingle_tables.append(pa.table({"shingles": lists[start : start + _ROWS_AT_A_TIME]}))
        keys.append(_band_keys(flat, offsets, bands, width))
    table = pa.table({"shingles": pa.array([], pa.large_list(pa.uint64()))})
    whole = pa.concat_tables([table, *shingle_tables])
    steps = range(0, len(whole), _ROWS_AT_A_TIME)
    write_segments(join(work, "shingles", name), [whole[s : s + _ROWS_AT_A_TIME] for s in steps])
    every = np.concatenate([np.empty((0, bands), np.uint64), *keys])
    write_segments(join(work, "bands", name), [pa.table({"key": every.ravel()})])
    return write_rows(work, name, rows, [], [])


def _band_keys(flat: np.ndarray, offsets: np.ndarray, bands: int, width: int) -> np.ndarray:
    """uint64 (n, bands): a hash of each band of each text's MinHash."""
    made = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        flat, offsets.astype(np.uint64), PERMUTATIONS, 42
    )
    signatures = np.array(made.to_rows(), dtype=np.uint64).reshape(-1, PERMUTATIONS)
    factors = np.random.default_rng(1).integers(1, 2**63, (bands, width), dtype=np.uint64) * 2 + 1
    parts = signatures[:, : bands * width].reshape(-1, bands, width)
    keys = (parts * factors).sum(axis=2, dtype=np.uint64)
    return keys ^ (keys >> np.uint64(31))


def _candidates(
    fixed: int, work: str, names: Sequence[str], buckets: int, name: str, number: int
) -> Receipt:
    """Pairs of ranks that share a band, of the bands that fall to one bucket."""
    keys, ranks = [], []
    for part in names:
        table = read_segment(join(work, "bands", part), 0)
        own = read_ranks(work, part)
        if table is None:
            continue
        every = table["key"].to_numpy()
        rows = np.repeat(own, len(every) // len(own))
        mine = (every % np.uint64(buckets) == number) & (rows >= 0)
        keys.append(every[mine])
        ranks.append(rows[mine])
    key = np.concatenate([np.empty(0, np.uint64), *keys])
    rank = np.concatenate([np.empty(0, np.int64), *ranks])
    order = np.lexsort((rank, key))
    pairs = _pairs_in_runs(key[order], rank[order], fixed)
    none = np.empty(0, np.int64)
    similarities = np.zeros(len(pairs), np.float32)
    candidates = Pairs(pairs[:, 0], pairs[:, 1], similarities, none)
    write_segments(join(work, "candidates", name), pair_tables(candidates))
    return {"pairs": len(pairs)}


def _pairs_in_runs(keys: np.ndarray, ranks: np.ndarray, fixed: int) -> np.ndarray:
    """int64 (m, 2), (later, earlier) for rows of one key, which stand together by rank."""
    starts = np.searchsorted(keys, keys)
    place = np.arange(len(keys)) - starts
    none = np.empty((0, 2), dtype=np.int64)
    neighbours = [none]
    for step in range(min(_CROWD, int(place.max(initial=0)) + 1)):
        first = np.flatnonzero(place > step)
        neighbours.append(np.stack([ranks[first], ranks[starts[first] + step]], axis=1))
        before = np.flatnonzero(place > step + _CROWD)
        neighbours.append(np.stack([ranks[before], ranks[before - step - 1]], axis=1))
    pairs = np.concatenate(neighbours)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if fixed:
        pairs = pairs[(pairs[:, 0] >= fixed) & (pairs[:, 1] < fixed)]
    return np.unique(pairs, axis=0) if len(pairs) else none


def _write_candidates(order: Order, work: str, names: Sequence[str]) -> None:
    """Give the candidates, each once, to the shard of the later one."""
    parts = [read_pairs(join(work, "candidates", name)) for name in names]
    later = np.concatenate([pairs.later for pairs in parts])
    earlier = np.concatenate([pairs.earlier for pairs in parts])
    both = np.unique(np.stack([later, earlier], axis=1), axis=0)
    positions = order.positions()
    part_of = owners_of(order.parts, positions[both[:, 0]])
    for number, part in enumerate(order.parts):
        own = both[part_of == number]
        table = pa.table(
            {
                "later": own[:, 0],
                "earlier": own[:, 1],
                "row": positions[own[:, 0]] - part.start,
                "other": positions[own[:, 1]],
            }
        )
        write_segments(join(work, "candidates", part.name), [table])


def _verify(
    work: str, similarity: float, parts: Sequence[Part], fixed: int, name: str, number: int
) -> Receipt:
    """The exact similarity of a shard's candidates; those that are alike are written."""
    table = read_segment(join(work, "candidates", name), 0)
    scores = np.empty(0, dtype=np.float32)
    none = np.empty(0, dtype=np.int64)
    later = earlier = none
    if table is not None:
        later, earlier = table["later"].to_numpy(), table["earlier"].to_numpy()
        rows, others = table["row"].to_numpy(), table["other"].to_numpy()
        part_of = owners_of(parts, others)
        scores = np.empty(len(later), dtype=np.float32)
        read = lru_cache(maxsize=8)(partial(_shingle_sets, work))
        for i in np.lexsort((others, rows // _ROWS_AT_A_TIME)).tolist():
            other = parts[part_of[i]]
            place = int(others[i]) - other.start
            left = read(name, int(rows[i]) // _ROWS_AT_A_TIME)[int(rows[i]) % _ROWS_AT_A_TIME]
            right = read(other.name, place // _ROWS_AT_A_TIME)[place % _ROWS_AT_A_TIME]
            scores[i] = jaccard(left, right)
    kept = scores >= np.float32(similarity - _BELOW)
    similar = Pairs(later[kept], earlier[kept], scores[kept], none)
    write_segments(join(work, "verified", name), pair_tables(similar))
    return {"candidates": len(scores), "pairs": int((scores >= np.float32(similarity)).sum())}


def _shingle_sets(work: str, name: str, segment: int) -> list[np.ndarray]:
    table = read_segment(join(work, "shingles", name), segment)
    if table is None:
        return []
    lists = table["shingles"].combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy()
    return [values[a:b] for a, b in pairwise(offsets.tolist())]


def _joined(parts: Sequence[Pairs]) -> Pairs:
    later = np.concatenate([part.later for part in parts])
    earlier = np.concatenate([part.earlier for part in parts])
    similarities = np.concatenate([part.similarities for part in parts])
    order = np.lexsort((earlier, later))
    none = np.empty(0, dtype=np.int64)
    return Pairs(later[order], earlier[order], similarities[order], none)


def _only(pairs: Pairs, mask: np.ndarray) -> Pairs:
    return Pairs(pairs.later[mask], pairs.earlier[mask], pairs.similarities[mask], pairs.overfull)
