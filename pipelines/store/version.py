"""One sealed version, for readers: its documents and everything that belongs to them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, read_bytes
from pipelines.store.columns import EMBEDDING
from pipelines.store.documents import Documents, FragmentRef
from pipelines.store.index import find_words, fuse, in_order
from pipelines.store.records import VersionRecord, documents_address

_HYBRID_DEPTH = 100
"""Documents of each ranking that are joined."""


class Version:
    """A sealed version. Readers need no lease; it stays as it is until it is pruned."""

    def __init__(
        self, store: str, record: VersionRecord, documents: Documents | None = None
    ) -> None:
        self.store = store
        self.record = record
        if documents is not None:
            self.documents = documents

    @functools.cached_property
    def documents(self) -> Documents:
        """Its documents, opened when first asked for: a record alone says much."""
        return Documents.open(documents_address(self.store), self.record.lance_version)

    @property
    def number(self) -> int:
        """Its number."""
        return self.record.version

    @property
    def schema(self) -> pa.Schema:
        """Schema of its documents."""
        return self.documents.schema

    def count(self, filter: str | None = None) -> int:
        """How many documents it has, or satisfy ``filter`` (SQL, such as ``cluster_id = 3``)."""
        return self.documents.count(filter)

    def fragments(self) -> list[FragmentRef]:
        """Its parts, for workers."""
        return self.documents.fragments()

    def batches(
        self, columns: Sequence[str] | None = None, *, filter: str | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Its documents as a stream."""
        return self.documents.batches(columns, filter)

    def take(self, ids: Sequence[Any], columns: Sequence[str] | None = None) -> pa.Table:
        """The documents of these ids that it has, in no particular order."""
        return self.documents.take(ids, columns)

    def artifacts(self) -> list[str]:
        """Names of its artifacts."""
        return sorted(self.record.artifacts)

    def read(self, name: str) -> bytes:
        """An artifact; ``KeyError`` where it has none of that name."""
        return read_bytes(self.path(name))

    def read_json(self, name: str) -> Any:
        """An artifact's content, of JSON."""
        return json.loads(self.read(name))

    def read_table(self, name: str) -> pa.Table:
        """An artifact's content, of Parquet."""
        return pq.read_table(pa.BufferReader(self.read(name)))

    def path(self, name: str) -> str:
        """Address of an artifact, to be opened by whoever."""
        return join(self.store, self.record.artifacts[name].path)

    def load(self) -> None:
        """Bring the vector index into memory, so that the first search is as quick as the next."""
        self.documents.prewarm()

    def search(
        self,
        vector: np.ndarray,
        limit: int,
        *,
        filter: str | None = None,
        columns: Sequence[str] | None = None,
        exact: bool = False,
    ) -> pa.Table:
        """The nearest documents by cosine, best first.

        Args:
            vector: float32 (d,), of the version's own encoder; its length does not matter.
            limit: how many.
            filter: condition in SQL that they must satisfy; it never makes them fewer.
            columns: what to return of them, by default all but the embedding.
            exact: compare with every vector instead of using the index.

        Returns:
            ``score``, the cosine from -1 to 1, then the columns.

        Raises :class:`InputError` for a vector of another length and for a faulty filter.
        """
        dimension = self.schema.field(EMBEDDING).type.list_size
        if vector.shape != (dimension,):
            raise InputError(
                f"the query's vector has shape {vector.shape}; the version's vectors have "
                f"{dimension} numbers"
            )
        names = [n for n in self.schema.names if n != EMBEDDING] if columns is None else columns
        effort = {} if exact else self._effort(filter)
        hits = self.documents.nearest(vector, limit, names, filter=filter, **effort)
        scores = pa.array(1 - hits["_distance"].to_numpy(), pa.float32())
        return hits.drop_columns("_distance").add_column(0, "score", scores)

    def _effort(self, filter: str | None) -> dict[str, int]:
        """How much of the index is searched: nothing where all vectors are compared.

        With a filter as many more partitions as it leaves fewer documents in each; Lance of its own
        accord ends with those that gave enough hits, be there nearer ones elsewhere.
        """
        index = self.record.index
        if index is None or index["kind"] == "exact":
            return {}
        probes, most = int(index["probes"]), int(index["partitions"])
        if filter is not None:
            share = self.documents.count(filter) / max(1, self.documents.count())
            probes = min(most, math.ceil(probes / share)) if share else most
        return {"probes": probes, "refine": int(index["refine"])}

    def search_hybrid(
        self, vector: np.ndarray, words: str, limit: int, *, filter: str | None = None
    ) -> pa.Table:
        """The documents that are near or have the words, best of both first.

        ``score`` is the sum of reciprocal ranks (:func:`pipelines.store.index.fuse`), then
        come all columns but the embedding. Arguments are those of :meth:`search`; raises
        :class:`InputError` as that does, and where the version has no index of words.
        """
        depth = max(_HYBRID_DEPTH, 2 * limit)
        worded = find_words(self.documents, words, depth, filter=filter)
        near = self.search(vector, depth, filter=filter, columns=["id"])["id"].to_pylist()
        best = fuse([near, worded], limit)
        ids = [row_id for row_id, _ in best]
        names = [name for name in self.schema.names if name != EMBEDDING]
        scores = pa.array([score for _, score in best], pa.float32())
        return in_order(self.take(ids, names), ids).add_column(0, "score", scores)
