"""What was detected of a corpus, for people: a line for each kind of file, and sample rows.

In: the files of a corpus, looked into. Out: a table of short strings.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.corpus.columnar import TYPED_FORMATS, columns_of
from pipelines.corpus.dialects import describe_dialect
from pipelines.corpus.documents import check_rows
from pipelines.corpus.files import Columns, CorpusFile
from pipelines.corpus.readers import read_shard

SAMPLE_ROWS = 3
_SHOWN_CHARACTERS = 60
_SHOWN_FILES = 3


def describe_corpus(
    files: Sequence[CorpusFile], columns: Columns, passed_over: Mapping[str, str]
) -> dict[str, str]:
    """Each kind of file with its columns and its first rows, then what is not read and why."""
    readable = [file for file in files if file.readable]
    kinds: dict[str, list[CorpusFile]] = {}
    for file in readable:
        kinds.setdefault(_kind_of(file), []).append(file)
    table = {}
    for kind, some in kinds.items():
        table[kind] = f"{len(some):,} files; {_columns(some, columns)}"
        for number, row in enumerate(_sample(some[0], columns), 1):
            table[f"{kind}, row {number}"] = row
    for file in [file for file in files if file.problem][:_SHOWN_FILES]:
        table[f"unreadable {file.path}"] = str(file.problem)
    for reason, count in Counter(passed_over.values()).items():
        first = next(path for path, why in passed_over.items() if why == reason)
        table[f"passed over: {reason}"] = f"{count:,} files, such as {first}"
    return table


def _kind_of(file: CorpusFile) -> str:
    """Format, compression, encoding and dialect, and whether a table holds the file."""
    parts = [file.format, file.compression or ""]
    parts.append("" if file.encoding == "utf-8" else file.encoding)
    parts.append(describe_dialect(file.dialect) if file.dialect else "")
    parts.append(file.view.table)
    if file.view.deleted:
        parts.append("without deleted rows")
    return " ".join(part for part in parts if part)


def _columns(files: Sequence[CorpusFile], columns: Columns) -> str:
    first = files[0]
    types: dict[str, Any] = {}
    if first.format in TYPED_FORMATS:
        schema = columns_of(first).schema
        types = dict(zip(schema.names, schema.types, strict=True))
    names = dict.fromkeys(name for file in files for name in file.columns)
    shown = [f"{name} {types[name]}" if name in types else name for name in names]
    folders = dict.fromkeys(n for file in files for n in file.view.constants if n not in names)
    by_place = f"; by its place: {', '.join(folders)}" if folders else ""
    hashed = sum(columns.id_of(file) is None for file in files)
    ids = f"; {hashed:,} without an id column: hashes of the texts" if hashed else ""
    return f"columns {', '.join(shown)}{by_place}{ids}"


def _sample(file: CorpusFile, columns: Columns) -> Iterable[str]:
    with contextlib.suppress(OSError, pa.ArrowException):
        batches = itertools.chain.from_iterable(read_shard(s, columns) for s in file.shards()[:1])
        rows = itertools.chain.from_iterable(check_rows(batch) for batch in batches)
        for row in itertools.islice(rows, SAMPLE_ROWS):
            text = " ".join(row.text.split())
            cut = text[:_SHOWN_CHARACTERS] + ("…" if len(text) > _SHOWN_CHARACTERS else "")
            shown_id = "hash of its text" if row.id is None else row.id
            yield f"rejected: {row.reason}" if row.reason else f"{shown_id}: {cut}"
