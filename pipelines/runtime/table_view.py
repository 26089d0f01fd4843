"""What a file's place says of its rows and columns: in a table, or in folders named ``key=value``.

In: what a table's metadata or a folder's name says. Out: a :class:`TableView`, of plain values, so
that it travels with the file to whoever reads it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

HIVE_FOLDER = re.compile(r"([^=/]+)=([^/]*)")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


class TableView(NamedTuple):
    """How the rows and columns of a file become those of its table.

    ``names`` gives the file's column for each of the table's (None: the file has none, its values
    are null); without it the names are the file's own. ``constants`` are columns of one value, as
    JSON has it; ``typed`` packs them with their types, where the table says these. ``deleted``
    packs the numbers of rows that are no more. ``version`` is that of a Lance dataset.
    ``regrouped`` are columns of fields that have other names in the file than in the table.
    """

    names: Mapping[str, str | None] | None = None
    constants: Mapping[str, Any] = {}
    deleted: str = ""
    version: int = 0
    typed: str = ""
    regrouped: Sequence[str] = ()
    table: str = ""
    """Which table it is of, and which version of it, for people."""

    @classmethod
    def of_table(
        cls,
        names: Mapping[str, str | None] | None,
        values: Mapping[str, pa.Scalar],
        deleted: str,
        regrouped: Sequence[str] = (),
        table: str = "",
    ) -> TableView:
        """The view of a table's file with these values of columns beside it."""
        plain = {name: _plain(value.as_py()) for name, value in values.items()}
        row = pa.table({name: pa.array([value]) for name, value in values.items()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, row.schema) as stream:
            stream.write_table(row)
        typed = base64.b64encode(sink.getvalue()).decode() if values else ""
        return cls(names, plain, deleted, typed=typed, regrouped=regrouped, table=table)

    @property
    def state(self) -> list[str]:
        """Digests of what the table may say otherwise of a file that is as it was."""
        said = [self.deleted] if self.deleted else []
        other = {name: there for name, there in (self.names or {}).items() if there != name}
        if other or (self.names is not None and self.constants):
            said.append(json.dumps([other, self.constants], sort_keys=True))
        return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in said]

    def scalars(self) -> dict[str, pa.Scalar]:
        """The constants with their types."""
        if not self.typed:
            return {name: pa.scalar(value) for name, value in self.constants.items()}
        row = pa.ipc.open_stream(base64.b64decode(self.typed)).read_all()
        return {name: row[name][0] for name in row.column_names}


def hive_view(inner: str, root: str) -> TableView:
    """What folders named ``key=value`` below ``root``, a slash behind it, say of a file in them."""
    below = inner.removeprefix(root).split("/")[:-1] if inner.startswith(root) else []
    parts = [HIVE_FOLDER.fullmatch(part) for part in below]
    constants = {
        unquote(part[1]): None if part[2] == _HIVE_NULL else unquote(part[2])
        for part in parts
        if part
    }
    return TableView(constants=constants)


def pack_rows(rows: np.ndarray) -> str:
    """Row numbers, int64 (n,), as text that :func:`unpack_rows` undoes."""
    if not len(rows):
        return ""
    steps = np.diff(np.unique(rows), prepend=0).astype("<i8")
    return base64.b64encode(zlib.compress(steps.tobytes())).decode()


def unpack_rows(packed: str) -> np.ndarray:
    """Row numbers, int64 (n,), in ascending order."""
    return np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(packed)), "<i8"))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
