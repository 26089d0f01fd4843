"""Documents of all versions as one Lance dataset; this module and ``index`` know Lance.

Columns of a document: ``id`` (string or int64), ``text`` (string), the kept columns,
``text_sha256`` (string), ``embedding`` fixed_size_list<float | halffloat>[d], ``cluster_id``
(int32), ``distance`` (float), ``first_seen`` and ``last_changed`` (timestamp[us, UTC]).
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# Read when Lance is loaded: its warnings are about what is meant here (a new dataset) or not used.
os.environ.setdefault("LANCE_LOG", "error")
os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")

import lance
import numpy as np
import pyarrow as pa

from pipelines.runtime.arrow import column_to_vectors, fingerprint_of
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import first_line
from pipelines.runtime.tables import lance_options, plain_uri
from pipelines.store.columns import (
    CARRIED,
    EMBEDDING,
    RowMaker,
    read_sources,
    spell_condition,
    spelled_columns,
)
from pipelines.store.records import VERSION_TAG, StaleWriterError

# Every fork warns; Ray's are followed by another program at once.
warnings.filterwarnings("ignore", message="lance is not fork-safe")

_NUMBER_KEY = "shoal.version"
_ID_INDEX = "id"
_VECTOR_INDEX = "vectors"
_LOOKUP_IDS = 4096
# Of its own accord Lance reads up to 2 GiB ahead of whoever takes the rows.
_READING: dict[str, Any] = {"batch_size": 8192, "batch_readahead": 2, "io_buffer_size": 32 << 20}
_ROWS_A_FILE = 1 << 20  # one fragment a file: more would only cost requests
_MOST_INDEX_PARTS = 8
_PARTITION_ROWS = 2048
"""Lance joins partitions that are much smaller than what it was told when it joins index parts."""
_MOST_SMALL_FRAGMENTS = 8
_MOST_DELETED_SHARE = 0.2

Assign = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""float32 (n, d) → cluster ids int32 (n,), distances float32 (n,)."""


@dataclass(frozen=True)
class FragmentRef:
    """A part of one version's documents, small enough for one worker; picklable."""

    address: str
    lance_version: int
    fragment: int
    rows: int


@dataclass(frozen=True)
class AssignedFragment:
    """What a worker wrote and the driver will commit; picklable."""

    fragment: int
    content: str
    fields: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class WrittenFile:
    """The fragments that a worker wrote of one file of documents; picklable."""

    fragments: tuple[str, ...]
    rows: int


def read_fragment(
    ref: FragmentRef, columns: Sequence[str], *, batch_rows: int = 8192
) -> Iterator[pa.RecordBatch]:
    """The rows of a fragment in order; only the named columns are read.

    In a candidate whose assignments are not yet set, ``cluster_id`` and ``distance`` are those of
    the document in the version before, null for one that is new.
    """
    reading = {**_READING, "batch_size": batch_rows}
    yield from _fragment(ref).to_batches(columns=list(columns), **reading)


def assign_fragment(ref: FragmentRef, assign: Assign) -> AssignedFragment:
    """Worker's part of :meth:`Candidate.set_assignments`: writes two columns, no vector.

    ``assign`` gets float32 (n, d) and returns cluster ids int32 (n,), distances float32 (n,).
    """
    fragment = _fragment(ref)
    parts = []
    for batch in fragment.to_batches(columns=[EMBEDDING], with_row_address=True, **_READING):
        if batch.num_rows:
            ids, distances = assign(column_to_vectors(batch.column(EMBEDDING)))
            columns = {
                "_rowaddr": batch.column("_rowaddr"),
                "cluster_id": pa.array(ids, pa.int32()),
                "distance": pa.array(distances, pa.float32()),
            }
            parts.append(pa.table(columns))
    table = pa.concat_tables(parts)
    metadata, fields = fragment.update_columns(table, left_on="_rowaddr", right_on="_rowaddr")
    content = json.dumps(metadata.to_json())
    return AssignedFragment(ref.fragment, content, tuple(fields), len(table))


def _fragment(ref: FragmentRef) -> Any:
    return _open(ref.address, ref.lance_version).get_fragment(ref.fragment)


def _open(address: str, version: int | str | None) -> Any:
    try:
        return lance.dataset(
            plain_uri(address), version=version, storage_options=lance_options(address)
        )
    except ValueError as error:  # also how Lance says that there is none
        raise FileNotFoundError(f"{address}: {first_line(error)}") from error


