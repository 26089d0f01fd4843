"""Vectors to the files of the result: a file a chunk first, then files of even size.

In: a chunk's documents with their vectors, and the documents that take the vector of another. Out,
under the work folder: ``vectors/NAME.parquet`` with rows as the result has them; at the end
``embeddings/part-*.parquet`` and ``rejected/part-*.parquet``. A chunk's file that is large enough
is a file of the result as it is; small ones are joined. Each file appears whole, under a name that
says what it holds.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.corpus.documents import REJECTED_SCHEMA, rejected_table
from pipelines.embedding.chunks import FOLDERS, STAGE, Groups, chunk_name
from pipelines.embedding.keys import REPEAT
from pipelines.runtime.arrow import FINGERPRINT_KEY, column_to_vectors, vectors_to_column
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    atomic_output,
    in_threads,
    join,
    list_files,
    make_folder,
    open_filesystem,
    read_bytes,
    read_table,
    remove_files,
    with_retries,
    write_bytes,
)
from pipelines.runtime.segments import bytes_to_table, read_segment, table_to_bytes
from pipelines.runtime.units import Receipt, not_shared, read_receipts, run_stage

ROW_GROUP_BYTES = 32 << 20
NOT_FINITE = "its vector is not finite"
_SOURCES_A_FILE = 500
_LARGE_ENOUGH = 0.75
_CHUNK = b"shoal.chunk"


@dataclass(frozen=True)
class ResultSettings:
    """What everyone who writes rows has to know.

    ``kept_types`` gives the kept columns and their types, in order; ``names`` what the result
    calls those that it renames.
    """

    work: str
    output: str
    fingerprint: str
    id_type: pa.DataType
    kept_types: dict[str, pa.DataType]
    value_type: pa.DataType
    dimension: int
    target_bytes: int
    names: dict[str, str] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        """Size of one vector."""
        return self.dimension * self.value_type.bit_width // 8

    @property
    def schema(self) -> pa.Schema:
        """Schema of ``embeddings/``: id, kept columns, text_sha256, embedding."""
        fields = [
            pa.field("id", self.id_type, nullable=False),
            *(pa.field(self.names.get(n, n), kind) for n, kind in self.kept_types.items()),
            pa.field("text_sha256", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(self.value_type, self.dimension), nullable=False),
        ]
        metadata = {
            FINGERPRINT_KEY: self.fingerprint,
            "shoal.key": "encoder_fingerprint, text_sha256",
        }
        return pa.schema(fields, metadata=metadata)


@dataclass(frozen=True)
class Chunk:
    """A file of rows with vectors below ``vectors/``, and what making it took."""

    name: str
    rows: int
    size_bytes: int
    texts: int = 0
    """That were encoded."""
    tokens: int = 0
    padded_tokens: int = 0
    failed: int = 0
    """Texts whose vector is not finite."""
    expected: int = 0
    """Tokens, as they were estimated."""


def chunk_names(work: str) -> list[str]:
    """Names of the files of vectors that are there."""
    names = list_files(join(work, "vectors"))
    return [n.removesuffix(".parquet") for n in names if n.endswith(".parquet") and n[0] != "."]


def find_chunks(work: str) -> dict[str, Chunk]:
    """What is known of the files of vectors that are there, by name."""
    paths = [join(work, "vectors", f"{name}.parquet") for name in chunk_names(work)]
    return {chunk.name: chunk for chunk in in_threads(_read_chunk, paths)}


def _read_chunk(path: str) -> Chunk:
    filesystem, inner = open_filesystem(path)
    metadata = with_retries(
        lambda: pq.read_metadata(inner, filesystem=filesystem), path, reads=True
    )
    return Chunk(**json.loads(metadata.metadata[_CHUNK]))


def write_chunk(
    settings: ResultSettings,
    name: str,
    documents: pa.Table,
    vectors: np.ndarray,
    valid: np.ndarray,
    **took: int,
) -> Chunk:
    """Write a chunk's documents with their vectors; those without one go to ``rejected/``.

    Args:
        settings: how rows look.
        name: the chunk's name.
        documents: ``id``, ``text_sha256`` and kept columns, one row a text.
        vectors: float32 or float16 (n, d).
        valid: bool (n,), which of the vectors are finite.
        took: ``texts``, ``tokens``, ``padded_tokens`` and ``expected`` of :class:`Chunk`.
    """
    lost = documents["id"].filter(pa.array(~valid)).to_pylist()
    if lost:
        path = join(settings.work, "rejected", f"vectors-{name}.arrow")
        table = rejected_table([(row_id, NOT_FINITE, "") for row_id in lost])
        write_bytes(path, table_to_bytes(table), create_folder=False)
    rows = result_rows(settings, documents.filter(pa.array(valid)), vectors[valid])
    return write_rows(settings, name, [rows], failed=len(lost), **took)


def result_rows(settings: ResultSettings, documents: pa.Table, vectors: np.ndarray) -> pa.Table:
    """Documents and their vectors, (n, d), as the result has them."""
    hashes = [digest.hex() for digest in documents["text_sha256"].to_pylist()]
    kept = [documents[f"kept.{name}"].cast(kind) for name, kind in settings.kept_types.items()]
    embedding = vectors_to_column(vectors, settings.value_type)
    columns = [
        documents["id"].cast(settings.id_type),
        *kept,
        pa.array(hashes, pa.string()),
        embedding,
    ]
    return pa.table(columns, schema=settings.schema)


def write_rows(
    settings: ResultSettings, name: str, tables: Sequence[pa.Table], **took: int
) -> Chunk:
    """Write rows as one file below ``vectors/``."""
    rows = sum(map(len, tables))
    size = sum(table.nbytes for table in tables)
    chunk = Chunk(name, rows, size, **took)
    sink = pa.BufferOutputStream()
    with _open_writer(sink, settings.schema) as writer:
        _write_groups(writer, tables)
        writer.add_key_value_metadata({_CHUNK.decode(): json.dumps(asdict(chunk))})
    try:
        path = join(settings.work, "vectors", f"{name}.parquet")
        write_bytes(path, sink.getvalue(), create_folder=False)
    except FileNotFoundError as error:
        raise InputError(not_shared(settings.work)) from error
    return chunk


def read_rows(work: str, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a file of vectors."""
    return read_table(join(work, "vectors", f"{name}.parquet"), columns)


