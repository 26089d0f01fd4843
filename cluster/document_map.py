"""Documents on a plane: a sample is laid out, and everyone else placed by neighbours in it.

``map.parquet`` has ``id``, ``x``, ``y``, ``cluster_id`` and kept columns of all documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import ThreadpoolController

from cluster.assign import NearestCentroids
from cluster.distances import squared_distances_to
from pipelines.runtime.files import atomic_output, open_filesystem

MAP_FILE = "map.parquet"
_NEIGHBOURS_FROM = 20
"""Documents below which neighbourhoods mean little and a linear map is used."""
_PERPLEXITY = 30
_ITERATIONS = 400


@dataclass(frozen=True)
class MapLayout:
    """Where each document lies on the map, and how that came about."""

    points: np.ndarray
    """float32 (n, 2)."""
    method: str
    """'t-SNE' or 'PCA'."""
    note: str
    """For people: what distances on the map mean, and why this method."""


def lay_out(vectors: np.ndarray, seed: int, *, linear: bool = False) -> MapLayout:
    """Place ``vectors``, float32 (n, d), on a plane by t-SNE (van der Maaten and Hinton 2008).

    Fewer than 20 of them, of fewer than 3 numbers or all alike are placed by PCA. ``linear`` asks
    for that: quick, and nearly the same map for nearly the same vectors.
    """
    why = ""
    if not linear and len(vectors) < _NEIGHBOURS_FROM:
        why = f", as there are fewer than {_NEIGHBOURS_FROM} documents"
    elif not linear and vectors.shape[1] > 2 and np.ptp(vectors, axis=0).any():
        note = "t-SNE: near means similar, far says little."
        return MapLayout(_tsne(vectors, seed), "t-SNE", note)
    points, shown = _pca(vectors)
    note = f"PCA{why}: two directions that hold {shown:.0%} of the variance."
    return MapLayout(points, "PCA", note)


def _tsne(vectors: np.ndarray, seed: int) -> np.ndarray:
    """float32 (n, 2). On 3,000 texts neighbours are kept as well as by UMAP in a quarter of the
    CPU time, and nothing is compiled first (``python benchmarks/kmeans.py --only layout``).
    """
    from sklearn.manifold import TSNE  # slow to load

    reducer = TSNE(
        perplexity=min(_PERPLEXITY, (len(vectors) - 1) / 3), max_iter=_ITERATIONS, random_state=seed
    )
    # sums of several threads come out in another order each time
    with ThreadpoolController().limit(limits=1):
        return np.asarray(reducer.fit_transform(vectors), dtype=np.float32)


def _pca(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """(points, share of variance shown); one-dimensional input lies on a line."""
    count = min(2, *vectors.shape)
    if count == 0 or not np.ptp(vectors, axis=0).any():
        return np.zeros((len(vectors), 2), dtype=np.float32), 0.0
    from sklearn.decomposition import PCA  # slow to load, and workers do without

    reducer = PCA(count, svd_solver="full" if min(vectors.shape) < 500 else "covariance_eigh")
    points = np.zeros((len(vectors), 2), dtype=np.float32)
    points[:, :count] = reducer.fit_transform(vectors)
    return points, float(reducer.explained_variance_ratio_.sum())


_NEIGHBOURS = 4


class MapPlaces:
    """Where any document lies on the map of a sample: among its nearest in the sample.

    Its place is the mean of theirs, weighted by 1 / distance⁴, so that a document of the sample
    lies where it was laid out. A document's place depends on nothing but its vector and the sample.
    """

    def __init__(self, sample: np.ndarray, points: np.ndarray) -> None:
        """``sample``, float32 (n, d), lies at ``points``, float32 (n, 2)."""
        self._nearest = NearestCentroids(sample, count=_NEIGHBOURS)
        self._points = points.astype(np.float64)

    def place(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (n, 2), of ``vectors``, float32 (n, d)."""
        ids = self._nearest.nearest(vectors)
        total, sums = np.zeros(len(vectors)), np.zeros((len(vectors), 2))
        nearest = None
        for rank in range(ids.shape[1]):
            squared = squared_distances_to(vectors, self._nearest.centroids, ids[:, rank])
            nearest = np.maximum(squared, np.finfo(np.float32).tiny) if nearest is None else nearest
            # Relative to the nearest, so that no weight leaves the range of a float.
            weights = (nearest / np.maximum(squared, nearest)) ** 2
            sums += weights[:, None] * self._points[ids[:, rank]]
            total += weights
        return (sums / total[:, None]).astype(np.float32)


