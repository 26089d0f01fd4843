"""The result: documents joined with their vectors, in Parquet files of even size.

In: ``documents/`` and ``vectors/`` under the work folder. Out: ``embeddings/part-*.parquet`` and
``rejected/part-*.parquet``. Each file appears whole, named by its place in the plan.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.documents import REJECTED_SCHEMA, rejected_table
from pipelines.embedding.encode import read_vectors
from pipelines.embedding.keys import Chunk
from pipelines.runtime.files import (
    atomic_output,
    join,
    list_files,
    make_folder,
    read_bytes,
    remove_files,
    write_bytes,
)
from pipelines.runtime.segments import bytes_to_table, read_segment, table_to_bytes
from pipelines.runtime.units import Receipt, run_stage

ROW_GROUP_BYTES = 32 << 20
SLICE_ROWS = 8192
_SOURCES_A_FILE = 500
_ROW_OVERHEAD_BYTES = 32


@dataclass(frozen=True)
class ResultSettings:
    """What every task has to know beside its part.

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
            "shoal.encoder_fingerprint": self.fingerprint,
            "shoal.key": "encoder_fingerprint, text_sha256",
        }
        return pa.schema(fields, metadata=metadata)


def write_result(settings: ResultSettings, chunks: Sequence[Chunk]) -> dict[str, int]:
    """Write all files of the result; rows, files, failed texts, their rows, rejected, tokens."""
    for folder in ("embeddings", "rejected"):
        make_folder(join(settings.output, folder))
    parts = plan_parts(chunks, settings.row_bytes, settings.target_bytes)
    receipts = run_stage(settings.work, "parts", parts, functools.partial(write_part, settings))
    function = functools.partial(write_rejected, settings.work, settings.output)
    rejects = run_stage(settings.work, "rejects", plan_rejected(settings.work), function)
    for folder in ("embeddings", "rejected"):
        remove_temporary_files(join(settings.output, folder))
    total = {
        name: sum(receipt[name] for receipt in receipts.values())
        for name in ("rows", "failed_rows", "failed_texts", "tokens")
    }
    rejected = sum(receipt["rows"] for receipt in rejects.values())
    return {**total, "files": len(parts), "rejected": rejected}