def write_documents(
    address: str, known_version: int | None, maker: RowMaker, path: str
) -> WrittenFile:
    """Worker's part of :meth:`Candidate.replace`: one Parquet file's documents as fragments.

    Args:
        address: of the Lance dataset.
        known_version: Lance version in which ``first_seen`` and clusters are looked up.
        maker: makes rows of documents.
        path: the Parquet file.
    """
    known = None if known_version is None else Documents(address, _open(address, known_version))
    rows = 0
    names: Sequence[str] = CARRIED
    if known is not None and fingerprint_of(known.schema) == fingerprint_of(maker.schema):
        names = (*CARRIED, EMBEDDING)

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in read_sources([path]):
            rows += batch.num_rows
            ids = batch.column("id")
            stored = _no_rows(maker.schema) if known is None else known.lookup(ids, names)
            yield from maker.rows(batch, stored).to_batches()

    fragments = lance.fragment.write_fragments(
        pa.RecordBatchReader.from_batches(maker.schema, batches()),
        plain_uri(address),
        schema=maker.schema,
        mode="overwrite",
        max_rows_per_file=_ROWS_A_FILE,
        storage_options=lance_options(address),
    )
    return WrittenFile(tuple(json.dumps(f.to_json()) for f in fragments), rows)


def _no_rows(schema: pa.Schema) -> pa.Table:
    return pa.schema([schema.field(name) for name in CARRIED]).empty_table()