def map_table(
    ids: pa.Array, points: np.ndarray, cluster_ids: np.ndarray, kept: pa.Table | None
) -> pa.Table:
    """Rows of ``map.parquet``."""
    table = pa.table({"id": ids, "x": points[:, 0], "y": points[:, 1], "cluster_id": cluster_ids})
    if kept is None:
        return table
    for name in kept.column_names:
        table = table.append_column(name, kept.column(name))
    return table


def join_maps(parts: Sequence[str], path: str) -> None:
    """Write the Parquet files ``parts``, in their order, as the one file ``path``."""
    with table_writer(path) as write:
        for part in parts:
            filesystem, inner = open_filesystem(part)
            with filesystem.open_input_file(inner) as source:
                file = pq.ParquetFile(source)
                for group in range(file.num_row_groups):
                    write(file.read_row_group(group))


_GRID = 96
_BATCH_BYTES = 32 << 20
_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Density:
    """How many of all documents lie in each square of a grid over the map."""

    counts: np.ndarray
    """int64 (rows, columns), at most 96 of each, from the bottom left."""
    left: float
    bottom: float
    side: float
    """Of a square, in units of the map."""

    @classmethod
    def over(cls, points: np.ndarray) -> Density:
        """An empty grid over ``points``, float32 (m, 2), m > 0: those that were laid out.

        All other documents lie between them, as :class:`MapPlaces` has it.
        """
        low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
        side = float((high - low).max()) / _GRID or 1.0
        columns, rows = np.clip(np.ceil((high - low) / side), 1, _GRID).astype(int)
        return cls(np.zeros((rows, columns), dtype=np.int64), float(low[0]), float(low[1]), side)

    def add(self, points: np.ndarray) -> None:
        """Count ``points``, float32 (n, 2); the sum does not depend on how they are divided."""
        start = np.array([self.left, self.bottom])
        last = np.array(self.counts.shape)[::-1] - 1
        columns, rows = np.clip(((points - start) / self.side).astype(np.int64), 0, last).T
        np.add.at(self.counts, (rows, columns), 1)


def map_batches(path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """``map.parquet`` in its order, about 32 MiB at a time: fewer rows where texts are kept."""
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_file(inner) as source:
        file = pq.ParquetFile(source)
        groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
        size = sum(group.total_byte_size for group in groups)
        rows = min(_BATCH_ROWS, _BATCH_BYTES * file.metadata.num_rows // max(1, size) + 1)
        yield from file.iter_batches(rows, columns=list(columns))


def measure_density(path: str, points: np.ndarray) -> Density:
    """Where the documents of ``map.parquet`` lie; ``points``, float32 (m, 2), were laid out."""
    density = Density.over(points)
    for batch in map_batches(path, ("x", "y")):
        density.add(np.column_stack([batch.column(name).to_numpy() for name in ("x", "y")]))
    return density


@contextlib.contextmanager
def table_writer(path: str) -> Iterator[Callable[[pa.Table], None]]:
    """Writes tables as one Parquet file of the first one's schema; nothing where none comes."""
    writer: pq.ParquetWriter | None = None

    def write(table: pa.Table) -> None:
        nonlocal writer
        writer = writer or pq.ParquetWriter(stream, table.schema)
        # Files of several writers may hold a kept column in several widths.
        writer.write_table(table.cast(writer.schema))

    with atomic_output(path) as stream:
        yield write
        if writer is not None:
            writer.close()
