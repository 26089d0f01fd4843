"""Scan: one shard of the corpus becomes checked documents, sorted into partitions.

In: a shard. Out, under the work folder: ``scan/NAME-FLUSH.texts`` with a segment for each
partition of texts (a text's partition is decided by its hash, so all its repeats meet there),
``scan/NAME-FLUSH.ids`` with a segment for each partition of ids, and what was rejected in
``rejected/``. Memory is bounded by one flush.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus import Columns, CorpusFile, Shard, describe_problem
from pipelines.embedding.documents import Checker, rejected_table
from pipelines.embedding.readers import RowBatch, read_shard
from pipelines.embedding.segments import table_to_bytes, write_segments
from pipelines.embedding.stages import Receipt, run_stage
from pipelines.embedding.work_plan import (
    ScanResult,
    check_same_corpus,
    combine_receipts,
    listing_of,
)
from pipelines.errors import InputError
from pipelines.storage import is_transient, join, make_folder, write_bytes

FLUSH_BYTES = 64 << 20
_REASONS_KEPT = 100
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class ScanSettings:
    """What every scan task has to know beside its shard."""

    work: str
    columns: Columns
    kept_schema: pa.Schema | None
    partitions: int
    clip_characters: int
    max_tokens: int
    prompt_tokens: int
    flush_bytes: int = FLUSH_BYTES


def scan_corpus(
    settings: ScanSettings, files: Sequence[CorpusFile], *, skip_unreadable: bool
) -> ScanResult:
    """Read every shard that has not been read; what the corpus holds.

    Raises :class:`InputError` where files cannot be read and are not to be skipped (after
    everything else was read), where there is no document, and for a corpus that has changed since
    an earlier run had read all of it.
    """
    earlier = ScanResult.load(settings.work)
    if earlier is not None:
        check_same_corpus(earlier.listing, listing_of(files))
        return earlier
    make_folder(join(settings.work, "rejected"))
    shards = {shard.name: shard for file in files for shard in file.shards()}
    units = {name: asdict(shard) for name, shard in shards.items()}
    function = functools.partial(scan_shard, settings)
    scanned = combine_receipts(files, shards, run_stage(settings.work, "scan", units, function))
    problems = scanned.problems
    if problems and not skip_unreadable:
        path, problem = next(iter(problems.items()))
        more = f" ({len(problems)} files cannot be read)" if len(problems) > 1 else ""
        raise InputError(
            f"{path}: {problem}{more}. The rest was read and is kept: mend or remove the file and "
            "run again, or pass --skip-unreadable-files"
        )
    if not scanned.documents:
        raise InputError(f"there is no document in {files[0].path} or any other file")
    if problems:
        rows = [(None, f"unreadable file: {why}", path) for path, why in problems.items()]
        path = join(settings.work, "rejected", "files.arrow")
        write_bytes(path, table_to_bytes(rejected_table(rows)))
    scanned.save(settings.work)
    return scanned


@dataclass
class _Pending:
    accepted: list[pa.Table] = field(default_factory=list)
    rejected: list[pa.Table] = field(default_factory=list)
    size_bytes: int = 0


def scan_shard(settings: ScanSettings, name: str, unit: dict) -> Receipt:
    """Read one shard; the receipt says what was found and what could not be read."""
    shard = Shard(CorpusFile(**unit["file"]), unit["start"], unit["stop"])
    checker = Checker(settings.columns.keep, settings.kept_schema, settings.clip_characters)
    problems: list[str] = []
    pending = _Pending()
    flushes = tokens = accepted = 0
    for batch in _until_unreadable(read_shard(shard, settings.columns), problems):
        documents, rejected = checker.check(batch)
        pending.accepted.append(documents)
        pending.rejected.append(rejected)
        pending.size_bytes += documents.nbytes + rejected.nbytes
        accepted += len(documents)
        tokens += int(estimate_tokens(documents["text"], settings).sum())
        if pending.size_bytes >= settings.flush_bytes:
            _flush(settings, f"{name}-{flushes:04d}", pending)
            pending = _Pending()
            flushes += 1
    if pending.accepted:
        _flush(settings, f"{name}-{flushes:04d}", pending)
        flushes += 1
    return {
        "file": shard.file.path,
        "problem": problems[0] if problems else None,
        "rows": checker.rows,
        "accepted": accepted,
        "reasons": dict(checker.reasons.most_common(_REASONS_KEPT)),
        "flushes": flushes,
        "tokens": tokens,
        "id_kinds": sorted(checker.id_kinds),
        "kept_kinds": {name: sorted(kinds) for name, kinds in checker.kept_kinds.items()},
    }


def estimate_tokens(texts: pa.ChunkedArray, settings: ScanSettings) -> np.ndarray:
    """int64 (n,): about how many tokens each text costs, the prompt's included."""
    lengths = pc.utf8_length(texts).to_numpy()
    body = np.minimum(lengths // _CHARACTERS_PER_TOKEN + 1, settings.max_tokens)
    return body.astype(np.int64) + settings.prompt_tokens


def digest_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """uint8 (n, width): a fixed-size binary column without nulls."""
    array = column.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def split_by(table: pa.Table, partition: np.ndarray, partitions: int) -> list[pa.Table]:
    """The rows of each partition, in their order; ``partition`` is int64 (n,)."""
    order = np.argsort(partition, kind="stable")
    table = table.take(order)
    bounds = np.searchsorted(partition[order], np.arange(partitions + 1))
    return [table.slice(start, stop - start) for start, stop in itertools.pairwise(bounds)]


def _until_unreadable(batches: Iterator[RowBatch], problems: list[str]) -> Iterator[RowBatch]:
    """The batches up to where the file cannot be read; why, is added to ``problems``."""
    try:
        yield from batches
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and is_transient(error):
            raise
        problems.append(describe_problem(error))


def _flush(settings: ScanSettings, name: str, pending: _Pending) -> None:
    documents = pa.concat_tables(pending.accepted).combine_chunks()
    rejected = pa.concat_tables(pending.rejected)
    digests = digest_matrix(documents["text_sha256"])
    partition = partition_of(digests, settings.partitions)
    stem = join(settings.work, "scan", name)
    write_segments(f"{stem}.texts", split_by(documents, partition, settings.partitions))
    keys = _id_keys(documents, partition)
    id_partition = partition_of(digest_matrix(keys["digest"]), settings.partitions)
    write_segments(f"{stem}.ids", split_by(keys, id_partition, settings.partitions))
    if len(rejected):
        path = join(settings.work, "rejected", f"scan-{name}.arrow")
        write_bytes(path, table_to_bytes(rejected), create_folder=False)


def _id_keys(documents: pa.Table, partition: np.ndarray) -> pa.Table:
    """Digest of every id that is the corpus's own, and where its document is."""
    own = np.flatnonzero(documents["id"].is_valid().to_numpy())
    digests = [
        hashlib.blake2b(row_id.encode(), digest_size=16).digest()
        for row_id in documents["id"].take(own).to_pylist()
    ]
    return pa.table(
        {
            "digest": pa.array(digests, pa.binary(16)),
            "partition": partition[own].astype(np.int32),
            "row": documents["row"].take(own),
        }
    )


def partition_of(digests: np.ndarray, partitions: int) -> np.ndarray:
    """int64 (n,): the partition that each digest, uint8 (n, width), belongs to."""
    leading = np.ascontiguousarray(digests[:, :8]).view("<u8").reshape(-1)
    return (leading % np.uint64(partitions)).astype(np.int64)
