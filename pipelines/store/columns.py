"""Columns of the store's documents, and documents as they come made into rows of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.runtime.arrow import FINGERPRINT_KEY, column_to_vectors, fingerprint_of
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import open_filesystem

EMBEDDING = "embedding"
TIME = pa.timestamp("us", "UTC")
OWN_COLUMNS = ("cluster_id", "distance", "first_seen", "last_changed")
"""What the store adds to a document."""
PASSAGE_COLUMNS = ("document_id", "passage", "start", "stop")
"""What documents have that are passages of longer ones."""
CARRIED = ("id", "text_sha256", *OWN_COLUMNS)
"""What is looked up of a document that the store has already."""
READ_ROWS = 8192
_PORTION_BYTES = 256 << 20
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_SQL_TOKENS = re.compile(
    r"""'(?:[^']|'')*' | `[^`]*` | "(?:[^"]|"")*" | --[^\n]* | .""", re.VERBOSE | re.DOTALL
)


def document_schema(
    id_type: pa.DataType,
    kept: Mapping[str, pa.DataType],
    dimension: int,
    value_type: pa.DataType,
    fingerprint: str,
) -> pa.Schema:
    """The schema of the store's documents; ``fingerprint`` of the encoder goes to its metadata.

    ``kept`` are the kept columns and their types; ``text`` is always there. Raises
    :class:`InputError` for a kept column with a name that the store itself uses or cannot have, and
    for ids that are neither strings nor integers.
    """
    if not (pa.types.is_integer(id_type) or id_type in (pa.string(), pa.large_string())):
        raise InputError(f"ids are {id_type}; required are strings or integers")
    require_column_names(kept)
    taken = sorted({"id", "text_sha256", EMBEDDING, *OWN_COLUMNS} & set(kept))
    if taken:
        raise InputError(
            f"kept column {taken[0]!r}: the store has a column of that name of its own; rename it"
        )
    fields = [
        pa.field("id", pa.int64() if pa.types.is_integer(id_type) else pa.string(), nullable=False),
        pa.field("text", pa.string()),
        *(pa.field(name, kind) for name, kind in kept.items() if name != "text"),
        pa.field("text_sha256", pa.string(), nullable=False),
        pa.field(EMBEDDING, pa.list_(value_type, dimension), nullable=False),
        pa.field("cluster_id", pa.int32()),
        pa.field("distance", pa.float32()),
        pa.field("first_seen", TIME),
        pa.field("last_changed", TIME),
    ]
    return pa.schema(fields, metadata={FINGERPRINT_KEY: fingerprint.encode()})


def require_column_names(names: Iterable[str]) -> None:
    """Raise :class:`InputError` for a column's name that the store cannot have."""
    for name in names:
        if "." in name or "`" in name:
            raise InputError(
                f"kept column {name!r}: in the store a column's name has no dot, which means a "
                "field of a column there, and no back-tick; keep "
                + (f"{name.split('.')[0]!r} whole, or " if "." in name else "")
                + "it under another name"
            )


def spell_condition(condition: str, names: Sequence[str]) -> str:
    """A condition in SQL with columns in double quotes put into back-ticks, as Lance has them.

    In Lance ``"Label" = 'a'`` compares two strings. Raises :class:`ValueError` for a name in
    double quotes that is no column's.
    """
    parts: list[str] = []
    for token in _SQL_TOKENS.findall(condition):
        if len(token) > 1 and token[0] == '"':
            name = token[1:-1].replace('""', '"')
            is_field = "".join(parts).endswith(".")
            if name not in names and not is_field:
                raise ValueError(
                    f"{token} is no column, and text stands in single quotes, as in '{name}'."
                )
            token = f"`{name}`"
        parts.append(token)
    return "".join(parts)


def spelled_columns(names: Sequence[str]) -> list[str]:
    """Columns' names as a condition takes them."""
    return [
        name if _PLAIN_NAME.fullmatch(name) else f"`{name}`" for name in names if name != EMBEDDING
    ]