def plan_parts(
    chunks: Sequence[Chunk], row_bytes: int, target_bytes: int
) -> dict[str, list[list[Any]]]:
    """Output files of even size: for each, the runs of documents [chunk, start, stop) it holds.

    Args:
        chunks: all chunks in order.
        row_bytes: size of one vector.
        target_bytes: about how large a file should be.
    """
    sizes = [c.documents * (row_bytes + _ROW_OVERHEAD_BYTES) + c.documents_bytes for c in chunks]
    count = max(1, round(sum(sizes) / target_bytes))
    share = max(1.0, sum(sizes) / count)
    parts: list[list[list[Any]]] = [[] for _ in range(count)]
    before = 0
    for chunk, size in zip(chunks, sizes, strict=True):
        documents, start = chunk.documents, 0
        first, last = int(before // share), int((before + size - 1) // share)
        for number in range(first, min(last, count - 1) + 1):
            stop = round(((number + 1) * share - before) / size * documents)
            stop = documents if number >= min(last, count - 1) else min(documents, stop)
            if stop > start:
                parts[number].append([chunk.name, start, stop])
            start = max(start, stop)
        before += size
    return {f"part-{number:05d}": runs for number, runs in enumerate(parts)}


def write_part(settings: ResultSettings, name: str, unit: Sequence[Sequence[Any]]) -> Receipt:
    """Write one file of ``embeddings/``; documents without a vector go to ``rejected/``."""
    rejected: list[pa.Table] = []
    receipt = {"rows": 0, "failed_rows": 0, "failed_texts": 0, "tokens": 0}
    path = join(settings.output, "embeddings", f"{name}.parquet")
    with atomic_output(path) as sink, _open_writer(sink, settings.schema) as writer:
        pending: list[pa.Table] = []
        for chunk, start, stop in unit:
            documents, vectors, found = _read_run(settings, chunk, start, stop)
            if start == 0:
                receipt["tokens"] += found["tokens"]
                receipt["failed_texts"] += found["failed"]
            for table, lost in _join(settings, documents, vectors):
                pending.append(table)
                rejected.append(lost)
                receipt["rows"] += len(table)
                if sum(t.nbytes for t in pending) >= ROW_GROUP_BYTES:
                    _write_group(writer, pending)
                    pending = []
        _write_group(writer, pending)
    lost = pa.concat_tables(rejected) if rejected else rejected_table([])
    receipt["failed_rows"] = len(lost)
    if len(lost):
        lost_path = join(settings.work, "rejected", f"{name}.arrow")
        write_bytes(lost_path, table_to_bytes(lost), create_folder=False)
    return receipt


def plan_rejected(work: str) -> dict[str, list[str]]:
    """Files of ``rejected/``: for each, the work files that it joins; one at least."""
    found = [n for n in list_files(join(work, "rejected")) if not n.startswith(".")]
    groups = [found[i : i + _SOURCES_A_FILE] for i in range(0, len(found), _SOURCES_A_FILE)]
    return {f"part-{number:05d}": group for number, group in enumerate(groups or [[]])}


def write_rejected(work: str, output: str, name: str, unit: Sequence[str]) -> Receipt:
    """Write one file of ``rejected/``."""
    rows = 0
    path = join(output, "rejected", f"{name}.parquet")
    with atomic_output(path) as sink, pq.ParquetWriter(sink, REJECTED_SCHEMA) as writer:
        for source in unit:
            table = bytes_to_table(read_bytes(join(work, "rejected", source)))
            writer.write_table(table.cast(REJECTED_SCHEMA))
            rows += len(table)
    return {"rows": rows}


def remove_temporary_files(folder: str) -> None:
    """Delete what killed writers left of files that never appeared."""
    hidden = [name for name in list_files(folder) if name.rpartition("/")[2].startswith(".")]
    remove_files([join(folder, name) for name in hidden])


def _read_run(
    settings: ResultSettings, chunk: str, start: int, stop: int
) -> tuple[pa.Table, pa.FixedSizeListArray, dict[str, int]]:
    partition, number = chunk.rsplit("-", 1)
    path = join(settings.work, "documents", f"{partition}.documents")
    documents = read_segment(path, int(number))
    if documents is None:
        raise RuntimeError(f"{path} has no chunk {number}")
    vectors, found = read_vectors(settings.work, chunk)
    return documents.slice(start, stop - start), vectors, found


def _join(
    settings: ResultSettings, documents: pa.Table, vectors: pa.FixedSizeListArray
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Rows of the result and rejected rows, some thousands of documents at a time."""
    for start in range(0, len(documents), SLICE_ROWS):
        some = documents.slice(start, SLICE_ROWS).combine_chunks()
        places = some["place"].to_numpy()
        valid = vectors.is_valid().to_numpy(zero_copy_only=False)[places]
        lost = [
            (row_id, "its vector is not finite", "")
            for row_id in some["id"].filter(pa.array(~valid)).to_pylist()
        ]
        some = some.filter(pa.array(valid))
        found = vectors.take(pa.array(places[valid]))
        hashes = [digest.hex() for digest in some["text_sha256"].to_pylist()]
        kept = [some[f"kept.{name}"].cast(kind) for name, kind in settings.kept_types.items()]
        # from the values: a nullable vector column, once cast, would stay nullable
        embedding = pa.FixedSizeListArray.from_arrays(found.flatten(), settings.dimension)
        columns = [some["id"].cast(settings.id_type), *kept, pa.array(hashes), embedding]
        yield pa.table(columns, schema=settings.schema), rejected_table(lost)


def _open_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    # vectors neither repeat nor compress: trying costs time and a dictionary
    names = [name for name in schema.names if name != "embedding"]
    compression = dict.fromkeys(names, "zstd") | {"embedding.list.element": "none"}
    return pq.ParquetWriter(sink, schema, compression=compression, use_dictionary=names)


def _write_group(writer: pq.ParquetWriter, tables: list[pa.Table]) -> None:
    if tables:
        table = pa.concat_tables(tables)
        writer.write_table(table, row_group_size=max(1, len(table)))
