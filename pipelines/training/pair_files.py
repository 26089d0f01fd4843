"""Pairs as files: our own output, or anyone's Parquet or CSV, read with bounded memory.

Out: a table ``anchor``, ``positive``, ``id`` and, where the files have them, ``negative`` (a hard
negative) and ``label``, all strings.
"""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import exists, join, list_files, open_filesystem

REQUIRED = ("anchor", "positive")
OPTIONAL = ("negative", "label")
PAIRS_FOLDER = "pairs"
_SUFFIXES = (".parquet", ".csv")

log = logging.getLogger(__name__)


def read_pairs(path: str, most: int, seed: int, label_column: str | None = None) -> pa.Table:
    """At most ``most`` pairs of a file or folder, chosen by a hash so that order does not matter.

    Rows in which a text is empty are left out, with a warning. Where there is no ``id``, an anchor
    is its own document.

    Args:
        path: a Parquet or CSV file, a folder of them, or the output of ``generate_pairs``.
        most: memory grows with this, not with the files.
        seed: decides which are chosen.
        label_column: column to take as ``label``.

    Raises:
        InputError: no such file, no pair in it, or a missing column.
    """
    found = open_pairs(path)
    wanted = pair_columns(found.schema.names, path, label_column)
    kept: list[pa.Table] = []
    rows, dropped = 0, 0
    for batch in found.to_batches(columns=wanted):
        table = plain_pairs(pa.table(batch))
        dropped += len(batch) - len(table)
        kept.append(table)
        rows += len(table)
        if rows > 4 * most:
            kept = [lowest(pa.concat_tables(kept), most, seed)]
            rows = len(kept[0])
    if dropped:
        log.warning("%s: %d rows in which a text is empty are left out", path, dropped)
    if not rows:
        raise InputError(f"{path} holds no pair: rows with an anchor and a positive are required")
    return lowest(pa.concat_tables(kept), most, seed)


def open_pairs(path: str) -> pads.Dataset:
    """The files at ``path`` as one dataset; :class:`InputError` where there is none."""
    paths = [path]
    if not path.endswith(_SUFFIXES):
        folder = join(path, PAIRS_FOLDER) if exists(join(path, PAIRS_FOLDER)) else path
        paths = [join(folder, name) for name in list_files(folder) if name.endswith(_SUFFIXES)]
    if not paths or not exists(paths[0]):
        raise InputError(f"no pairs at {path}: give a .parquet or .csv file, or a folder of them")
    kinds = {p.rpartition(".")[2] for p in paths}
    if len(kinds) > 1:
        raise InputError(f"{path} holds both Parquet and CSV files: give one kind of pairs")
    opened = [open_filesystem(p) for p in paths]
    text = pacsv.ConvertOptions(column_types=dict.fromkeys((*REQUIRED, *OPTIONAL), pa.string()))
    file_format = (
        pads.ParquetFileFormat()
        if kinds == {"parquet"}
        else pads.CsvFileFormat(convert_options=text)
    )
    try:
        return pads.dataset([p for _, p in opened], filesystem=opened[0][0], format=file_format)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"pairs at {path} cannot be read: {str(error).splitlines()[0]}") from error


def pair_columns(
    names: list[str], path: str, label_column: str | None
) -> dict[str, pads.Expression]:
    """Which columns to read, by the name they get."""
    for name in (*REQUIRED, *([label_column] if label_column else [])):
        if name not in names:
            raise InputError(
                f"{path} has no column {name!r}; its columns are {', '.join(names)}, and "
                f"{' and '.join(REQUIRED)} are required"
            )
    wanted = {name: pads.field(name) for name in (*REQUIRED, "id", "negative") if name in names}
    if label_column:
        wanted["label"] = pads.field(label_column)
    return wanted


def plain_pairs(table: pa.Table) -> pa.Table:
    """Columns as strings; rows with an empty text left out."""
    if "id" not in table.column_names:
        table = table.append_column("id", table["anchor"])
    columns = {name: table[name].cast(pa.large_string()) for name in table.column_names}
    table = pa.table(columns)
    for name in (*REQUIRED, "negative"):
        if name in table.column_names:
            length = pc.utf8_length(pc.utf8_trim_whitespace(table[name]))
            table = table.filter(pc.fill_null(pc.greater(length, 0), False))
    return table


def lowest(table: pa.Table, most: int, seed: int) -> pa.Table:
    """The ``most`` rows whose texts and seed hash lowest, in that order."""
    salt = str(seed).encode()
    rows = zip(table["anchor"].to_pylist(), table["positive"].to_pylist(), strict=True)
    digests = [
        hashlib.sha256(b"\0".join((salt, a.encode(), p.encode()))).digest()[:8] for a, p in rows
    ]
    order = np.argsort(np.frombuffer(b"".join(digests), ">u8"), kind="stable")[:most]
    return table.take(order)