class Documents:
    """The documents at one Lance version; a writer moves on with every change it commits.

    A change that finds another writer's commit before its own raises :class:`StaleWriterError`:
    nothing is retried, as what the change was computed from is no longer the newest.
    """

    def __init__(self, address: str, dataset: Any) -> None:
        self.address = address
        self._dataset = dataset

    @classmethod
    def open(cls, address: str, version: int | str | None = None) -> Documents:
        """At a version or tag, by default the newest; ``FileNotFoundError`` where there is none."""
        return cls(address, _open(address, version))

    @classmethod
    def create(
        cls, address: str, schema: pa.Schema, written: Iterable[WrittenFile] = ()
    ) -> Documents:
        """A version of what :func:`write_documents` wrote, or an empty one, and no more."""
        parts = [part for file in written for part in file.fragments]
        fragments = [lance.FragmentMetadata.from_json(part) for part in parts]
        operation = lance.LanceOperation.Overwrite(schema, fragments)
        try:
            before = cls.open(address).lance_version
        except FileNotFoundError:
            before = 0
        documents = cls(address, _commit(address, operation, before or None))
        documents._require_next(before)
        return documents

    @property
    def dataset(self) -> Any:
        """Lance's own object, for the modules that know Lance."""
        return self._dataset

    @property
    def lance_version(self) -> int:
        """Lance's number."""
        return int(self._dataset.version)

    @property
    def number(self) -> int | None:
        """The version's number; None before it is sealed."""
        number = self._dataset.metadata.get(_NUMBER_KEY)
        return None if number is None else int(number)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the documents."""
        return self._dataset.schema

    def count(self, filter: str | None = None) -> int:
        """Number of documents, or of those that satisfy ``filter``."""
        return int(self._dataset.count_rows(filter=self.condition(filter)))

    def fragments(self) -> list[FragmentRef]:
        """The parts, for workers."""
        return [
            FragmentRef(self.address, self.lance_version, f.fragment_id, f.count_rows())
            for f in self._dataset.get_fragments()
        ]

    def batches(
        self, columns: Sequence[str] | None = None, filter: str | None = None
    ) -> Iterator[pa.RecordBatch]:
        """All documents, or those that satisfy ``filter``, as a stream."""
        names = None if columns is None else list(columns)
        reading = {"filter": self.condition(filter), "fragment_readahead": 1, **_READING}
        yield from self._dataset.to_batches(columns=names, **reading)

    def take(self, ids: Sequence[Any], columns: Sequence[str] | None = None) -> pa.Table:
        """The documents of these ids that are there."""
        names = self.schema.names if columns is None else list(columns)
        parts = [pa.schema([self.schema.field(name) for name in names]).empty_table()]
        parts += self.holding("id", ids, names)
        return pa.concat_tables(part.replace_schema_metadata(None) for part in parts)

    def holding(
        self, column: str, values: Sequence[Any], columns: Iterable[str]
    ) -> Iterator[pa.Table]:
        """The documents that have one of these values, strings or integers, in a column."""
        for start in range(0, len(values), _LOOKUP_IDS):
            wanted = ", ".join(_literal(value) for value in values[start : start + _LOOKUP_IDS])
            condition = f"{column} IN ({wanted})"
            yield self._dataset.to_table(columns=list(columns), filter=condition)

    def at(self, positions: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The documents at these positions, int64 (n,), of :meth:`batches`."""
        return self._dataset.take(positions.tolist(), columns=list(columns))

    def lookup(self, ids: pa.Array, columns: Sequence[str] = CARRIED) -> pa.Table:
        """What the store adds to the documents of these ids that are there."""
        return self.take(ids.cast(self.schema.field("id").type).to_pylist(), columns)

    def nearest(
        self,
        vector: np.ndarray,
        limit: int,
        columns: Sequence[str],
        *,
        filter: str | None = None,
        probes: int | None = None,
        refine: int = 1,
    ) -> pa.Table:
        """The nearest by cosine, best first, with ``_distance``; exact where ``probes`` is None."""
        query: dict[str, Any] = {
            "column": EMBEDDING,
            "q": vector.astype(self.schema.field(EMBEDDING).type.value_type.to_pandas_dtype()),
            "k": limit,
            "metric": "cosine",
            "use_index": probes is not None,
        }
        if probes is not None:
            query |= {"minimum_nprobes": probes, "refine_factor": refine}
        return self._dataset.to_table(
            columns=[*columns, "_distance"],
            nearest=query,
            filter=self.condition(filter),
            prefilter=True,
        )

    def condition(self, filter: str | None) -> str | None:
        """A condition as Lance reads it; :class:`InputError` for one that it does not understand.

        It is planned first: what fails later is not the filter's fault.
        """
        if filter is None:
            return None
        try:
            condition = spell_condition(filter, self.schema.names)
            self._dataset.scanner(columns=["id"], filter=condition).explain_plan()
        except ValueError as error:
            reason = first_line(error).removeprefix("Invalid user input: ").partition(", /home")[0]
            raise InputError(
                f"filter {filter!r}: {reason.partition(' Valid fields are')[0]} A filter is a "
                "condition in SQL, such as \"cluster_id = 3 AND label = 'sport'\"; columns are "
                f"spelled {', '.join(spelled_columns(self.schema.names))}"
            ) from error
        return condition

    def prewarm(self) -> None:
        """Load the vector index into memory."""
        if self.index_rows() is not None:
            self._dataset.prewarm_index(_VECTOR_INDEX)

    def index_rows(self) -> tuple[int, int] | None:
        """Rows that the vector index holds and lacks; None without an index."""
        if not self._has_index(_VECTOR_INDEX):
            return None
        stats = self._dataset.stats.index_stats(_VECTOR_INDEX)
        return int(stats["num_indexed_rows"]), int(stats["num_unindexed_rows"])

    def check(self) -> None:
        """Raise ``ValueError`` or ``OSError`` where Lance finds its own files unsound."""
        self._dataset.validate()

    def restore(self) -> None:
        """Make this version's content the newest, to be changed from here."""
        if self._dataset.version != self._dataset.latest_version:
            with _told_race(self.address, self._dataset.latest_version):
                self._dataset.restore()

    def merge(self, rows: pa.Table) -> tuple[int, int]:
        """Insert new ids and replace known ones; (inserted, replaced)."""
        builder = self._dataset.merge_insert("id").when_matched_update_all()
        counts = self._run(builder.when_not_matched_insert_all(), rows)
        return counts["num_inserted_rows"], counts["num_updated_rows"]

    def update(self, rows: pa.Table) -> int:
        """Replace the given columns of known ids; how many there were."""
        builder = self._dataset.merge_insert("id").when_matched_update_all()
        return self._run(builder, rows)["num_updated_rows"]

    def delete(self, ids: pa.Table) -> int:
        """Delete the ids of a column ``id``; how many there were."""
        builder = self._dataset.merge_insert("id").when_matched_delete()
        return self._run(builder, ids)["num_deleted_rows"]

    def _run(self, builder: Any, rows: pa.Table) -> dict[str, int]:
        before = self.lance_version
        with _told_race(self.address, before):
            counts = builder.conflict_retries(0).execute(rows)
        self._require_next(before)
        return counts

    def set_assignments(self, assigned: Sequence[AssignedFragment]) -> None:
        """Commit the columns that :func:`assign_fragment` wrote."""
        updated = [lance.FragmentMetadata.from_json(part.content) for part in assigned]
        fields = list(assigned[0].fields)
        self._commit(lance.LanceOperation.Update(updated_fragments=updated, fields_modified=fields))

    def _commit(self, operation: Any) -> None:
        before = self.lance_version
        self._dataset = _commit(self.address, operation, before)
        self._require_next(before)

    def _require_next(self, before: int) -> None:
        if self.lance_version not in (before, before + 1):
            raise StaleWriterError(
                f"{self.address}: another writer has changed it meanwhile; nothing of this run is "
                "published. Run the same command again"
            )

    def index_ids(self) -> None:
        """Bring the index that finds documents by id up to date."""
        if self._has_index(_ID_INDEX):
            self._dataset.optimize.optimize_indices(index_names=[_ID_INDEX])
        elif self.count():
            self._dataset.create_scalar_index("id", "BTREE", name=_ID_INDEX)

    def train_index(self) -> int:
        """A new vector index; the number of its partitions."""
        self._dataset.create_index(
            EMBEDDING,
            "IVF_SQ",
            name=_VECTOR_INDEX,
            metric="cosine",
            target_partition_size=_PARTITION_ROWS,
            replace=True,
        )
        return int(self._dataset.stats.index_stats(_VECTOR_INDEX)["indices"][0]["num_partitions"])

    def extend_index(self) -> None:
        """Bring the vector index up to date with what changed, without training it.

        What is new becomes a part of its own, as rewriting the index would cost its whole size;
        every search looks into all parts, so many are joined to one.
        """
        parts = self._dataset.stats.index_stats(_VECTOR_INDEX)["num_indices"]
        merged = parts if parts >= _MOST_INDEX_PARTS else 0
        self._dataset.optimize.optimize_indices(
            index_names=[_VECTOR_INDEX], num_indices_to_merge=merged
        )

    def drop_index(self) -> None:
        """Remove the vector index, if there is one."""
        if self._has_index(_VECTOR_INDEX):
            self._dataset.drop_index(_VECTOR_INDEX)

    def _has_index(self, name: str) -> bool:
        return any(index.name == name for index in self._dataset.describe_indices())

    def compact(self) -> bool:
        """Join small fragments and drop deleted rows where that has become worth the rewriting."""
        fragments = self._dataset.get_fragments()
        rows = [f.count_rows() for f in fragments]
        small = min(_ROWS_A_FILE, max(1, sum(rows) // _MOST_SMALL_FRAGMENTS))
        too_many = sum(count < small for count in rows) > _MOST_SMALL_FRAGMENTS
        if not too_many and self.deleted_share() <= _MOST_DELETED_SHARE:
            return False
        self._dataset.optimize.compact_files(
            target_rows_per_fragment=small, materialize_deletions_threshold=_MOST_DELETED_SHARE
        )
        return True

    def deleted_share(self) -> float:
        """Largest share of a file's rows that are deleted and still there."""
        fragments = self._dataset.get_fragments()
        shares = [f.num_deletions / max(1, f.physical_rows) for f in fragments]
        return max(shares, default=0.0)

    def stamp(self, number: int) -> None:
        """Write the version's number into it: the last change of a candidate."""
        before = self.lance_version
        with _told_race(self.address, before):
            self._dataset.update_metadata({_NUMBER_KEY: str(number)})
        self._require_next(before)
        self.tag(f"{VERSION_TAG}{number}", self.lance_version)

    def tags(self) -> dict[str, int]:
        """Tags and the Lance versions they name."""
        return {name: int(tag["version"]) for name, tag in self._dataset.tags.list().items()}

    def tag(self, name: str, lance_version: int) -> None:
        """Make a tag, or move it."""
        if name in self._dataset.tags.list():
            self._dataset.tags.update(name, lance_version)
        else:
            self._dataset.tags.create(name, lance_version)

    def untag(self, name: str) -> None:
        """Remove a tag, if it is there."""
        if name in self._dataset.tags.list():
            self._dataset.tags.delete(name)

    def clean(self) -> int:
        """Remove every version but this and the tagged, and files of no version; bytes freed."""
        removed = self._dataset.cleanup_old_versions(
            older_than=timedelta(microseconds=1),
            delete_unverified=True,  # the lease says that nobody else is writing
            error_if_tagged_old_versions=False,
        )
        return int(removed.bytes_removed)


def _commit(address: str, operation: Any, read_version: int | None) -> Any:
    with _told_race(address, read_version):
        return lance.LanceDataset.commit(
            plain_uri(address),
            operation,
            read_version=read_version,
            max_retries=0,
            storage_options=lance_options(address),
        )


@contextlib.contextmanager
def _told_race(address: str, before: int | None) -> Iterator[None]:
    """A change that fails as another was quicker, as :class:`StaleWriterError`.

    Lance raises a plain ``OSError`` for every failure of a commit, so what is asked is the store:
    a race was lost where its newest version is no longer ``before``, the one that was read.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _newest(address) == before:
            raise
        raise StaleWriterError(
            f"{address}: another writer has changed it meanwhile ({first_line(error)}); "
            "nothing of this run is published. Run the same command again"
        ) from error


def _newest(address: str) -> int | None:
    try:
        return int(_open(address, None).version)
    except FileNotFoundError:
        return None


def _literal(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(int(value))
