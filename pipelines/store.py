"""The versioned store of documents: the only module of this package that knows Lance.

``STORE/documents.lance`` holds the documents of every version, ``STORE/versions/N/`` what else
belongs to version N (``encoder.json``, ``centroids.parquet``, ``lineage.parquet``,
``scores.json``, ``report.html``, ``run.json``, …), and its ``version.json``, written last, makes
it one whole. A *candidate* is built from a version under a lease, sealed under the next number,
and published by moving the one tag ``published``: readers see the old whole or the new one.

A night, in outline::

    store = Store.open_or_create(uri)
    with store.take_lease("nightly_reindex") as lease:
        base = store.published()                      # None on the first night
        candidate = store.begin(lease)                # cleans what a crashed night left
        candidate.upsert(paths, schema=…, when=now)   # or candidate.replace(…) for all documents
        candidate.delete(ids)
        refs = candidate.fragments()                  # picklable; workers read them
        candidate.set_assignments([assign_fragment(ref, assign) for ref in refs])
        candidate.put("scores.json", …)
        candidate.update_index()
        version = candidate.seal(counts=…, scores=…, reasons=[…])
        store.publish(version.number, lease, expected=base.number)

Columns of a document: ``id`` (string or int64), ``text`` (string), the kept columns,
``text_sha256`` (string), ``embedding`` fixed_size_list<float | halffloat>[d], ``cluster_id``
(int32), ``distance`` (float), ``first_seen`` and ``last_changed`` (timestamp[us, UTC]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.storing.lease import Lease

Assign = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""float32 (n, d) → cluster ids int32 (n,), distances float32 (n,)."""
Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Maps a picklable function over items; ``map`` here, Ray tasks in a night."""


def document_schema(
    id_type: pa.DataType,
    kept: Mapping[str, pa.DataType],
    dimension: int,
    value_type: pa.DataType,
    fingerprint: str,
) -> pa.Schema:
    """The schema of the store's documents; ``fingerprint`` of the encoder goes to its metadata.

    ``kept`` are the kept columns and their types, without ``text``, which is always there.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class FragmentRef:
    """A part of one version's documents, small enough for one worker; picklable."""

    uri: str
    lance_version: int
    fragment: int
    rows: int


def read_fragment(
    ref: FragmentRef, columns: Sequence[str], *, filter: str | None = None, batch_rows: int = 8192
) -> Iterator[pa.RecordBatch]:
    """The rows of a fragment in order; only the named columns are read.

    Keys for a comparison: ``columns=["id", "text_sha256"]``. In a candidate whose assignments are
    not yet set, ``cluster_id`` and ``distance`` are those of the document in the version before,
    null for a document that is new.
    """
    raise NotImplementedError


def assign_fragment(ref: FragmentRef, assign: Assign) -> AssignedFragment:
    """Worker's part of :meth:`Candidate.set_assignments`: writes two columns, no vector.

    ``assign`` gets float32 (n, d) and returns cluster ids int32 (n,), distances float32 (n,).
    """
    raise NotImplementedError


@dataclass(frozen=True)
class AssignedFragment:
    """What a worker wrote and the driver will commit; picklable."""

    fragment: int
    content: str
    rows: int


@dataclass(frozen=True)
class IndexReport:
    """The vector index of a version; goes into its record."""

    kind: str
    """``exact`` where there are too few vectors for an index, else the index's type."""
    rows: int
    partitions: int
    recall_at_10: float
    """Against exact search, of a sample of the documents' own vectors."""
    recall_queries: int
    trained: bool
    """Whether it was trained anew, rather than updated by what changed."""
    seconds: float


