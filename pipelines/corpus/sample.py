"""A sample of a corpus that neither the order of its files nor that of its rows can sway.

In: files of documents. Out: a table of ``id``, ``text`` and, where asked for, ``label`` of those
documents whose texts hash lowest. One task a shard of the corpus, each of which keeps no more
documents than are wanted in all.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.corpus.documents import read_documents, require_readable
from pipelines.corpus.files import Columns, CorpusOptions, Shard, find_files
from pipelines.corpus.readers import inspect_files
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import in_threads, join, make_folder, read_bytes, write_bytes
from pipelines.runtime.segments import bytes_to_table, table_to_bytes
from pipelines.runtime.units import Receipt, configure_ray_data, run_stage

SHARD_BYTES = 32 << 20
_CHUNK_ROWS = 65536
SCHEMA = pa.schema(
    [
        ("digest", pa.binary(32)),
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("label", pa.string()),
    ]
)


@dataclass(frozen=True)
class Sample:
    """Documents drawn from a corpus.

    ``documents`` has the columns ``id``, ``text``, ``label`` (null without a label column);
    ``read`` counts the corpus's rows, ``left_out`` why some of them were none to draw from.
    """

    documents: pa.Table
    read: int
    left_out: dict[str, int]

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return self.documents["text"].to_pylist()

    @property
    def labels(self) -> list[str]:
        """The documents' labels."""
        return self.documents["label"].to_pylist()


@dataclass(frozen=True)
class SampleSettings:
    """What to draw: documents at most, None for all; whether each must have a label."""

    columns: Columns
    documents: int | None
    seed: int
    labelled: bool
    distinct: bool


def sample_corpus(
    corpus: str,
    work: str,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    label_column: str | None = None,
    documents: int | None = None,
    seed: int = 0,
    distinct: bool = True,
    options: CorpusOptions | None = None,
) -> Sample:
    """Draw documents from a corpus.

    Args:
        corpus: file, folder or glob, local or remote.
        work: folder for unfinished work, which a repeated call goes on with.
        text_column: column of the text.
        id_column: column of the id, None for ``id`` where a file has it.
        label_column: column of the label, None for no labels; rows without one are left out.
        documents: how many; None for all.
        seed: another one draws other documents.
        distinct: draw each text once.
        options: how the corpus is read where its files do not say so themselves.

    Raises :class:`InputError` for a corpus that cannot be read or has no document.
    """
    configure_ray_data()
    keep = () if label_column is None else (label_column,)
    settings = SampleSettings(
        Columns(text_column, id_column, keep), documents, seed, label_column is not None, distinct
    )
    files = inspect_files(
        find_files(corpus, options), settings.columns, shard_bytes=SHARD_BYTES, options=options
    )
    require_readable(files)
    shards = {shard.name: shard for file in files for shard in file.shards()}
    folder = join(work, "samples")
    make_folder(folder)
    units = {name: shard.to_unit() for name, shard in shards.items()}
    receipts = run_stage(work, "sample", units, functools.partial(sample_shard, settings, folder))
    paths = [join(folder, f"{name}.arrow") for name in shards]
    tables = in_threads(lambda path: bytes_to_table(read_bytes(path)), paths)
    left_out: Counter[str] = Counter()
    for receipt in receipts.values():
        left_out.update(receipt["left_out"])
    read = sum(receipt["read"] for receipt in receipts.values())
    drawn = _lowest(pa.concat_tables(tables).to_pylist(), settings)
    if not drawn:
        why = ", ".join(f"{reason} ({count:,})" for reason, count in left_out.most_common(3))
        raise InputError(f"{corpus}: none of {read:,} rows is a document to draw: {why or 'empty'}")
    return Sample(
        pa.Table.from_pylist(drawn, SCHEMA).drop_columns(["digest"]), read, dict(left_out)
    )


def sample_shard(
    settings: SampleSettings, folder: str, name: str, unit: Mapping[str, Any]
) -> Receipt:
    """Draw from one shard and write what was drawn as one file."""
    shard = Shard.from_unit(unit)
    left_out: Counter[str] = Counter()
    counted = Counter[str]()
    rows = _documents(shard, settings, left_out, counted)
    drawn = _lowest(rows, settings)
    table = pa.Table.from_pylist(drawn, SCHEMA)
    write_bytes(join(folder, f"{name}.arrow"), table_to_bytes(table), create_folder=False)
    read = counted["documents"] + left_out.total()
    return {"read": read, "left_out": dict(left_out)}


def text_digest(text: str, seed: int = 0) -> bytes:
    """What documents are drawn by, 32 bytes: the text's SHA-256, salted unless ``seed`` is 0."""
    salt = f"{seed}\0" if seed else ""
    return hashlib.sha256((salt + text).encode()).digest()


def _documents(
    shard: Shard, settings: SampleSettings, left_out: Counter[str], counted: Counter[str]
) -> Iterator[dict[str, Any]]:
    for document in read_documents(shard, settings.columns, left_out):
        label = document.kept[0] if settings.labelled else None
        if settings.labelled and (label is None or label == ""):
            left_out["label is missing"] += 1
            continue
        counted["documents"] += 1
        yield {
            "digest": text_digest(document.text, settings.seed),
            "id": document.id,
            "text": document.text,
            "label": None if label is None else str(label),
        }


def _lowest(rows: Iterable[dict[str, Any]], settings: SampleSettings) -> list[dict[str, Any]]:
    """Those rows whose digests are lowest, lowest first; of equal ones the earlier first."""
    kept: dict[tuple[bytes, int], dict[str, Any]] = {}
    numbered = enumerate(rows)
    while chunk := list(itertools.islice(numbered, _CHUNK_ROWS)):
        for number, row in chunk:
            kept.setdefault((row["digest"], 0 if settings.distinct else number), row)
        if settings.documents is not None and len(kept) > settings.documents:
            kept = {key: kept[key] for key in heapq.nsmallest(settings.documents, kept)}
    return [kept[key] for key in sorted(kept)]
