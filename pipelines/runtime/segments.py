"""Files of Arrow tables in numbered segments, each readable alone with one ranged read.

A shuffle writes one such file a task, with a segment a partition; a reduce task reads its own
segment of every file. Layout: magic, number of segments, segments + 1 byte offsets (int64, little
endian, counted from the start of the file), then one compressed Arrow IPC stream a segment. An
empty segment takes no bytes. Unlike Parquet's footer, the index costs 8 bytes a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.runtime.files import open_filesystem, with_retries, write_bytes

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
