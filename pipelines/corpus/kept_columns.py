"""Columns that are carried from corpus to output, whatever its formats.

Where every file stores columns (Parquet, Arrow, Lance) their Arrow types are kept. Where JSON or
CSV is among the files, only reading all rows tells a column's type: until then each value travels
as JSON text, and every shard notes which kinds of value it saw.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipelines.corpus.columnar import TYPED_FORMATS, columns_of
from pipelines.corpus.files import CorpusFile
from pipelines.runtime.arrow import plain_type, unstorable, valid_strings
from pipelines.runtime.column_types import fit_column, unify_columns
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import in_threads, with_retries

_BLOB_KEY = b"lance-encoding:blob"
_INT64 = range(-(2**63), 2**63)
_EXACT = range(-(2**53), 2**53 + 1)
_LONG = "long"
"""Kind of an integer that a float may not hold exactly."""
_KIND_TYPES: dict[frozenset[str], pa.DataType] = {
    frozenset({"bool"}): pa.bool_(),
    frozenset({"int"}): pa.int64(),
    frozenset({_LONG}): pa.int64(),
    frozenset({"int", _LONG}): pa.int64(),
    frozenset({"float"}): pa.float64(),
    frozenset({"int", "float"}): pa.float64(),
}


def parquet_schema(
    files: Sequence[CorpusFile], keep: Sequence[str], text: str = ""
) -> pa.Schema | None:
    """Types of the kept columns where all files store columns with types, else None.

    Bytes of the column ``text``, which is to be embedded, are kept as strings; what is nothing but
    nulls in all files has the null type. Raises :class:`InputError` where two files' types have no
    common one.
    """
    readable = [file for file in files if file.readable]
    if not readable or any(file.format not in TYPED_FORMATS for file in readable):
        return None
    schemas = in_threads(lambda file: _kept_schema(file, keep, text), readable)
    unified = unify_columns([file.path for file in readable], schemas)
    for field in unified:
        if (bad := unstorable(plain_type(field.type))) is not None:
            raise InputError(
                f"kept column {field.name!r} holds {bad}, which cannot be stored; cast it, or "
                "leave it out of --keep-columns"
            )
    return unified


def values_to_json(values: Iterable[Any], kinds: set[str]) -> pa.Array:
    """Values as JSON text, null for None; the kinds seen are added to ``kinds``."""
    texts: list[str | None] = []
    for value in values:
        plain = value if isinstance(value, bool | int | float | str | list | dict) else None
        if plain is None and value is not None:
            plain = _as_text(value)
        kind = value_kind(plain)
        kinds.add(_LONG if kind == "int" and plain not in _EXACT else kind)
        texts.append(None if plain is None else json.dumps(plain, default=_as_text))
    return pa.array(texts, pa.large_string())


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def value_kind(value: Any) -> str:
    """The kind that decides an output type: null, bool, int, float, str or other."""
    if value is None:
        return "null"
    if isinstance(value, int) and not isinstance(value, bool) and value not in _INT64:
        return "other"
    return {bool: "bool", int: "int", float: "float", str: "str"}.get(type(value), "other")


def resolve_type(kinds: Iterable[str]) -> pa.DataType:
    """The Arrow type that holds all values of the kinds seen; string where they are mixed.

    Nulls alone have the null type: whatever the column is elsewhere, they fit.
    """
    seen = frozenset(kinds) - {"null"}
    return _KIND_TYPES.get(seen, pa.string()) if seen else pa.null()


def json_to_values(texts: pa.ChunkedArray, target: pa.DataType) -> pa.Array:
    """Undo :func:`values_to_json`: an array of ``target``; what no string is stays JSON text."""
    values = [None if text is None else json.loads(text) for text in texts.to_pylist()]
    if pa.types.is_string(target):
        values = [
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for v in values
        ]
        values = [v if v is None else _valid(v) for v in values]
    if pa.types.is_floating(target):
        values = [math.nan if v is None else float(v) for v in values]
        return pa.array(values, target, mask=[t is None for t in texts.to_pylist()])
    return pa.array(values, target)


def valid_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` cast to plain types of ``schema``, undecodable bytes as U+FFFD in strings."""
    columns = []
    for field in schema:
        kind = plain_type(field.type)
        column = table.column(field.name)
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            chunks = [valid_strings(chunk) for chunk in column.chunks]
            column = pa.chunked_array(chunks, column.type)
            column.validate(full=True)
        columns.append(fit_column(field.name, column, kind))
    return pa.table(columns, names=schema.names)


def _kept_schema(file: CorpusFile, keep: Sequence[str], text: str) -> pa.Schema:
    about = with_retries(lambda: columns_of(file, pa.null()), file.path, decodes=True)
    for name in keep:
        if name in about.own.names and _is_blob(about.own.field(name)):
            raise InputError(
                f"kept column {name!r} of {file.path} holds blobs of Lance, which are not read "
                "with the other columns: leave it out of --keep-columns"
            )
    found = {name: about.type_of(name) for name in keep}
    kinds = {name: pa.null() if kind is None else kind for name, kind in found.items()}
    if text in kinds and (_is_bytes(kinds[text]) or pa.types.is_null(kinds[text])):
        kinds[text] = pa.string()
    return pa.schema([pa.field(name, kind) for name, kind in kinds.items()])


def _is_blob(field: pa.Field) -> bool:
    extension = isinstance(field.type, pa.BaseExtensionType) and field.type.extension_name
    return extension == "lance.blob.v2" or _BLOB_KEY in (field.metadata or {})


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