def write_result(
    settings: ResultSettings,
    groups: Groups,
    chunks: Mapping[str, Chunk],
    rejected: Sequence[str] = (),
) -> dict[str, int]:
    """Write all files of the result; rows, files, failed texts, their rows, rejected, tokens.

    ``rejected`` are further files of rejected rows, beside those below the work folder.
    """
    for folder in ("embeddings", "rejected"):
        make_folder(join(settings.output, folder))
    lent = lend_vectors(settings, groups)
    others = [chunk for name, chunk in find_chunks(settings.work).items() if name not in chunks]
    parts = settle_parts(settings, [*chunks.values(), *others])
    receipts = run_stage(settings.work, "parts", parts, functools.partial(write_part, settings))
    function = functools.partial(write_rejected, settings.output)
    sources = plan_rejected(settings.work, rejected)
    rejects = run_stage(settings.work, "rejects", sources, function)
    for folder in ("embeddings", "rejected"):
        remove_temporary_files(join(settings.output, folder))
    failed = sum(chunk.failed for chunk in chunks.values())
    return {
        "rows": sum(receipt["rows"] for receipt in receipts.values()),
        "files": len(parts),
        "failed_texts": failed,
        "failed_rows": failed + sum(receipt["failed_rows"] for receipt in lent.values()),
        "tokens": sum(chunk.tokens for chunk in chunks.values()),
        "rejected": sum(receipt["rows"] for receipt in rejects.values()),
    }


def lend_vectors(settings: ResultSettings, groups: Groups) -> dict[str, Receipt]:
    """Write the rows of documents that repeat a text, with the vector of the one that owns it."""
    reads = read_receipts(join(settings.work, STAGE), groups.units)
    folder = FOLDERS[REPEAT]
    waiting = [name for receipt in reads.values() for name in receipt["aside"].get(folder, [])]
    units: dict[str, Any] = {}
    if waiting:
        for bucket in range(max(groups.buckets) + 1):
            owners = groups.of_bucket(bucket)
            units[f"repeats-{bucket:05d}"] = {
                "bucket": bucket,
                "chunks": [chunk_name(n, i) for n in owners for i in range(reads[n]["chunks"])],
                "waiting": waiting,
            }
    return run_stage(settings.work, "lent", units, functools.partial(lend_bucket, settings))


