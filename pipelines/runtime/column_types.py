"""Types of a column that several files or nights have: one that holds all, and values cast to it.

Writers differ in widths, and a file in which a column holds nothing but nulls says no type of it.
All types here are those of :func:`pipelines.runtime.arrow.plain_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from pipelines.runtime.errors import InputError


def unify_columns(paths: Sequence[str], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The types that hold the columns of all files; null gives way to any other.

    Raises :class:`InputError` naming the file whose types have none in common with those before.
    """
    unified = schemas[0]
    for path, schema in zip(paths, schemas, strict=True):
        try:
            unified = pa.unify_schemas([unified, schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(f"kept columns of {path} differ from other files': {error}") from error
    return unified


def fit_column(name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A kept column of one file as the type that all files share.

    Raises :class:`InputError` where that does not hold a value.
    """
    try:
        return cast_column(column, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"kept column {name!r} is {column.type} in one file and {kind} in others, which does "
            f"not hold all its values ({error}): cast it in the corpus, or leave it out of "
            "--keep-columns"
        ) from error


def cast_column(column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """A column of plain type as another one, value by value where pyarrow has no cast.

    Raises ``ArrowInvalid`` or ``ArrowTypeError`` for a value that the other does not hold.
    """
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), target)])
    try:
        return column.cast(target)
    except pa.ArrowNotImplementedError:
        return pa.chunked_array([pa.array(column.to_pylist(), target)])


def can_become(found: pa.DataType, stored: pa.DataType) -> bool:
    """Whether values of one type can be of the other, where each fits: writers differ in widths."""
    if found == stored or pa.types.is_null(found):
        return True
    if pa.types.is_struct(found) and pa.types.is_struct(stored):
        names = [[field.name for field in kind] for kind in (found, stored)]
        return names[0] == names[1] and all(
            can_become(one.type, other.type) for one, other in zip(found, stored, strict=True)
        )
    if _is_list(found) and _is_list(stored):
        return can_become(found.value_type, stored.value_type)
    return any(is_kind(found) and is_kind(stored) for is_kind in _KINDS)


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists)


_KINDS: tuple[Callable[[pa.DataType], bool], ...] = (
    lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
    lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind),
    lambda kind: pa.types.is_timestamp(kind) and kind.tz is None,
    lambda kind: pa.types.is_timestamp(kind) and kind.tz is not None,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_duration,
    pa.types.is_decimal,
)
"""Kinds of values of which a type can become another."""
