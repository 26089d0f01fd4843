"""From rows as found to documents: each is accepted, or rejected with its reason.

A document has a text that is not blank and an id that is a string or an integer. Where its row
has no id, its id is the SHA-256 of its text. :func:`check_rows` is the one loop over rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.corpus.files import Columns, CorpusFile, Shard, describe_problem
from pipelines.corpus.given_vectors import GivenVectors
from pipelines.corpus.kept_columns import valid_table, value_kind, values_to_json
from pipelines.corpus.passages import Cutter, passage_rows
from pipelines.corpus.readers import ABSENT, RowBatch, read_shard
from pipelines.runtime.arrow import valid_strings, with_children
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import check_store

EXCERPT_CHARACTERS = 200
REJECTED_SCHEMA = pa.schema(
    [("id", pa.string()), ("reason", pa.string()), ("excerpt", pa.string())]
)
DOCUMENT_FIELDS = (
    pa.field("row", pa.int64()),
    pa.field("id", pa.large_string()),
    pa.field("text_sha256", pa.binary(32)),
    pa.field("text", pa.large_string()),
)


@dataclass
class Checker:
    """Checks the batches of one shard and notes what later stages have to know.

    ``clip_characters``: how much of a text can have an influence on its vector. ``kept_schema``:
    types of the kept columns, or None where they are settled after reading (see
    :mod:`pipelines.corpus.kept_columns`). ``vectors`` is the one of them that holds vectors: a row
    without a usable one, or without an id of its own, is rejected.
    """

    keep: tuple[str, ...]
    kept_schema: pa.Schema | None
    clip_characters: int
    vectors: GivenVectors | None = None
    text: str = ""
    """The text's column, which can be among the kept ones."""
    cut: Cutter | None = None
    """Cuts texts into passages; accepted are then these, a row each."""
    rows: int = 0
    documents: int = 0
    """Accepted ones."""
    passages: int = 0
    hashed_ids: int = 0
    """Documents whose id is the hash of their text, as their row has none."""
    reasons: Counter[str] = field(default_factory=Counter)
    id_kinds: set[str] = field(default_factory=set)
    kept_kinds: dict[str, set[str]] = field(default_factory=dict)

    def check(self, batch: RowBatch) -> tuple[pa.Table, pa.Table]:
        """Accepted documents (:data:`DOCUMENT_FIELDS`, kept columns) and rejected rows.

        What cannot be read raises ``pyarrow.ArrowException``, and none of the batch is counted.
        """
        accepted: dict[str, list[Any]] = {name.name: [] for name in DOCUMENT_FIELDS}
        rejected: list[tuple[str | None, str, str]] = []
        places: list[int] = []
        id_kinds: set[str] = set()
        given = None
        if self.vectors is not None:
            given, batch.problems = self._given(batch, self.vectors)
        for place, row in enumerate(check_rows(batch)):
            if row.reason:
                rejected.append((row.id, row.reason, excerpt_of(batch.texts[place])))
                continue
            id_kinds.add("str" if row.own_id is None else value_kind(row.own_id))
            accepted["row"].append(self.rows + place)
            accepted["id"].append(row.id)
            accepted["text_sha256"].append(hashlib.sha256(row.raw).digest())
            whole = self.cut is not None
            accepted["text"].append(row.text if whole else row.text[: self.clip_characters])
            places.append(place)
        table = pa.table(accepted, schema=pa.schema(DOCUMENT_FIELDS))
        for name, column in self._kept_columns(batch, places).items():
            table = table.append_column(f"kept.{name}", column)
        if self.vectors is not None and given is not None:
            column = self.vectors.to_column(given[places])
            table = table.append_column(f"kept.{self.vectors.column}", column)
        self.rows += len(batch.texts)
        self.documents += len(places)
        self.hashed_ids += accepted["id"].count(None)
        self.id_kinds |= id_kinds
        self.reasons.update(reason for _, reason, _ in rejected)
        return self._cut(table), rejected_table(rejected)

    def _cut(self, documents: pa.Table) -> pa.Table:
        """Passages in place of documents, where these are cut."""
        if self.cut is None:
            return documents
        passages = self.cut(documents["text"].to_pylist())
        table = passage_rows(documents, passages, self.passages)
        self.passages += len(table)
        if self.text in self.keep:
            texts = table["text"].combine_chunks()
            kept: pa.Array
            if self.kept_schema is None:
                kept = values_to_json(texts.to_pylist(), set())
            else:
                kept = texts.cast(self.kept_schema.field(self.text).type)
            name = f"kept.{self.text}"
            table = table.set_column(table.schema.get_field_index(name), name, kept)
        return table

    def _given(self, batch: RowBatch, vectors: GivenVectors) -> tuple[np.ndarray, list[str | None]]:
        """The vectors of a batch, float32 (n, d), and its problems with theirs."""
        if isinstance(batch.kept, pa.Table):
            values = batch.kept.column(vectors.column)
        else:
            values = batch.kept[self.keep.index(vectors.column)]
        given, reasons = vectors.read(values)
        ids = batch.ids or [ABSENT] * len(batch.texts)
        without = "it has no id, which documents with vectors of their own need"
        reasons = [
            reason or (without if own is ABSENT else None)
            for reason, own in zip(reasons, ids, strict=True)
        ]
        both = zip(batch.problems, reasons, strict=True)
        return given, [problem or reason for problem, reason in both]

    def _kept_columns(self, batch: RowBatch, places: list[int]) -> dict[str, Any]:
        own = () if self.vectors is None else (self.vectors.column,)
        names = tuple(name for name in self.keep if name not in own)
        if isinstance(batch.kept, pa.Table):
            table = batch.kept.take(np.array(places, dtype=np.int64))
            if self.kept_schema is not None:
                table = valid_table(table, self.kept_schema)
                return {name: table.column(name) for name in names}
            columns = {name: _plain_list(table.column(name)) for name in names}
        else:
            columns = {
                name: [values[place] for place in places]
                for name, values in zip(self.keep, batch.kept, strict=True)
                if name in names
            }
        return {
            name: values_to_json(values, self.kept_kinds.setdefault(name, set()))
            for name, values in columns.items()
        }


