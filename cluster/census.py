"""What all documents of a clustering add up to, and the few that are kept of each cluster.

The census of one shard is small, and those of all shards merge to the same whole in any order:
sums are of integers, and the documents kept are chosen by distance and hash of id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from cluster.assign import Assignment, NearestCentroids, assign_by_group
from cluster.distances import fixed_point_bits
from cluster.document_map import MapPlaces, map_table, table_writer
from cluster.noise import DenseRegions, NoiseFinder, mark_noise
from cluster.roll_up import DOCUMENT
from cluster.vectors import Block, Shard, VectorSource, hash_ids, read_blocks, shorten_texts

TEXT_CHARACTERS = 600


@dataclass(frozen=True)
class CensusPlan:
    """What to count, the same for every shard."""

    levels: tuple[int, ...]
    """Numbers of clusters, ascending; sizes, labels and documents are of the last, the finest."""
    kept: int
    """Nearest and farthest documents kept of each cluster."""
    count: int
    """Documents at most."""
    largest_distance: float
    """No distance is longer."""
    noise: bool = False
    """Whether documents that are noise are counted apart."""

    @property
    def k(self) -> int:
        """Clusters of the finest level."""
        return self.levels[-1]

    def of_level(self, k: int) -> CensusPlan:
        """The plan of one level alone."""
        return replace(self, levels=(k,), noise=False)

    @property
    def distance_bits(self) -> int:
        """Digits after the point of distances summed as integers."""
        return fixed_point_bits(self.count, self.largest_distance)

    @property
    def square_bits(self) -> int:
        """Digits after the point of squared distances summed as integers."""
        return fixed_point_bits(self.count, self.largest_distance**2)


@dataclass
class Census:
    """Counts of all documents, by cluster of the finest level."""

    plan: CensusPlan
    sizes: np.ndarray
    """int64 (k,)."""
    distance_sums: np.ndarray
    """int64 (k,), distances to the centroid as integers of the plan's scale."""
    square_sums: np.ndarray
    """int64 (k,), squared distances likewise."""
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """label -> int64 (k,), its documents in each cluster."""
    shared: dict[int, np.ndarray] = field(default_factory=dict)
    """clusters of a coarser level -> int64 (coarse, next finer), documents in both."""
    nearest: pa.Table | None = None
    """The documents nearest to each centroid: cluster_id, distance, order, id, text, label."""
    farthest: pa.Table | None = None
    """Those farthest from it."""
    coarser: dict[int, Census] = field(default_factory=dict)
    """clusters of a coarser level -> the census by its clusters."""
    noise: Census | None = None
    """The noise, as if it were one cluster; it is counted nowhere else. None where not sought."""

    @property
    def documents(self) -> int:
        """All of them, noise too."""
        return int(self.sizes.sum()) + (0 if self.noise is None else int(self.noise.sizes[0]))

    @property
    def inertia(self) -> float:
        """Sum of squared distances to the nearest centroid."""
        return float(np.ldexp(float(sum(self.square_sums.tolist())), -self.plan.square_bits))

    def mean_distances(self) -> np.ndarray:
        """float64 (k,), NaN for empty clusters."""
        sums = np.ldexp(self.distance_sums.astype(np.float64), -self.plan.distance_bits)
        return np.divide(sums, self.sizes, out=np.full(len(sums), np.nan), where=self.sizes > 0)

    def distance_deviations(self) -> np.ndarray:
        """float64 (k,), standard deviation of the distances; NaN for empty clusters."""
        sums = np.ldexp(self.square_sums.astype(np.float64), -self.plan.square_bits)
        squares = np.divide(sums, self.sizes, out=np.full(len(sums), np.nan), where=self.sizes > 0)
        return np.sqrt(np.maximum(squares - self.mean_distances() ** 2, 0))

    def joined(self, places: np.ndarray) -> Census:
        """The same of one level, with clusters at the same place of ``places``, int (k,), as one.

        Documents nearest and farthest are those of all that became one.
        """
        k = int(places.max()) + 1

        def add(counts: np.ndarray) -> np.ndarray:
            sums = np.zeros(k, np.int64)
            np.add.at(sums, places, counts)
            return sums

        def at_places(documents: pa.Table | None) -> pa.Table | None:
            if documents is None:
                return None
            column = documents.schema.get_field_index("cluster_id")
            found = pa.array(places[documents["cluster_id"].to_numpy()])
            return documents.set_column(column, "cluster_id", found)

        return replace(
            self,
            plan=self.plan.of_level(k),
            sizes=add(self.sizes),
            distance_sums=add(self.distance_sums),
            square_sums=add(self.square_sums),
            labels={label: add(counts) for label, counts in self.labels.items()},
            nearest=at_places(self.nearest),
            farthest=at_places(self.farthest),
        )

    def to_tables(self) -> dict[str, pa.Table]:
        """The same as Arrow tables, to travel between workers and driver."""
        tables = {
            "clusters": pa.table([self.sizes, self.distance_sums, self.square_sums], list("nds")),
            "labels": _to_long({label: counts[None] for label, counts in self.labels.items()}),
            "shared": _to_long(self.shared),
        }
        ends = {"nearest": self.nearest, "farthest": self.farthest}
        tables |= {name: table for name, table in ends.items() if table is not None}
        for k, census in self.coarser.items():
            tables |= {f"{k}/{name}": table for name, table in census.to_tables().items()}
        if self.noise is not None:
            tables |= {f"{_NOISE}/{name}": t for name, t in self.noise.to_tables().items()}
        return tables