def lend_bucket(settings: ResultSettings, name: str, unit: Mapping[str, Any]) -> Receipt:
    """Write the rows of one bucket of repeats."""
    folder, bucket = FOLDERS[REPEAT], unit["bucket"]
    paths = [join(settings.work, folder, f"{file}.arrow") for file in unit["waiting"]]
    wanted: set[bytes] = set()
    for path in paths:
        documents = read_segment(path, bucket)
        if documents is not None:
            wanted.update(documents["text_sha256"].to_pylist())
    if not wanted:
        return {"rows": 0, "failed_rows": 0}
    hashes, vectors = _owned_vectors(settings, unit["chunks"], wanted)
    lost: list[str] = []

    def rows() -> Iterator[pa.Table]:
        for path in paths:
            documents = read_segment(path, bucket)
            if documents is None:
                continue
            place = pc.index_in(documents["text_sha256"], value_set=hashes)
            there = place.is_valid()
            lost.extend(documents["id"].filter(pc.invert(there)).to_pylist())
            found = place.drop_null().to_numpy()
            yield result_rows(settings, documents.filter(there), vectors[found])

    count = write_in_files(settings, name, rows())
    table = rejected_table([(row_id, NOT_FINITE, "") for row_id in lost])
    path = join(settings.work, "rejected", f"vectors-{name}.arrow")
    write_bytes(path, table_to_bytes(table), create_folder=False)
    return {"rows": count, "failed_rows": len(lost)}


