"""A version's documents as Parquet files, or as a FAISS index file with its map of ids."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import faiss
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.storage import atomic_output, join, list_files, make_folder, write_bytes
from pipelines.storing.columns import EMBEDDING, matrix
from pipelines.storing.vector_index import unit
from pipelines.storing.version import Version

Format = Literal["parquet", "faiss"]

FILE_BYTES = 128 << 20


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    rows: int
    files: tuple[str, ...]


def export(version: Version, output: str, kind: Format) -> Exported:
    """Write a version into a folder that is empty or missing; :class:`InputError` for any other.

    Every artifact of the version goes along, and ``export.json`` comes last: it says what of which
    store this is, and that it is whole.
    """
    found = list_files(output)
    if found:
        raise InputError(
            f"--output {output} is not empty (it holds {found[0]!r}): name a new folder"
        )
    exported = (
        _export_parquet(version, output) if kind == "parquet" else _export_faiss(version, output)
    )
    for name in version.artifacts():
        write_bytes(join(output, name), version.read(name))
    content = {
        "store": version.store,
        "version": version.number,
        "created_at": version.record.created_at,
        "encoder_fingerprint": version.record.fingerprint,
        "rows": exported.rows,
        "files": list(exported.files),
    }
    write_bytes(join(output, "export.json"), json.dumps(content, indent=2).encode())
    return exported


def _export_parquet(version: Version, output: str) -> Exported:
    """``documents/part-NNNNN.parquet`` with every column, about 128 MiB each."""
    make_folder(join(output, "documents"))
    files: list[str] = []
    pending: list[pa.RecordBatch] = []
    rows = 0

    def flush() -> None:
        name = f"documents/part-{len(files):05d}.parquet"
        with atomic_output(join(output, name)) as sink:
            pq.write_table(pa.Table.from_batches(pending, version.schema), sink)
        files.append(name)
        pending.clear()

    for batch in version.batches():
        pending.append(batch)
        rows += batch.num_rows
        if sum(part.nbytes for part in pending) >= FILE_BYTES:
            flush()
    if pending or not files:
        flush()
    return Exported(rows, tuple(files))


def _export_faiss(version: Version, output: str) -> Exported:
    """``index.faiss``, an exact inner-product index of unit vectors, and ``ids.parquet``.

    Row n of ``ids.parquet`` (columns ``position``, ``id``) is vector n of the index.
    """
    make_folder(output)
    index = faiss.IndexFlatIP(version.schema.field(EMBEDDING).type.list_size)
    ids = []
    for batch in version.batches(["id", EMBEDDING]):
        index.add(unit(matrix(batch.column(EMBEDDING))))
        ids.append(batch.column("id"))
    column = pa.chunked_array(ids, version.schema.field("id").type)
    positions = pa.array(range(len(column)), pa.int64())
    with atomic_output(join(output, "ids.parquet")) as sink:
        pq.write_table(pa.table({"position": positions, "id": column}), sink)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.faiss")
        faiss.write_index(index, str(path))
        write_bytes(join(output, "index.faiss"), path.read_bytes())
    return Exported(len(column), ("index.faiss", "ids.parquet"))