def census_from_tables(tables: Mapping[str, pa.Table], plan: CensusPlan) -> Census:
    """The census that :meth:`Census.to_tables` took apart."""
    sizes, distances, squares = (column.to_numpy() for column in tables["clusters"].columns)
    labels = _from_long(tables["labels"], {})
    shared = _from_long(tables["shared"], empty_census(plan).shared)

    def part(name: str, k: int) -> Census:
        start = f"{name}/"
        own = {n.removeprefix(start): table for n, table in tables.items() if n.startswith(start)}
        return census_from_tables(own, plan.of_level(k))

    coarser = {k: part(str(k), k) for k in plan.levels[:-1]}
    return Census(
        plan,
        sizes,
        distances,
        squares,
        {label: counts[0] for label, counts in labels.items()},
        shared,
        tables.get("nearest"),
        tables.get("farthest"),
        coarser,
        part(_NOISE, 1) if plan.noise else None,
    )


def empty_census(plan: CensusPlan) -> Census:
    """A census of nobody."""
    shared = {
        coarse: np.zeros((coarse, fine), dtype=np.int64) for coarse, fine in pairwise(plan.levels)
    }
    sizes, distances, squares = np.zeros((3, plan.k), dtype=np.int64)
    coarser = {k: empty_census(plan.of_level(k)) for k in plan.levels[:-1]}
    noise = empty_census(plan.of_level(1)) if plan.noise else None
    return Census(plan, sizes, distances, squares, shared=shared, coarser=coarser, noise=noise)


def count_block(
    block: Block,
    orders: np.ndarray,
    assignments: Mapping[int, Assignment],
    plan: CensusPlan,
    rows: np.ndarray | None = None,
) -> Census:
    """The census of one block; ``assignments`` maps each level to where its rows belong there.

    Only ``rows``, int (m,), where given, are counted.
    """
    census = empty_census(plan)
    rows = np.arange(len(orders)) if rows is None else rows
    ids = assignments[plan.k].cluster_ids[rows]
    distances = assignments[plan.k].distances[rows]
    census.sizes = np.bincount(ids, minlength=plan.k)
    np.add.at(census.distance_sums, ids, _to_fixed(distances, plan.distance_bits))
    np.add.at(census.square_sums, ids, _to_fixed(distances**2, plan.square_bits))
    for coarse, fine in pairwise(plan.levels):
        pair = (assignments[coarse].cluster_ids[rows], assignments[fine].cluster_ids[rows])
        np.add.at(census.shared[coarse], pair, 1)
    for k in plan.levels[:-1]:
        census.coarser[k] = count_block(block, orders, assignments, plan.of_level(k), rows)
    if block.labels is not None:
        encoded = block.labels.take(pa.array(rows)).dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy()
        names = encoded.dictionary.to_pylist()
        there = codes >= 0
        pairs = codes[there].astype(np.int64) * plan.k + ids[there]
        counts = np.bincount(pairs, minlength=len(names) * plan.k).reshape(-1, plan.k)
        census.labels = dict(zip(names, counts, strict=True))
    counted = pa.table(
        {"cluster_id": ids, "distance": distances, "order": orders[rows], "row": rows}
    )
    census.nearest = _with_texts(_first_of_each(counted, plan.kept, 1.0), block)
    census.farthest = _with_texts(_first_of_each(counted, plan.kept, -1.0), block)
    return census