class CheckedRow(NamedTuple):
    """A row as a document, or why it is none; ``id`` is None where its text's hash is its id."""

    id: str | None
    own_id: int | str | None
    """The id as the row has it: an integer or a string."""
    text: str
    raw: bytes
    reason: str | None


def check_rows(batch: RowBatch) -> Iterator[CheckedRow]:
    """The one loop over rows: each of a batch checked, in order."""
    for place, value in enumerate(batch.texts):
        text, raw, reason = check_text(value)
        own_id: Any = ABSENT if batch.ids is None else batch.ids[place]
        row_id, id_reason = (None, None) if own_id is ABSENT else check_id(own_id)
        kept_id = own_id if isinstance(own_id, int) and not id_reason else row_id
        problem = batch.problems[place]
        yield CheckedRow(row_id, kept_id, text, raw, problem or id_reason or reason)


@dataclass(frozen=True)
class Document:
    """A document and the values of its kept columns, in their order."""

    id: str
    text: str
    kept: tuple[Any, ...]


def read_documents(shard: Shard, columns: Columns, left_out: Counter[str]) -> Iterator[Document]:
    """The documents of a shard; why other rows are none is counted in ``left_out``.

    Raises :class:`InputError` naming the file where it cannot be read any further.
    """
    try:
        for batch in read_shard(shard, columns):
            kept = batch.kept
            if isinstance(kept, pa.Table):
                kept = [_plain_list(column) for column in kept.columns]
            for place, row in enumerate(check_rows(batch)):
                if row.reason:
                    left_out[row.reason] += 1
                    continue
                values = tuple(_as_text(column[place]) for column in kept)
                yield Document(row.id or hashlib.sha256(row.raw).hexdigest(), row.text, values)
    except (OSError, pa.ArrowException) as error:
        check_store(shard.file.path, error)
        raise InputError(
            f"{shard.file.path}: {describe_problem(error)}; mend or remove the file"
        ) from error


def require_readable(files: Sequence[CorpusFile]) -> None:
    """Raise :class:`InputError`, naming it, for a file that cannot be looked into."""
    for file in files:
        if file.problem:
            raise InputError(f"{file.path}: {file.problem}; mend or remove the file")


def check_text(value: Any) -> tuple[str, bytes, str | None]:
    """A text as string and as UTF-8, and why it is none."""
    if value is None:
        return "", b"", "text is null"
    if isinstance(value, bytes):
        try:
            text, raw = value.decode(), value
        except UnicodeDecodeError:
            return "", b"", "text is not valid UTF-8"
    elif isinstance(value, str):
        text = value
        try:
            raw = value.encode()
        except UnicodeEncodeError:
            return "", b"", "text is not valid UTF-8"
    else:
        return "", b"", f"text is {_kind_name(value)}, not a string"
    return text, raw, None if text.strip() else "text is empty"


def check_id(value: Any) -> tuple[str | None, str | None]:
    """An id as string, and why it is none."""
    if value is None:
        return None, "id is null"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), None
    if not isinstance(value, str | bytes):
        return None, f"id is {_kind_name(value)}, not a string or an integer"
    try:
        if isinstance(value, bytes):
            text = value.decode()
        else:
            text = value
            text.encode()
    except UnicodeError:
        return None, "id is not valid UTF-8"
    return (text, None) if text else (None, "id is empty")


def rejected_table(rows: Sequence[tuple[str | None, str, str]]) -> pa.Table:
    """Rejected rows as a table of :data:`REJECTED_SCHEMA`."""
    columns = [pa.array([row[place] for row in rows], pa.string()) for place in range(3)]
    return pa.table(columns, schema=REJECTED_SCHEMA)


def excerpt_of(value: Any) -> str:
    """The beginning of whatever stood where a text should be, for people."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")[:EXCERPT_CHARACTERS]
    text = value if isinstance(value, str) else repr(value)
    return text[:EXCERPT_CHARACTERS].encode("utf-8", "replace").decode()


def _kind_name(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", list: "a list"}
    other = f"of type {type(value).__name__}"
    return names.get(type(value), "an object" if isinstance(value, dict) else other)


def _as_text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _plain_list(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.large_binary())
    try:
        return column.to_pylist()
    except (UnicodeDecodeError, OverflowError):
        parts = [chunk[place : place + 1] for chunk in column.chunks for place in range(len(chunk))]
        return [_plain_value(part) for part in parts]


def _plain_value(column: pa.Array) -> Any:
    """The one value of a column; times beyond Python's as text, bad bytes in strings as U+FFFD."""
    try:
        return column[0].as_py()
    except (UnicodeDecodeError, OverflowError):
        return _without_times(valid_strings(column))[0].as_py()


def _without_times(column: pa.Array) -> pa.Array:
    if pa.types.is_temporal(column.type):
        return column.cast(pa.string())
    return with_children(column, _without_times) if pa.types.is_nested(column.type) else column
