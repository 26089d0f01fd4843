"""Columns of vectors, whoever wrote them, as lists of numbers.

Lists of fixed or any length, tensors of Ray and Hugging Face, pgvector's text and Spark's
VectorUDT; what is a list of something else, or more than one vector a row, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.runtime.arrow import FileColumns
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import first_line


def vector_length(
    about: FileColumns, name: str, path: str, *, flag: str = "--embedding-column"
) -> int | None:
    """The length that a fixed-size list's type states; None where only the rows can tell.

    Raises :class:`InputError`, which says that ``flag`` names another, for what is no vector.
    """
    shape = _tensor_shape(about.own, name)
    if shape is not None and len(shape) != 1:
        raise InputError(
            f"{path}: column {name!r} holds tensors of shape {shape}; required is one "
            "vector a row, of shape (d,). Write the vectors wanted as a column of their own"
        )
    kind = about.schema.field(name).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_spark_vector(kind):
        return None
    is_fixed = pa.types.is_fixed_size_list(kind)
    if is_fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = kind.value_type
        if pa.types.is_floating(values) or pa.types.is_integer(values):
            return kind.list_size if is_fixed else None
    raise InputError(
        f"{path}: column {name!r} is {kind}; required is a list of numbers. Name the "
        f"right one with {flag}"
    )


def _tensor_shape(schema: pa.Schema, name: str) -> tuple[int, ...] | None:
    """The shape that a column of tensors says, whether its extension type is registered or not."""
    places = schema.get_all_field_indices(name)
    if not places:
        return None
    field = schema.field(places[0])
    shape = getattr(field.type, "shape", None)
    if shape is None:
        about = (field.metadata or {}).get(b"ARROW:extension:metadata", b"")
        try:
            shape = json.loads(about)
        except ValueError:
            return None
    shape = shape.get("shape") if isinstance(shape, dict) else shape
    return tuple(shape) if isinstance(shape, list | tuple) else None


def _is_spark_vector(kind: pa.DataType) -> bool:
    """Whether a type is Spark's VectorUDT."""
    names = ["type", "size", "indices", "values"]
    return pa.types.is_struct(kind) and [field.name for field in kind] == names


def vector_column(column: pa.Array, path: str) -> pa.Array:
    """Vectors of any kind as lists of numbers: lists, pgvector's text, Spark's VectorUDT."""
    if _is_spark_vector(column.type):
        return pa.array([_spark_vector(v) for v in column.to_pylist()], pa.list_(pa.float64()))
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        return column
    try:
        vectors = [json.loads(text) if text else None for text in column.to_pylist()]
        return pa.array(vectors, pa.list_(pa.float64()))
    except (ValueError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"{path}: a vector is text that is not of the form [1,2,3]: {first_line(error)}"
        ) from error


def _spark_vector(value: dict[str, Any] | None) -> list[float] | None:
    if value is None or value["type"] == 1:
        return None if value is None else value["values"]
    dense = np.zeros(value["size"])
    dense[value["indices"]] = value["values"]
    return dense.tolist()


def first_length(columns: Iterable[pa.Array], path: str) -> int:
    """The length of the first vector that is neither null nor empty; 0 where none is."""
    for column in columns:
        lengths = vector_column(column, path).drop_null().value_lengths().to_pylist()
        if any(lengths):
            return next(length for length in lengths if length)
    return 0
