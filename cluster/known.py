"""A finished clustering, for new vectors: centroids, and how far each cluster reaches.

From the output folder of ``cluster_corpus.py``; a store's version is read where stores are known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.noise import DenseRegions
from cluster.vectors import VectorSource, read_centroids
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    exists,
    join,
    list_files,
    open_filesystem,
    read_bytes,
    read_table,
)
from pipelines.runtime.run_record import require_complete

ASSIGNMENTS = r"part-\d{5,}\.parquet"
ENCODER_FILE = "encoder.json"
_KEY_BITS = 14
_KEYS = 1 << 18


class Reach:
    """Quantiles of the distances in each of k clusters, from any number of them in any order.

    Distances are counted in bins of a fixed share of their size, 2**-9 or 0.2%: a bin is the upper
    bits of a float32.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._codes = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)

    def add(self, places: np.ndarray, distances: np.ndarray) -> None:
        """Count documents at ``distances``, float (n,), in the clusters ``places``, int (n,)."""
        codes, counts = np.unique(
            places.astype(np.int64) * _KEYS + _keys_of(distances), return_counts=True
        )
        merged, inverse = np.unique(np.concatenate([self._codes, codes]), return_inverse=True)
        totals = np.zeros(len(merged), dtype=np.int64)
        np.add.at(totals, inverse, np.concatenate([self._counts, counts]))
        self._codes, self._counts = merged, totals

    def limits(self, quantile: float) -> np.ndarray:
        """float32 (k,): at least the share ``quantile`` of a cluster's documents lies below.

        The upper edge of the quantile's bin; 0 for a cluster without documents.
        """
        places = self._codes // _KEYS
        ends = np.searchsorted(places, np.arange(self._k + 1))
        edges = np.zeros(self._k, dtype=np.uint32)
        for place, (start, stop) in enumerate(pairwise(ends)):
            if start < stop:
                reached = np.cumsum(self._counts[start:stop])
                rank = max(1, int(np.ceil(quantile * reached[-1] - 1e-9)))
                key = self._codes[start + np.searchsorted(reached, rank)] % _KEYS
                edges[place] = (key + 1) << _KEY_BITS
        return edges.view(np.float32)


def _keys_of(distances: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(distances, dtype=np.float32).view(np.uint32)
    return (bits >> _KEY_BITS).astype(np.int64)


@dataclass(frozen=True)
class KnownClusters:
    """Clusters that new vectors are given to."""

    address: str
    centroids: np.ndarray
    """float32 (k, d)."""
    ids: np.ndarray
    """int32 (k,), the id of each; a cluster that people merged has several centroids."""
    limits: np.ndarray
    """float32 (k,): a document at this distance or farther from its centroid is novel."""
    unit_norm: bool
    """Whether vectors are scaled to length 1 (``--metric cosine``)."""
    fingerprint: str | None
    """The encoder's, where it is known."""
    encoder: Mapping[str, Any] | None = None
    """The encoder's description, where there is one."""
    regions: DenseRegions | None = None
    """What is not noise, where the clustering sought that."""
    seed: int = 0
    """The clustering's, with which it hashed ids."""

    def digest(self) -> str:
        """SHA-256 of what decides a document's cluster and whether it is novel."""
        deciding = hashlib.sha256(repr(self.unit_norm).encode())
        for array in (self.centroids, self.ids, self.limits):
            deciding.update(np.ascontiguousarray(array).tobytes())
        if self.regions is not None:
            deciding.update(repr(self.regions.limit).encode() + self.regions.sample.tobytes())
        return deciding.hexdigest()

    def check(self, source: VectorSource, encoder: Mapping[str, Any] | None) -> None:
        """Raise :class:`InputError` for vectors of another encoder or dimension.

        ``encoder`` describes that of ``source``, where it is known; the error names what differs.
        """
        if None not in (self.fingerprint, source.fingerprint) and (
            self.fingerprint != source.fingerprint
        ):
            raise InputError(
                f"{source.uri} was embedded by another encoder than the vectors of "
                f"{self.address}: {self._difference(source, encoder)}. Embed the documents with "
                "the encoder of the clusters"
            )
        if source.dimension != self.centroids.shape[1]:
            raise InputError(
                f"{source.uri} holds vectors of {source.dimension} numbers, {self.address} "
                f"centroids of {self.centroids.shape[1]}"
            )

    def _difference(self, source: VectorSource, encoder: Mapping[str, Any] | None) -> str:
        if self.encoder is not None and encoder is not None:
            for name in sorted(self.encoder.keys() | encoder.keys()):
                here, there = encoder.get(name), self.encoder.get(name)
                if here != there and name != "fingerprint":
                    return f"its {name} is {here!r}, there it is {there!r}"
        return f"its fingerprint is {source.fingerprint}, there it is {self.fingerprint}"


def read_clustering(folder: str, quantile: float) -> KnownClusters:
    """The clusters in an output folder of ``cluster_corpus.py``.

    A cluster reaches as far as the ``quantile`` of the distances of its own documents. Raises
    :class:`InputError` for a folder that is no finished clustering.
    """
    run = require_complete(folder)
    if run.get("job") != "cluster_corpus":
        raise InputError(
            f"{folder} holds a run of {run.get('job')!r}; required is the output of "
            "'cluster_corpus', or a store"
        )
    centroids, fingerprint = read_centroids(join(folder, "centroids.parquet"))
    settings = run.get("config", {})
    ids = np.arange(len(centroids), dtype=np.int32)
    before = run.get("inputs", {}).get("embeddings", {})
    encoder = describe_encoder_of(folder) or describe_encoder_of(settings.get("embeddings", ""))
    return KnownClusters(
        folder,
        centroids,
        ids,
        reach_of(read_assignments(folder, "cluster_id", "distance"), ids).limits(quantile),
        settings.get("metric") == "cosine",
        fingerprint or before.get("encoder_fingerprint"),
        encoder,
        _read_regions(join(folder, "noise.parquet")),
        int(settings.get("seed", 0)),
    )


def _read_regions(address: str) -> DenseRegions | None:
    if not exists(address):
        return None
    return DenseRegions.from_table(read_table(address))


def describe_encoder_of(folder: str) -> dict[str, Any] | None:
    """The content of a folder's ``encoder.json``, where there is one."""
    path = join(folder, ENCODER_FILE)
    return json.loads(read_bytes(path)) if folder and exists(path) else None


def reach_of(assigned: Iterable[Sequence[pa.Array]], ids: np.ndarray) -> Reach:
    """How far clusters ``ids``, rising int (k,), reach, from ids and distances of documents."""
    reach = Reach(len(ids))
    for cluster_ids, distances in ([array.to_numpy() for array in pair] for pair in assigned):
        places = np.minimum(np.searchsorted(ids, cluster_ids), len(ids) - 1)
        known = ids[places] == cluster_ids
        reach.add(places[known], distances[known])
    return reach


def read_assignments(folder: str, *columns: str) -> Iterator[list[pa.Array]]:
    """Columns of a clustering's ``assignments/``, a batch of rows at a time."""
    assignments = join(folder, "assignments")
    for name in list_files(assignments):
        if re.fullmatch(ASSIGNMENTS, name):
            filesystem, path = open_filesystem(join(assignments, name))
            with filesystem.open_input_file(path) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(columns=list(columns)):
                    yield [batch.column(column) for column in columns]