def count_apart(
    block: Block,
    orders: np.ndarray,
    assignments: Mapping[int, Assignment],
    plan: CensusPlan,
    noise: np.ndarray,
) -> Census:
    """The census of one block whose ``noise``, bool (n,), is counted apart."""
    if not plan.noise:
        return count_block(block, orders, assignments, plan)
    census = count_block(block, orders, assignments, plan, np.flatnonzero(~noise))
    finest = assignments[plan.k]
    together = {1: replace(finest, cluster_ids=np.zeros_like(finest.cluster_ids))}
    rows = np.flatnonzero(noise)
    census.noise = count_block(block, orders, together, plan.of_level(1), rows)
    return census


def merge_censuses(censuses: Iterable[Census]) -> Census:
    """The census of everyone counted in ``censuses``, which have one plan."""
    parts = list(censuses)
    plan = parts[0].plan
    labels: dict[str, np.ndarray] = {}
    for part in parts:
        for label, counts in part.labels.items():
            labels[label] = labels.get(label, 0) + counts
    return Census(
        plan,
        np.sum([part.sizes for part in parts], axis=0),
        np.sum([part.distance_sums for part in parts], axis=0),
        np.sum([part.square_sums for part in parts], axis=0),
        dict(sorted(labels.items())),
        {k: np.sum([part.shared[k] for part in parts], axis=0) for k in plan.levels[:-1]},
        _merge_ends([part.nearest for part in parts], plan.kept, 1.0),
        _merge_ends([part.farthest for part in parts], plan.kept, -1.0),
        {k: merge_censuses([part.coarser[k] for part in parts]) for k in plan.levels[:-1]},
        merge_censuses([part.noise for part in parts if part.noise]) if plan.noise else None,
    )


def _to_fixed(values: np.ndarray, bits: int) -> np.ndarray:
    return np.ldexp(values, bits).astype(np.int64)


def _with_texts(chosen: pa.Table, block: Block) -> pa.Table:
    rows = chosen.column("row").combine_chunks()
    table = chosen.drop_columns("row").append_column("id", block.ids.take(rows))
    for name, values in (("text", block.texts), ("label", block.labels)):
        if values is not None:
            short = shorten_texts(values.take(rows), TEXT_CHARACTERS)
            table = table.append_column(name, short)
    return table


def _merge_ends(tables: Sequence[pa.Table | None], kept: int, sign: float) -> pa.Table | None:
    filled = [table for table in tables if table is not None]
    return _first_of_each(pa.concat_tables(filled), kept, sign) if filled else None


def _first_of_each(documents: pa.Table, kept: int, sign: float) -> pa.Table:
    """The ``kept`` documents of each cluster with the smallest (or, with -1, largest) distance."""
    clusters = documents.column("cluster_id").to_numpy()
    distances = documents.column("distance").to_numpy() * sign
    order = np.lexsort((documents.column("order").to_numpy(), distances, clusters))
    clusters = clusters[order]
    starts = np.searchsorted(clusters, clusters, side="left")
    return documents.take(pa.array(order[np.arange(len(order)) - starts < kept]))


def _to_long(counts: Mapping[str, np.ndarray] | Mapping[int, np.ndarray]) -> pa.Table:
    """Named int64 (a, b) arrays as one table of their numbers."""
    return pa.table(
        {
            "name": pa.array([str(name) for name in counts], pa.string()),
            "rows": pa.array([len(array) for array in counts.values()], pa.int64()),
            "counts": pa.array(
                [array.ravel() for array in counts.values()], pa.large_list(pa.int64())
            ),
        }
    )


