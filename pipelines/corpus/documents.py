"""From rows as found to documents: each is accepted, or rejected with its reason.

A document has a text that is not blank and an id that is a string or an integer. Where its file
has no id column, its id is the SHA-256 of its text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpus.kept_columns import valid_table, value_kind, values_to_json
from pipelines.corpus.readers import RowBatch

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
    :mod:`pipelines.corpus.kept_columns`).
    """

    keep: tuple[str, ...]
    kept_schema: pa.Schema | None
    clip_characters: int
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    id_kinds: set[str] = field(default_factory=set)
    kept_kinds: dict[str, set[str]] = field(default_factory=dict)

    def check(self, batch: RowBatch) -> tuple[pa.Table, pa.Table]:
        """Accepted documents (:data:`DOCUMENT_FIELDS`, kept columns) and rejected rows."""
        accepted: dict[str, list[Any]] = {name.name: [] for name in DOCUMENT_FIELDS}
        rejected: list[tuple[str | None, str, str]] = []
        places = []
        ids = batch.ids
        if ids is None:  # content hashes
            self.id_kinds.add("str")
            ids = [None] * len(batch.texts)
        for place, (found, found_id) in enumerate(zip(batch.texts, ids, strict=True)):
            text, raw, reason = check_text(found)
            row_id, id_reason = None, None
            if batch.ids is not None:
                row_id, id_reason = check_id(found_id)
            reason = batch.problems[place] or id_reason or reason
            if reason:
                rejected.append((row_id, reason, excerpt_of(found)))
                continue
            if batch.ids is not None:
                self.id_kinds.add(value_kind(found_id if isinstance(found_id, int) else row_id))
            accepted["row"].append(self.rows + place)
            accepted["id"].append(row_id)
            accepted["text_sha256"].append(hashlib.sha256(raw).digest())
            accepted["text"].append(text[: self.clip_characters])
            places.append(place)
        self.rows += len(batch.texts)
        self.reasons.update(reason for _, reason, _ in rejected)
        table = pa.table(accepted, schema=pa.schema(DOCUMENT_FIELDS))
        for name, column in self._kept_columns(batch, places).items():
            table = table.append_column(f"kept.{name}", column)
        return table, rejected_table(rejected)

    def _kept_columns(self, batch: RowBatch, places: list[int]) -> dict[str, Any]:
        if isinstance(batch.kept, pa.Table):
            table = batch.kept.take(np.array(places, dtype=np.int64))
            if self.kept_schema is not None:
                table = valid_table(table, self.kept_schema)
                return {name: table.column(name) for name in self.keep}
            found = {name: _plain_list(table.column(name)) for name in self.keep}
        else:
            found = {
                name: [values[place] for place in places]
                for name, values in zip(self.keep, batch.kept, strict=True)
            }
        return {
            name: values_to_json(values, self.kept_kinds.setdefault(name, set()))
            for name, values in found.items()
        }


def check_text(found: Any) -> tuple[str, bytes, str | None]:
    """A text as string and as UTF-8, and why it is none."""
    if found is None:
        return "", b"", "text is null"
    if isinstance(found, bytes):
        try:
            text, raw = found.decode(), found
        except UnicodeDecodeError:
            return "", b"", "text is not valid UTF-8"
    elif isinstance(found, str):
        text = found
        try:
            raw = found.encode()
        except UnicodeEncodeError:
            return "", b"", "text is not valid UTF-8"
    else:
        return "", b"", f"text is {_kind_name(found)}, not a string"
    return text, raw, None if text.strip() else "text is empty"


def check_id(found: Any) -> tuple[str | None, str | None]:
    """An id as string, and why it is none."""
    if found is None:
        return None, "id is null"
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found), None
    if not isinstance(found, str | bytes):
        return None, f"id is {_kind_name(found)}, not a string or an integer"
    try:
        text = found.decode() if isinstance(found, bytes) else found
        text.encode()
    except UnicodeError:
        return None, "id is not valid UTF-8"
    return (text, None) if text else (None, "id is empty")


def rejected_table(rows: Sequence[tuple[str | None, str, str]]) -> pa.Table:
    """Rejected rows as a table of :data:`REJECTED_SCHEMA`."""
    columns = [pa.array([row[place] for row in rows], pa.string()) for place in range(3)]
    return pa.table(columns, schema=REJECTED_SCHEMA)


def excerpt_of(found: Any) -> str:
    """The beginning of whatever stood where a text should be, for people."""
    if found is None:
        return ""
    if isinstance(found, bytes):
        return found[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")[:EXCERPT_CHARACTERS]
    text = found if isinstance(found, str) else repr(found)
    return text[:EXCERPT_CHARACTERS].encode("utf-8", "replace").decode()


def _kind_name(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "no string")


def _plain_list(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.large_binary())
    return column.to_pylist()
