"""Files of Arrow tables in numbered segments, each readable alone with one ranged read.

Rows go to segments by digests of what they are shuffled by (:func:`partition_of`).

A shuffle writes one such file a task, with a segment a partition; a reduce task reads its own
segment of every file. Layout: magic, number of segments, segments + 1 byte offsets (int64, little
endian, counted from the start of the file), then one compressed Arrow IPC stream a segment. An
empty segment takes no bytes. Unlike Parquet's footer, the index costs 8 bytes a segment.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.runtime.files import open_filesystem, with_retries, write_bytes

DIGEST_BYTES = 16
_MAGIC = b"SHOALSEG"
_COUNT_BYTES = 8


def write_segments(
    path: str, segments: Sequence[pa.Table | None], compression: str | None = "zstd"
) -> None:
    """Write the tables, in order, as one file that appears whole; None or no rows is empty.

    Vectors hardly become smaller by ``compression``, which then takes as long as all else.
    """
    bodies = [table_to_bytes(table, compression) if table else b"" for table in segments]
    start = len(_MAGIC) + _COUNT_BYTES + 8 * (len(bodies) + 1)
    offsets = start + np.cumsum([0, *(len(body) for body in bodies)], dtype="<i8")
    count = np.array([len(bodies)], dtype="<i8")
    content = b"".join([_MAGIC, count.tobytes(), offsets.tobytes(), *bodies])
    write_bytes(path, content, create_folder=False)


def read_segment(path: str, index: int) -> pa.Table | None:
    """Segment ``index`` of a file, or None where it is empty."""
    filesystem, inner = open_filesystem(path)

    def read() -> bytes:
        with filesystem.open_input_file(inner) as stream:
            place = len(_MAGIC) + _COUNT_BYTES + 8 * index
            start, stop = np.frombuffer(stream.read_at(16, place), dtype="<i8").tolist()
            return stream.read_at(stop - start, start) if stop > start else b""

    body = with_retries(read, path, reads=True)
    return bytes_to_table(body) if body else None


def table_to_bytes(table: pa.Table, compression: str | None = "zstd") -> bytes:
    """A table as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def bytes_to_table(data: bytes | pa.Buffer) -> pa.Table:
    """Undo :func:`table_to_bytes`."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def digest_matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint8 (n, width): a fixed-size binary column without nulls."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def digest_column(digests: np.ndarray) -> pa.Array:
    """The first bytes of digests, uint8 (n, width >= 16), as a column of 16 bytes each."""
    data = np.ascontiguousarray(digests[:, :DIGEST_BYTES])
    return pa.Array.from_buffers(
        pa.binary(DIGEST_BYTES), len(data), [None, pa.py_buffer(data.tobytes())]
    )


def digest_ids(ids: Sequence[str]) -> pa.Array:
    """A digest of each id."""
    found = (hashlib.blake2b(row_id.encode(), digest_size=DIGEST_BYTES).digest() for row_id in ids)
    return pa.array(found, pa.binary(DIGEST_BYTES))


def split_by(table: pa.Table, partition: np.ndarray, partitions: int) -> list[pa.Table]:
    """The rows of each partition, in their order; ``partition`` is int64 (n,)."""
    order = np.argsort(partition, kind="stable")
    table = table.take(order)
    bounds = np.searchsorted(partition[order], np.arange(partitions + 1))
    return [table.slice(start, stop - start) for start, stop in itertools.pairwise(bounds)]


def partition_of(digests: np.ndarray, partitions: int) -> np.ndarray:
    """int64 (n,): the partition that each digest, uint8 (n, width), belongs to."""
    leading = np.ascontiguousarray(digests[:, :8]).view("<u8").reshape(-1)
    return (leading % np.uint64(partitions)).astype(np.int64)