def _from_long(table: pa.Table, start: dict) -> dict:
    """The arrays that :func:`_to_long` wrote; names become those of ``start`` where it has any."""
    names = {str(name): name for name in start}
    found = dict(start)
    for name, rows, counts in zip(*(column for column in table.columns), strict=True):
        array = counts.values.to_numpy().reshape(rows.as_py(), -1)
        found[names.get(name.as_py(), name.as_py())] = array
    return found


_MERGED_AT_A_TIME = 8
_NOISE = "noise"


@dataclass(frozen=True)
class AssignPlan:
    """How documents are assigned and placed on the map, the same for every shard."""

    centroids: Mapping[int, np.ndarray]
    """Number of clusters -> float32 (k, d)."""
    groups: Mapping[int, np.ndarray]
    """Each number but the largest -> int32 (largest,), where the clusters of the largest lie."""
    census: CensusPlan
    sample: np.ndarray
    """float32 (m, d), the documents that were laid out."""
    points: np.ndarray
    """float32 (m, 2), where."""
    seed: int
    regions: DenseRegions | None = None
    """What is not noise; None where all are clustered."""

    def digest(self) -> str:
        """Names what is decided by it."""
        limit = None if self.regions is None else self.regions.limit
        deciding = hashlib.sha256(repr((self.census, self.seed, limit)).encode())
        for array in (*self.centroids.values(), *self.groups.values(), self.sample, self.points):
            deciding.update(np.ascontiguousarray(array).tobytes())
        return deciding.hexdigest()[:16]

    def assign(self, index: NearestCentroids, vectors: np.ndarray) -> dict[int, Assignment]:
        """Where ``vectors``, float32 (n, d), lie in each level; ``index`` is that of the finest."""
        finest = index.assign(vectors)
        coarser = {
            k: assign_by_group(vectors, self.centroids[k], group, finest)
            for k, group in self.groups.items()
        }
        return {**coarser, self.census.k: finest}


def assign_shard(
    source: VectorSource, shard: Shard, plan: AssignPlan, path: str, map_path: str
) -> Census:
    """Assign the documents of one shard, write them to ``path``, and count them.

    ``cluster_id``, distance, second cluster and margin are those of the finest level; of several,
    each has a ``cluster_id_K``. Noise has -1 for all of them, its nearest cluster as the second,
    and no margin. Passages have their ``document_id``. The documents' places on the map go to
    ``map_path``.
    """
    finder = NoiseFinder(plan.regions)
    index = NearestCentroids(plan.centroids[plan.census.k])
    places = MapPlaces(plan.sample, plan.points)
    censuses = [empty_census(plan.census)]
    with table_writer(path) as write, table_writer(map_path) as write_map:
        for block in read_blocks(source, shard):
            assignments = plan.assign(index, block.vectors)
            orders = hash_ids(block.ids, plan.seed)
            noise = finder.find(block.vectors, orders)
            write(_to_table(block, assignments, plan.census.k, noise))
            cluster_ids = mark_noise(assignments[plan.census.k].cluster_ids, noise)
            write_map(map_table(block.ids, places.place(block.vectors), cluster_ids, block.kept))
            censuses.append(count_apart(block, orders, assignments, plan.census, noise))
            if len(censuses) == _MERGED_AT_A_TIME:
                censuses = [merge_censuses(censuses)]
    return merge_censuses(censuses)


def _to_table(
    block: Block, assignments: Mapping[int, Assignment], finest: int, noise: np.ndarray
) -> pa.Table:
    assignment = assignments[finest]
    second = np.where(noise, assignment.cluster_ids, assignment.second_cluster_ids)
    columns = {
        "id": block.ids,
        **({} if block.documents is None else {DOCUMENT: block.documents}),
        "cluster_id": mark_noise(assignment.cluster_ids, noise),
        "distance": assignment.distances.astype(np.float32),
        "second_cluster_id": second,
        "margin": np.where(noise, np.nan, assignment.margins).astype(np.float32),
    }
    if len(assignments) > 1:
        levels = sorted(assignments)
        columns |= {
            f"cluster_id_{k}": mark_noise(assignments[k].cluster_ids, noise) for k in levels
        }
    return pa.table(columns)
