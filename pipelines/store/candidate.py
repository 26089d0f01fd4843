"""A version in the making, visible to nobody before it is sealed."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runtime.arrow import fingerprint_of
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, remove_files, remove_folder
from pipelines.runtime.tables import PUBLISHED
from pipelines.store.columns import (
    RowMaker,
    in_portions,
    read_sources,
    require_same,
)
from pipelines.store.documents import AssignedFragment, Documents, FragmentRef, write_documents
from pipelines.store.index import IndexReport, has_text_index, index_text, update_index
from pipelines.store.lease import Lease
from pipelines.store.records import (
    FILE_NAME,
    VERSION_TAG,
    VERSIONS_FOLDER,
    Artifact,
    VersionRecord,
    documents_address,
    list_version_files,
    put_artifact,
    read_record,
    sealed_numbers,
    version_folder,
    write_record,
)
from pipelines.store.version import Version

Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Maps a picklable function over items; ``map`` here, Ray tasks in a night."""


class Candidate:
    """A version in the making. Nothing of it is visible until :meth:`seal`.

    Every change checks the lease first and raises ``LeaseLostError`` (exit code 75) when another
    holder has it, and ``StaleWriterError`` when another writer has committed meanwhile.
    """

    def __init__(
        self,
        store: str,
        lease: Lease,
        base: Version | None,
        documents: Documents | None,
        number: int,
    ) -> None:
        self.number = number
        """The number it will have."""
        self.base = base
        """The version it is built from; None where there is none."""
        self._store = store
        self._lease = lease
        self._documents = documents
        self._artifacts: dict[str, Artifact] = {}
        self._index: IndexReport | None = None

    @property
    def documents(self) -> Documents:
        """Its documents as they are by now; an error where there are none yet."""
        if self._documents is None:
            raise InputError(
                f"{join(self._store, str(self.number))}: the candidate has no documents yet"
            )
        return self._documents

    @property
    def schema(self) -> pa.Schema:
        """Schema of its documents."""
        return self.documents.schema

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
        self._lease.check()
        if self._documents is None:
            self._documents = Documents.create(documents_address(self._store), schema)
        documents = self._documents
        require_same(documents.schema, schema)
        maker = RowMaker(documents.schema, when, keep_unchanged=False)
        rows = (maker.rows(b, documents.lookup(b.column("id"))) for b in read_sources(sources))
        inserted = updated = 0
        for portion in in_portions(rows):
            self._lease.check()
            new, known = documents.merge(portion)
            inserted, updated = inserted + new, updated + known
        return {"inserted": inserted, "updated": updated}

    def replace(
        self,
        paths: Sequence[str],
        *,
        schema: pa.Schema,
        when: datetime,
        run: Run = map,
    ) -> int:
        """Make the documents of Parquet files all that there are: first night, new encoder.

        Each file is written by one call under ``run`` (workers write, the driver commits).
        ``first_seen`` and, until assignments are set, ``cluster_id`` of documents that the base
        has are kept, and ``last_changed`` where the text is the same and so, under one encoder, is
        the vector. Ids must be unique in all files together. Returns the number of documents.
        """
        self._lease.check()
        maker = RowMaker(schema, when, keep_unchanged=True)
        known = None if self.base is None else self.base.documents.lance_version
        write = functools.partial(write_documents, documents_address(self._store), known, maker)
        written = list(run(write, list(paths)))
        self._lease.check()
        self._documents = Documents.create(documents_address(self._store), schema, written)
        return sum(file.rows for file in written)

    def update_columns(self, table: pa.Table) -> int:
        """Change columns of existing documents: ``id`` and the columns; no vector is written."""
        self._lease.check()
        documents = self.documents
        columns = [table[n].cast(documents.schema.field(n).type) for n in table.column_names]
        return documents.update(pa.table(columns, names=table.column_names))

    def delete(self, ids: Iterable[pa.Array | pa.RecordBatch]) -> int:
        """Delete documents by id (arrays of ids, or batches with a column ``id``); the number."""
        documents = self.documents
        kind = documents.schema.field("id").type
        columns = (b.column("id") if isinstance(b, pa.RecordBatch) else b for b in ids)
        tables = (pa.table({"id": column.cast(kind)}) for column in columns)
        deleted = 0
        for portion in in_portions(tables):
            self._lease.check()
            deleted += documents.delete(portion)
        return deleted

    def count(self, filter: str | None = None) -> int:
        """How many documents it has by now."""
        return 0 if self._documents is None else self._documents.count(filter)

    def fragments(self) -> list[FragmentRef]:
        """Its parts as they are by now; stale after the next change."""
        return self.documents.fragments()

    def take(self, ids: Sequence[Any], columns: Sequence[str] | None = None) -> pa.Table:
        """The documents of these ids that it has, in no particular order."""
        return self.documents.take(ids, columns)

    def set_assignments(self, assigned: Iterable[AssignedFragment]) -> None:
        """Commit what :func:`assign_fragment` wrote for every one of :meth:`fragments`."""
        self._lease.check()
        documents = self.documents
        parts = sorted(assigned, key=lambda part: part.fragment)
        expected = {ref.fragment: ref.rows for ref in documents.fragments()}
        if {part.fragment: part.rows for part in parts} != expected:
            raise ValueError(
                f"{len(parts)} fragments with {sum(p.rows for p in parts)} rows are assigned, "
                f"there are {len(expected)} with {sum(expected.values())}"
            )
        if parts:
            documents.set_assignments(parts)

    def put(self, name: str, data: bytes) -> None:
        """Add an artifact, such as ``plots/a.png``; one that equals the base's is not written."""
        self._lease.check()
        earlier = None if self.base is None else self.base.record.artifacts.get(name)
        if earlier is not None and earlier.sha256 == hashlib.sha256(data).hexdigest():
            self._artifacts[name] = earlier
            return
        self._artifacts[name] = put_artifact(self._store, self.number, name, data)

    def put_table(self, name: str, table: pa.Table) -> None:
        """Add an artifact as Parquet."""
        sink = io.BytesIO()
        pq.write_table(table, sink)
        self.put(name, sink.getvalue())

    def update_index(
        self, *, recall_queries: int = 200, seed: int = 0, full_text: bool = False
    ) -> IndexReport:
        """Bring the vector index up to date with what changed; measure its recall@10.

        So it does with the index of words where the base has one, also where all documents were
        written anew, or where ``full_text`` asks for one.

        It is trained anew only when there is none, when the documents have doubled since, or when
        the recall is under 0.95. Call it after all documents and assignments are written.
        """
        self._lease.check()
        documents = self.documents
        documents.compact()
        documents.index_ids()
        had_words = self.base is not None and has_text_index(self.base.documents)
        if full_text or had_words:
            index_text(documents)
        same_vectors = self.base is not None and fingerprint_of(self.base.schema) == fingerprint_of(
            documents.schema
        )
        earlier = self.base.record.index if self.base is not None and same_vectors else None
        self._index = update_index(documents, earlier, recall_queries=recall_queries, seed=seed)
        return self._index

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
        if self._index is None:
            self.update_index()
        self._lease.check()
        documents = self.documents
        documents.stamp(self.number)
        record = VersionRecord(
            version=self.number,
            lance_version=documents.lance_version,
            base=None if self.base is None else self.base.number,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint_of(documents.schema),
            counts={"documents": documents.count(), **counts},
            scores=dict(scores),
            reasons=tuple(reasons),
            index=None if self._index is None else asdict(self._index),
            artifacts=dict(sorted(self._artifacts.items())),
            details=dict(details or {}),
        )
        self._lease.check()
        write_record(self._store, record)
        return Version(
            self._store,
            record,
            Documents.open(documents_address(self._store), record.lance_version),
        )


def remove_leftovers(store: str, lease: Lease) -> None:
    """Remove what belongs to no sealed version: leftovers of crashed nights."""
    lease.check()
    address = documents_address(store)
    sealed = {number: read_record(store, number) for number in sealed_numbers(store)}
    used = {a.path for record in sealed.values() for a in record.artifacts.values()}
    used |= {f"{VERSIONS_FOLDER}/{number}/{FILE_NAME}" for number in sealed}
    for number, files in list_version_files(store).items():
        if used.isdisjoint(files):
            remove_folder(version_folder(store, number))
        else:
            remove_files([join(store, path) for path in files if path not in used])
    try:
        newest = Documents.open(address)
    except FileNotFoundError:
        return
    for name in newest.tags():
        number_text = name.removeprefix(VERSION_TAG)
        if name.startswith(VERSION_TAG) and int(number_text) not in sealed:
            newest.untag(name)
    published = newest.tags().get(PUBLISHED)
    if published is not None and newest.lance_version != published:
        newest = Documents.open(address, published)
        newest.restore()
    newest.clean()