def write_in_files(settings: ResultSettings, name: str, tables: Iterable[pa.Table]) -> int:
    """Write rows as files below ``vectors/`` of no more than the target; how many rows."""
    rows = number = size = 0
    pending: list[pa.Table] = []
    for whole in tables:
        step = max(1, ROW_GROUP_BYTES // settings.row_bytes)
        for table in (whole.slice(start, step) for start in range(0, len(whole), step)):
            if pending and size + table.nbytes > settings.target_bytes:
                write_rows(settings, f"{name}-{number:04d}", pending)
                pending, size, number = [], 0, number + 1
            pending.append(table)
            size += table.nbytes
            rows += len(table)
    if pending:
        write_rows(settings, f"{name}-{number:04d}", pending)
    return rows


def _owned_vectors(
    settings: ResultSettings, chunks: Sequence[str], wanted: set[bytes]
) -> tuple[pa.Array, np.ndarray]:
    """Text hashes, binary, and vectors (n, d) of the ``wanted`` texts that chunks hold."""
    names = pa.array([digest.hex() for digest in wanted], pa.string())
    hashes: list[bytes] = []
    kind = settings.value_type.to_pandas_dtype()
    parts = [np.empty((0, settings.dimension), kind)]
    for chunk in chunks:
        table = read_rows(settings.work, chunk, ("text_sha256", "embedding"))
        table = table.filter(pc.is_in(table["text_sha256"], value_set=names))
        hashes += map(bytes.fromhex, table["text_sha256"].to_pylist())
        parts.append(column_to_vectors(table["embedding"], kind))
    return pa.array(hashes, pa.binary(32)), np.concatenate(parts)


def settle_parts(settings: ResultSettings, chunks: Sequence[Chunk]) -> dict[str, list[list[Any]]]:
    """The files of the result, as an earlier run has planned them or as :func:`plan_parts` does."""
    path = join(settings.work, "parts.json")
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        parts = plan_parts(sorted(chunks, key=lambda chunk: chunk.name), settings.target_bytes)
        write_bytes(path, json.dumps(parts).encode())
        return parts


def plan_parts(chunks: Sequence[Chunk], target_bytes: int) -> dict[str, list[list[Any]]]:
    """Files of the result: for each, the runs of rows [chunk, start, stop) it holds.

    A chunk of nearly ``target_bytes`` is a file by itself; the others share files of even size.
    """
    large = [chunk for chunk in chunks if chunk.size_bytes >= _LARGE_ENOUGH * target_bytes]
    small = [chunk for chunk in chunks if chunk.size_bytes < _LARGE_ENOUGH * target_bytes]
    parts = [[[chunk.name, 0, chunk.rows]] for chunk in large]
    if any(chunk.rows for chunk in small) or not parts:
        parts += _share_files(small, target_bytes)
    return {f"part-{number:05d}": runs for number, runs in enumerate(parts)}


def _share_files(chunks: Sequence[Chunk], target_bytes: int) -> list[list[list[Any]]]:
    total = sum(chunk.size_bytes for chunk in chunks)
    count = max(1, round(total / target_bytes))
    share = max(1.0, total / count)
    parts: list[list[list[Any]]] = [[] for _ in range(count)]
    before = 0
    for chunk in chunks:
        rows, size, start = chunk.rows, max(1, chunk.size_bytes), 0
        first, last = int(before // share), int((before + size - 1) // share)
        for number in range(min(first, count - 1), min(last, count - 1) + 1):
            stop = round(((number + 1) * share - before) / size * rows)
            stop = rows if number >= min(last, count - 1) else min(rows, stop)
            if stop > start:
                parts[number].append([chunk.name, start, stop])
            start = max(start, stop)
        before += chunk.size_bytes
    return parts


def write_part(settings: ResultSettings, name: str, unit: Sequence[Sequence[Any]]) -> Receipt:
    """Write one file of ``embeddings/``."""
    path = join(settings.output, "embeddings", f"{name}.parquet")
    sources = [join(settings.work, "vectors", f"{chunk}.parquet") for chunk, _, _ in unit]
    rows = sum(stop - start for _, start, stop in unit)
    if len(unit) == 1 and _read_chunk(sources[0]).rows == rows:
        copy_file(sources[0], path)
        return {"rows": rows}
    with atomic_output(path) as sink, _open_writer(sink, settings.schema) as writer:
        tables = (
            read_table(source).slice(start, stop - start)
            for source, (_, start, stop) in zip(sources, unit, strict=True)
        )
        _write_groups(writer, tables)
    return {"rows": rows}


def copy_file(source: str, target: str) -> None:
    """Give a finished file a second name: a link on a local disk, a copy by an object store."""
    filesystem, inner = open_filesystem(source)
    destination = open_filesystem(target)[1]
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with_retries(lambda: filesystem.copy_file(inner, destination), source)
        return
    Path(destination).unlink(missing_ok=True)
    try:
        os.link(inner, destination)
    except OSError:  # a file system without links
        with atomic_output(target) as sink, Path(inner).open("rb") as stream:
            shutil.copyfileobj(stream, sink)


def plan_rejected(work: str, others: Sequence[str]) -> dict[str, list[str]]:
    """Files of ``rejected/``: for each, the files that it joins; one at least."""
    folder = join(work, "rejected")
    mine = [join(folder, name) for name in list_files(folder) if not name.startswith(".")]
    found = [*others, *mine]
    groups = [found[i : i + _SOURCES_A_FILE] for i in range(0, len(found), _SOURCES_A_FILE)]
    return {f"part-{number:05d}": group for number, group in enumerate(groups or [[]])}


def write_rejected(output: str, name: str, unit: Sequence[str]) -> Receipt:
    """Write one file of ``rejected/``."""
    rows = 0
    path = join(output, "rejected", f"{name}.parquet")
    with atomic_output(path) as sink, pq.ParquetWriter(sink, REJECTED_SCHEMA) as writer:
        for source in unit:
            table = bytes_to_table(read_bytes(source))
            writer.write_table(table.cast(REJECTED_SCHEMA))
            rows += len(table)
    return {"rows": rows}


def remove_temporary_files(folder: str) -> None:
    """Delete what killed writers left of files that never appeared."""
    hidden = [name for name in list_files(folder) if name.rpartition("/")[2].startswith(".")]
    remove_files([join(folder, name) for name in hidden])


def _open_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    # vectors neither repeat nor compress: trying costs time and a dictionary
    names = [name for name in schema.names if name != "embedding"]
    compression = dict.fromkeys(names, "zstd") | {"embedding.list.element": "none"}
    return pq.ParquetWriter(sink, schema, compression=compression, use_dictionary=names)


def _write_groups(writer: pq.ParquetWriter, tables: Iterable[pa.Table]) -> None:
    """Write tables in row groups of about :data:`ROW_GROUP_BYTES`."""
    pending: list[pa.Table] = []
    size = 0
    for table in tables:
        if len(table):
            pending.append(table.cast(writer.schema))
            size += table.nbytes
        if size >= ROW_GROUP_BYTES:
            _write_group(writer, pending)
            pending, size = [], 0
    if pending:
        _write_group(writer, pending)


def _write_group(writer: pq.ParquetWriter, tables: list[pa.Table]) -> None:
    table = pa.concat_tables(tables)
    writer.write_table(table, row_group_size=max(1, len(table)))
