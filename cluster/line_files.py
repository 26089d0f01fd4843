"""JSON lines, CSV and TSV of vectors: which files these are, and their rows as Arrow batches.

What is a string in the first lines is read as one: by itself pyarrow takes "2026-01-02" for a time.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.json

from pipelines.runtime.arrow import open_csv
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import first_line

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
_DELIMITERS = ",\t;|"
_HEAD_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_lines(path: str) -> bool:
    """Whether a file's name is that of JSON lines, CSV or TSV, which may be compressed."""
    for packed in _COMPRESSIONS:
        path = path.removesuffix(packed)
    return path.endswith(LINE_SUFFIXES)


def read_lines(
    filesystem: pafs.FileSystem, path: str, names: Sequence[str], embedding: str
) -> Iterator[pa.RecordBatch]:
    """The rows of a file in order; columns ``names`` of CSV but for ``embedding`` are strings.

    Raises :class:`InputError` naming a file that cannot be read, or is a JSON array.
    """
    with _errors(path):
        with filesystem.open_input_stream(path, compression="detect") as stream:
            head = _read_head(stream)
        with filesystem.open_input_stream(path, compression="detect") as stream:
            if _is_json(path):
                known = pa.schema(_json_types(head, path, names, embedding))
                options = pa.json.ParseOptions(explicit_schema=known)
                yield from pa.json.open_json(stream, parse_options=options)
                return
            # strings, as in a corpus: an id may be 007, and a label NA
            strings = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            )
            yield from open_csv(stream, _delimiter_of(head, path, names), strings)


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def _is_json(path: str) -> bool:
    name = path.rpartition("/")[2]
    return ".json" in name or ".ndjson" in name


def _read_head(stream: Any) -> bytes:
    parts = []
    size = 0
    while size < _HEAD_BYTES and (block := stream.read(_HEAD_BYTES - size)):
        parts.append(block)
        size += len(block)
    return b"".join(parts).removeprefix(_BYTE_ORDER_MARK)


def _json_types(
    head: bytes, path: str, names: Sequence[str], embedding: str
) -> Iterator[tuple[str, pa.DataType]]:
    """The columns whose types are not left to pyarrow."""
    if head.lstrip().startswith(b"["):
        raise InputError(
            f"{path} is a JSON array; it must be JSON lines, one object a line: jq -c '.[]' FILE"
        )
    rows = []
    for line in head.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # such as the last one, cut off: pyarrow will tell of any other
            continue
    for name in dict.fromkeys([*names, embedding]):
        values = [row[name] for row in rows if isinstance(row, dict) and name in row]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {str}:
            yield name, pa.string()
        elif name == embedding and values:
            yield name, pa.list_(pa.float64())


def _delimiter_of(head: bytes, path: str, names: Sequence[str]) -> str:
    """What parts the header into the columns wanted; else what the file's name says."""
    header = head.decode("utf-8", "replace").splitlines()[:1]
    for delimiter in _DELIMITERS:
        if set(names) <= {name for row in csv.reader(header, delimiter=delimiter) for name in row}:
            return delimiter
    return "\t" if ".tsv" in path.rpartition("/")[2] else ","
