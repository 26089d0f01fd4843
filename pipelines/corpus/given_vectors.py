"""Vectors that a corpus brings along in a column: read as they are, checked row by row.

In: a column of lists of numbers, of any Arrow list type, of Python lists, or of JSON text. Out: a
matrix, and for each row that has no usable vector the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.runtime.arrow import LONGEST_VECTOR

_UNIT_TOLERANCE = 5e-3
"""What rounding to half precision, or once more, may have done to a length of 1."""


@dataclass(frozen=True)
class GivenVectors:
    """The column ``column`` of vectors of ``dimension`` numbers.

    With ``is_unit`` their encoder scales them to length 1; with ``is_half`` they are stored in half
    precision; with ``is_direction`` their angles are compared, and zeros have none.
    """

    column: str
    dimension: int
    is_unit: bool
    is_half: bool
    is_direction: bool = False

    @property
    def type(self) -> pa.DataType:
        """The type that documents carry them in."""
        return pa.list_(pa.float32(), self.dimension)

    def read(self, values: pa.ChunkedArray | Sequence[Any]) -> tuple[np.ndarray, list[str | None]]:
        """The vectors, float32 (n, d), and why a row has none; the row is then zeros."""
        if isinstance(values, pa.ChunkedArray):
            vectors, reasons = self._from_arrow(values.combine_chunks())
        else:
            vectors, reasons = self._from_lists(values)
        if self.is_half:
            with np.errstate(over="ignore"):
                vectors = vectors.astype(np.float16).astype(np.float32)
        bad = ~np.isfinite(vectors).all(axis=1)
        for row in np.flatnonzero(bad):
            reasons[row] = reasons[row] or "its vector is not finite"
        vectors[bad] = 0
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        for row in np.flatnonzero(lengths > LONGEST_VECTOR):
            reasons[row] = reasons[row] or f"its vector is longer than {LONGEST_VECTOR:g}"
        if self.is_direction:
            for row in np.flatnonzero(lengths == 0):
                reasons[row] = reasons[row] or "its vector is zero, so it has no direction"
        if self.is_unit:
            for row in np.flatnonzero(np.abs(lengths - 1) > _UNIT_TOLERANCE):
                reasons[row] = reasons[row] or "its vector is not of length 1, as its encoder's are"
        return vectors, reasons

    def to_column(self, vectors: np.ndarray) -> pa.Array:
        """Vectors, float32 (n, d), as a column of :attr:`type`."""
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, self.dimension)

    def to_matrix(self, column: pa.ChunkedArray) -> np.ndarray:
        """Undo :meth:`to_column`."""
        flat = pa.concat_arrays([chunk.flatten() for chunk in column.chunks] or [_NO_NUMBERS])
        return flat.to_numpy(zero_copy_only=False).reshape(-1, self.dimension)

    def digest(self, ids: Sequence[str], hashes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """uint8 (n, 32): of id, text hash, uint8 (n, 32), and vector, float32 (n, d), together.

        It takes the place of the text's in finding what changed: another vector is a change, and
        two documents share none.
        """
        kind = np.float16 if self.is_half else np.float32
        rows = np.ascontiguousarray(vectors, kind)
        digests = [
            hashlib.sha256(b"\0".join((own.encode(), text.tobytes(), row.tobytes()))).digest()
            for own, text, row in zip(ids, hashes, rows, strict=True)
        ]
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)

    def _from_arrow(self, values: pa.Array) -> tuple[np.ndarray, list[str | None]]:
        kind = values.type
        is_list = hasattr(kind, "value_type") and not pa.types.is_dictionary(kind)
        if not is_list or not _is_number(kind.value_type):
            return self._from_lists(values.to_pylist())
        lengths = pc.list_value_length(values)
        counts = pc.fill_null(lengths, -1).to_numpy()
        right = counts == self.dimension
        vectors = np.zeros((len(values), self.dimension), np.float32)
        flat = pc.list_flatten(values.filter(pa.array(right)))
        numbers = pc.fill_null(flat.cast(pa.float32(), safe=False), np.nan)
        vectors[right] = numbers.to_numpy(zero_copy_only=False).reshape(-1, self.dimension)
        return vectors, [self._reason(int(count)) for count in counts]

    def _from_lists(self, values: Sequence[Any]) -> tuple[np.ndarray, list[str | None]]:
        vectors = np.zeros((len(values), self.dimension), np.float32)
        reasons: list[str | None] = []
        for row, value in enumerate(values):
            numbers = _parsed(value)
            if numbers is None or not all(_is_plain_number(number) for number in numbers):
                why = "it has no vector" if value is None else "its vector is no list of numbers"
                reasons.append(why)
                continue
            reasons.append(self._reason(len(numbers)))
            if len(numbers) == self.dimension:
                with np.errstate(over="ignore"):
                    vectors[row] = [np.nan if number is None else number for number in numbers]
        return vectors, reasons

    def _reason(self, count: int) -> str | None:
        if count == self.dimension:
            return None
        if count < 0:
            return "it has no vector"
        return f"its vector has {count} numbers, not {self.dimension}"


def first_width(values: pa.ChunkedArray | Sequence[Any]) -> int | None:
    """How many numbers the first row has that holds any; None where none does."""
    for value in values.to_pylist() if isinstance(values, pa.ChunkedArray) else values:
        numbers = _parsed(value)
        if numbers:
            return len(numbers)
    return None


_NO_NUMBERS = pa.array([], pa.float32())


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_plain_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _parsed(value: Any) -> list[Any] | None:
    """A list, also where a cell of CSV has it as JSON; None for anything else."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None