def require_same(old: pa.Schema, new: pa.Schema) -> None:
    """Raise :class:`InputError` unless documents of ``new`` can stand beside those of ``old``."""
    if fingerprint_of(old) != fingerprint_of(new):
        raise InputError(
            f"the store's vectors are of encoder {fingerprint_of(old)[:12]}, these of "
            f"{fingerprint_of(new)[:12]}: vectors of two encoders never mix; embed all anew"
        )
    for field in new:
        position = old.get_field_index(field.name)
        stored = None if position < 0 else old.field(position).type
        if stored is None or not stored.equals(field.type):
            raise InputError(
                f"column {field.name!r} is {stored or 'missing'} in the store and {field.type} in "
                "these documents: write all documents anew, or bring the column to the store's type"
            )


def read_sources(sources: Iterable[str | pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Parquet files (addresses) or batches, as a stream of batches."""
    for source in sources:
        if isinstance(source, str):
            filesystem, inner = open_filesystem(source)
            with filesystem.open_input_file(inner) as stream:
                yield from pq.ParquetFile(stream).iter_batches(READ_ROWS)
        else:
            for start in range(0, source.num_rows, READ_ROWS):
                yield source.slice(start, READ_ROWS)


@dataclass(frozen=True)
class RowMaker:
    """Documents as embedded → rows of the store, knowing what the store had of them."""

    schema: pa.Schema
    when: datetime
    keep_unchanged: bool
    """Leave ``last_changed`` of documents whose text is the same, and vector where it is known."""

    def rows(self, batch: pa.RecordBatch, known: pa.Table) -> pa.Table:
        """Rows of the store, in the batch's order.

        Args:
            batch: id, text, text_sha256, embedding and kept columns.
            known: the columns :data:`CARRIED` of those of its ids that the store has, and their
                vectors where these are compared.
        """
        count = batch.num_rows
        own = {
            name: pa.nulls(count, self.schema.field(name).type)
            if len(known) == 0
            else known[name].combine_chunks().take(self._places(batch, known))
            for name in ("text_sha256", *OWN_COLUMNS)
        }
        now = pa.array([self.when] * count, TIME)
        hashes = batch.column("text_sha256").cast(pa.string())
        same = pc.fill_null(pc.equal(own["text_sha256"], hashes), False)
        if EMBEDDING in known.column_names and len(known):
            same = pc.and_(same, self._has_vectors(batch, known))
        changed = pc.if_else(same, own["last_changed"], now) if self.keep_unchanged else now
        added = {
            "cluster_id": own["cluster_id"],
            "distance": own["distance"],
            "first_seen": pc.coalesce(own["first_seen"], now),
            "last_changed": changed,
        }
        columns = [
            added[field.name] if field.name in added else self._column(batch, field)
            for field in self.schema
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _has_vectors(self, batch: pa.RecordBatch, known: pa.Table) -> pa.Array:
        """bool (n,): whether ``known`` has a document's vector, as the schema rounds it."""
        kind = self.schema.field(EMBEDDING).type.value_type.to_pandas_dtype()
        now = column_to_vectors(batch.column(EMBEDDING)).astype(kind)
        stored = column_to_vectors(known[EMBEDDING]).astype(kind)
        places = self._places(batch, known).fill_null(-1).to_numpy()
        return pa.array((places >= 0) & (now == stored[places]).all(axis=1))

    def _places(self, batch: pa.RecordBatch, known: pa.Table) -> pa.Array:
        ids = batch.column("id").cast(self.schema.field("id").type)
        return pc.index_in(ids, known["id"].combine_chunks())

    def _column(self, batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
        position = batch.schema.get_field_index(field.name)
        if position < 0:
            raise InputError(
                f"documents lack the column {field.name!r}; they have {batch.schema.names}"
            )
        column = batch.column(position)
        if field.name == EMBEDDING and column.type.list_size != field.type.list_size:
            raise InputError(
                f"vectors have {column.type.list_size} numbers, the store's {field.type.list_size}"
            )
        return column.cast(field.type)


def in_portions(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables joined to about 256 MiB each; an id twice in one portion is an error."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(part.nbytes for part in pending) >= _PORTION_BYTES:
            yield _joined(pending)
            pending = []
    if pending:
        yield _joined(pending)


def _joined(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    counts = pc.value_counts(table["id"])
    if len(counts) < len(table):
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        raise InputError(f"id {twice[0]['values'].as_py()!r} comes more than once; ids are unique")
    return table