class Version:
    """One sealed version: its documents and everything that belongs to it. Readers need no lease.

    ``record`` is the content of its ``version.json``: ``version, base, created_at, fingerprint,
    counts, scores, reasons, index, artifacts, lance_version``.
    """

    store: Store
    number: int
    record: Mapping[str, Any]

    @property
    def schema(self) -> pa.Schema:
        """Schema of its documents."""
        raise NotImplementedError

    def count(self, filter: str | None = None) -> int:
        """How many documents it has, or satisfy ``filter`` (SQL, such as ``cluster_id = 3``)."""
        raise NotImplementedError

    def fragments(self) -> list[FragmentRef]:
        """Its parts, for workers."""
        raise NotImplementedError

    def batches(
        self, columns: Sequence[str] | None = None, *, filter: str | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Its documents as a stream."""
        raise NotImplementedError

    def take(self, ids: Sequence[Any], columns: Sequence[str] | None = None) -> pa.Table:
        """The documents of these ids that it has, in no particular order."""
        raise NotImplementedError

    def artifacts(self) -> list[str]:
        """Names of its artifacts."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """An artifact; ``KeyError`` where it has none of that name."""
        raise NotImplementedError

    def path(self, name: str) -> str:
        """Address of an artifact, to be opened by whoever."""
        raise NotImplementedError

    def search(
        self,
        vector: np.ndarray,
        limit: int,
        *,
        filter: str | None = None,
        columns: Sequence[str] | None = None,
        exact: bool = False,
    ) -> pa.Table:
        """The nearest documents by cosine, best first, with a column ``score`` (1 is the same)."""
        raise NotImplementedError


class Candidate:
    """A version in the making. Nothing of it is visible until :meth:`seal`.

    Every method checks the lease first and raises :class:`LeaseLostError` (exit code 75) when
    another holder has it, and ``StaleWriterError`` when another writer has committed between.
    """

    number: int
    """The number it will have."""
    base: Version | None

    def upsert(
        self, sources: Iterable[str | pa.RecordBatch], *, schema: pa.Schema, when: datetime
    ) -> dict[str, int]:
        """Insert new documents and replace changed ones; returns ``{"inserted", "updated"}``.

        Args:
            sources: Parquet files (addresses) or batches, each with ``id``, ``text``,
                ``text_sha256``, ``embedding`` and kept columns; read as a stream.
            schema: from :func:`document_schema`; its fingerprint must be the version's.
            when: becomes ``last_changed``, and ``first_seen`` of new documents. A replaced
                document keeps ``first_seen`` and, until assignments are set, its cluster.

        Raises :class:`InputError` for another fingerprint, dimension or id type than the version's.
        """
        raise NotImplementedError

    def replace(
        self, paths: Sequence[str], *, schema: pa.Schema, when: datetime, run: Run = map
    ) -> int:
        """Make the documents of these Parquet files all that the version has: first night, new encoder.

        Each file is written by one call under ``run`` (workers write, the driver commits).
        ``first_seen`` and, until assignments are set, ``cluster_id`` of documents that the base
        has are kept, and ``last_changed`` where the text is the same. Returns the documents.
        """
        raise NotImplementedError

    def update_columns(self, table: pa.Table) -> int:
        """Change kept columns of existing documents: ``id`` and the columns; no vector is written."""
        raise NotImplementedError

    def delete(self, ids: Iterable[pa.Array | pa.RecordBatch]) -> int:
        """Delete documents by id (arrays of ids, or batches with a column ``id``); the number."""
        raise NotImplementedError

    def count(self, filter: str | None = None) -> int:
        """How many documents it has by now."""
        raise NotImplementedError

    def fragments(self) -> list[FragmentRef]:
        """Its parts as they are by now; stale after the next change."""
        raise NotImplementedError

    def set_assignments(self, assigned: Iterable[AssignedFragment]) -> None:
        """Commit what :func:`assign_fragment` wrote for every one of :meth:`fragments`."""
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> None:
        """Add an artifact, such as ``scores.json`` or ``plots/a.png``."""
        raise NotImplementedError

    def put_table(self, name: str, table: pa.Table) -> None:
        """Add an artifact as Parquet."""
        raise NotImplementedError

    def put_file(self, name: str, path: str) -> None:
        """Add a file as an artifact."""
        raise NotImplementedError

    def keep(self, name: str) -> None:
        """Take an artifact of the base as it is, without copying it."""
        raise NotImplementedError

    def folder(self) -> str:
        """Address of its artifacts' folder, ``STORE/versions/N``."""
        raise NotImplementedError

    def update_index(self, *, recall_queries: int = 200, seed: int = 0) -> IndexReport:
        """Bring the vector index up to date with what changed; measure its recall@10.

        It is trained anew only when there is none, when the data has doubled since, or when the
        recall is under 0.95. Call it after all documents and assignments are written.
        """
        raise NotImplementedError

    def seal(
        self,
        *,
        counts: Mapping[str, int],
        scores: Mapping[str, Any],
        reasons: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> Version:
        """Make it a version; readers who ask for its number see it, those of ``published`` not yet.

        Args:
            counts: goes into the record, as ``list`` shows it; ``documents`` is added.
            scores: content of ``scores.json`` or part of it, likewise.
            reasons: why it must not be published; empty where nothing speaks against it.
            details: anything else for the record (JSON), such as the checks' figures.
        """
        raise NotImplementedError

    def abandon(self) -> None:
        """Undo it: what it wrote is removed now instead of by the next night."""
        raise NotImplementedError


class Store:
    """A folder, local or ``s3://``, of versions."""

    uri: str

    @classmethod
    def open(cls, uri: str) -> Store:
        """An existing store; :class:`InputError` where there is none."""
        raise NotImplementedError

    @classmethod
    def open_or_create(cls, uri: str) -> Store:
        """An existing store or a new, empty one; :class:`InputError` where other files lie."""
        raise NotImplementedError

    def work_folder(self) -> str:
        """``STORE/_work``: a night's unfinished work, such as embeddings to be resumed."""
        raise NotImplementedError

    def take_lease(self, job: str, *, ttl_seconds: float = 120.0) -> Lease:
        """The right to write, as a context manager that renews it in the background.

        Raises :class:`LeaseHeldError` (exit code 75) that names the holder. A lease whose holder
        died on this machine is taken over at once, one of another machine after ``ttl_seconds``.
        """
        raise NotImplementedError

    def published(self) -> Version | None:
        """The version that the tag names; None before the first publication."""
        raise NotImplementedError

    def version(self, number: int | None = None) -> Version:
        """A sealed version, by default the published; :class:`InputError` where there is none."""
        raise NotImplementedError

    def versions(self) -> list[Version]:
        """All sealed versions, published or not, by number."""
        raise NotImplementedError

    def begin(self, lease: Lease, *, base: int | None = None) -> Candidate:
        """A candidate with the documents of version ``base``, by default the published (or none).

        Cleans up first: what a crashed night left is undone, sealed versions stay.
        """
        raise NotImplementedError

    def publish(self, number: int, lease: Lease, *, expected: int | None | str = "any") -> None:
        """Move the tag to version ``number``.

        With ``expected`` (a number, or None for none) it refuses, as :class:`StaleWriterError`,
        when another version is published by now.
        """
        raise NotImplementedError

    def rollback(self, lease: Lease) -> Version:
        """Move the tag back to the version published before; :class:`InputError` if none is left."""
        raise NotImplementedError

    def publications(self) -> list[dict[str, Any]]:
        """What was published when: ``{"version", "previous", "action", "at", "holder"}``."""
        raise NotImplementedError

    def prune(self, lease: Lease, keep: int) -> list[int]:
        """Remove all versions but the newest ``keep``, the published and tagged ones; the removed."""
        raise NotImplementedError

    def clean(self, lease: Lease) -> None:
        """Remove what belongs to no sealed version: leftovers of crashed nights."""
        raise NotImplementedError

    def verify(self) -> list[str]:
        """Check every invariant of every version; the problems found, none if it is sound."""
        raise NotImplementedError
