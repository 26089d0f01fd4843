"""Repeated ids and repeated texts, found without any process seeing all of them.

:func:`find_repeated_ids` works on one partition of ids: of several documents with one id the
first in corpus order stays. :func:`assemble_partition` works on one partition of texts: it leaves
out those documents, keeps every distinct text once, orders them by length and cuts them into
chunks of about equal work. Out: ``texts/`` and ``documents/`` with a segment a chunk.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.documents import EXCERPT_CHARACTERS, Checker, rejected_table
from pipelines.corpus.files import Columns, CorpusFile, Shard, describe_problem, listing_of
from pipelines.corpus.kept_columns import json_to_values
from pipelines.corpus.readers import RowBatch, read_shard
from pipelines.embedding.plan import ScanResult, check_same_corpus, combine_receipts
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import check_store, in_threads, join, make_folder, write_bytes
from pipelines.runtime.segments import read_segment, table_to_bytes, write_segments
from pipelines.runtime.units import Receipt, run_stage

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
    units = {name: shard.to_unit() for name, shard in shards.items()}
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
    shard = Shard.from_unit(unit)
    checker = Checker(settings.columns.keep, settings.kept_schema, settings.clip_characters)
    problems: list[str] = []
    pending = _Pending()
    flushes = tokens = accepted = 0
    for batch in _until_unreadable(read_shard(shard, settings.columns), shard, problems):
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


def _until_unreadable(
    batches: Iterator[RowBatch], shard: Shard, problems: list[str]
) -> Iterator[RowBatch]:
    """The batches up to where the file cannot be read; why, is added to ``problems``."""
    try:
        yield from batches
    except (OSError, pa.ArrowException) as error:
        check_store(shard.file.path, error)
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


CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Selected:
    """What of a partition is to be written: ``documents``, None for nothing.

    ``known`` says of which texts there are vectors: ``text_sha256``, each once, and whatever
    columns tell where. Such texts get chunks of their own, which hold those columns instead of
    texts. ``counts`` goes into the receipt.
    """

    documents: pa.Table | None
    known: pa.Table | None = None
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AssembleSettings:
    """What the tasks of both stages have to know beside their partition.

    ``flushes`` names the files that the scan wrote, in corpus order. ``kept_types`` are the
    settled types of kept columns that came as JSON text. ``select(name, number, documents)``
    chooses among a partition's documents; without it all are written.
    """

    scan: ScanSettings
    flushes: tuple[str, ...]
    kept_types: dict[str, pa.DataType]
    chunk_tokens: int
    select: Callable[[str, int, pa.Table | None], Selected] | None = None

    def path(self, *parts: str) -> str:
        """A path below the work folder."""
        return join(self.scan.work, *parts)


@dataclass(frozen=True)
class Chunk:
    """A run of distinct texts that is encoded as one unit of work, and their documents."""

    name: str
    partition: str
    number: int
    texts: int
    documents: int
    tokens: int
    """Estimated, prompts included."""
    documents_bytes: int
    known: bool = False
    """Whether its vectors are to be copied, not computed."""


@dataclass(frozen=True)
class Assembled:
    """All chunks, and how the documents of the scan divide."""

    chunks: tuple[Chunk, ...]
    distinct: int
    duplicates: int
    repeated_ids: int
    selected: dict[str, int]
    """Sums of what ``select`` counted."""


def assemble_corpus(settings: AssembleSettings) -> Assembled:
    """Find repeated ids and texts in all partitions and cut the distinct texts into chunks."""
    for folder in ("texts", "documents"):
        make_folder(settings.path(folder))
    work = settings.scan.work
    units = {f"{number:05d}": number for number in range(settings.scan.partitions)}
    run_stage(work, "ids", units, functools.partial(find_repeated_ids, settings))
    function = functools.partial(assemble_partition, settings)
    receipts = run_stage(work, "assemble", units, function)
    chunks = (
        Chunk(f"{partition}-{number:05d}", partition, number, *sizes)
        for partition, receipt in receipts.items()
        for number, sizes in enumerate(receipt["chunks"])
    )
    distinct, duplicates, repeated_ids = (
        sum(receipt[name] for receipt in receipts.values())
        for name in ("distinct", "duplicates", "repeated_ids")
    )
    selected: Counter[str] = Counter()
    for receipt in receipts.values():
        selected.update(receipt["selected"])
    return Assembled(tuple(chunks), distinct, duplicates, repeated_ids, dict(selected))


def find_repeated_ids(settings: AssembleSettings, name: str, unit: int) -> Receipt:
    """Write which documents of one partition of ids come second, by partition of texts."""
    partitions = settings.scan.partitions
    keys = _read_all(settings, "ids", unit)
    losers = [pa.table({"flush": pa.array([], pa.int32()), "row": pa.array([], pa.int64())})]
    partition = np.empty(0, dtype=np.int64)
    if keys is not None:
        halves = np.ascontiguousarray(digest_matrix(keys["digest"])).view("<u8")
        order = np.lexsort((np.arange(len(keys)), halves[:, 1], halves[:, 0]))
        same = np.all(halves[order][1:] == halves[order][:-1], axis=1)
        second = np.sort(order[1:][same])
        losers = [keys.select(["flush", "row"]).take(second)]
        partition = keys["partition"].to_numpy()[second].astype(np.int64)
    table = pa.concat_tables(losers)
    write_segments(settings.path("ids", f"{name}.repeats"), split_by(table, partition, partitions))
    return {"repeats": len(table)}


def assemble_partition(settings: AssembleSettings, name: str, unit: int) -> Receipt:
    """Write texts and documents of one partition; the receipt lists its chunks."""
    documents = _read_all(settings, "texts", unit)
    chunks: list[list[int | bool]] = []
    repeated = distinct = left = 0
    text_parts: list[pa.Table] = []
    document_parts: list[pa.Table] = []
    if documents is not None:
        total = len(documents)
        documents = _without_repeated_ids(settings, name, unit, documents)
        repeated = total - len(documents)
    selected = Selected(documents)
    if settings.select is not None:
        selected = settings.select(name, unit, documents)
    if selected.documents is not None:
        documents = selected.documents
        texts, position, unknown = _distinct_texts(documents, selected.known)
        distinct, left = len(texts), len(documents)
        chunk = _cut_chunks(settings, texts, unknown)
        count = int(chunk[-1]) + 1 if distinct else 0
        text_parts = split_by(texts, chunk, count)
        document_parts = _place_documents(settings, documents, position, chunk, count)
        tokens = np.bincount(chunk, estimate_tokens(texts["text"], settings.scan), count)
        is_known = np.arange(count) >= (chunk[unknown] if unknown < distinct else count)
        chunks = [
            [len(t), len(d), int(n), d.nbytes, bool(k)]
            for t, d, n, k in zip(text_parts, document_parts, tokens, is_known, strict=True)
        ]
        text_parts = [
            _without_texts(part, selected.known) if known else part.select(["text_sha256", "text"])
            for part, known in zip(text_parts, is_known, strict=True)
        ]
    write_segments(settings.path("texts", f"{name}.texts"), text_parts)
    write_segments(settings.path("documents", f"{name}.documents"), document_parts)
    return {
        "chunks": chunks,
        "repeated_ids": repeated,
        "distinct": distinct,
        "duplicates": left - distinct,
        "selected": selected.counts,
    }


def _read_all(settings: AssembleSettings, kind: str, index: int) -> pa.Table | None:
    """One partition of every file of the scan, in corpus order, with the file's number."""
    paths = [settings.path("scan", f"{flush}.{kind}") for flush in settings.flushes]
    tables = in_threads(lambda path: read_segment(path, index), paths)
    found = [
        table.append_column("flush", pa.array(np.full(len(table), number, dtype=np.int32)))
        for number, table in enumerate(tables)
        if table is not None
    ]
    return pa.concat_tables(found).combine_chunks() if found else None


def _without_repeated_ids(
    settings: AssembleSettings, name: str, index: int, documents: pa.Table
) -> pa.Table:
    """The documents whose id is theirs; the others are written to ``rejected/``."""
    partitions = range(settings.scan.partitions)
    paths = [settings.path("ids", f"{number:05d}.repeats") for number in partitions]
    found = [t for t in in_threads(lambda path: read_segment(path, index), paths) if t is not None]
    if not found:
        return documents
    losers = pa.concat_tables(found)
    losing = _places(documents, losers)
    rejected = documents.take(losing)
    rows = [
        (row_id, "duplicate id", text[:EXCERPT_CHARACTERS])
        for row_id, text in zip(
            rejected["id"].to_pylist(), rejected["text"].to_pylist(), strict=True
        )
    ]
    path = settings.path("rejected", f"ids-{name}.arrow")
    write_bytes(path, table_to_bytes(rejected_table(rows)), create_folder=False)
    return documents.take(np.setdiff1d(np.arange(len(documents)), losing))


def _places(documents: pa.Table, losers: pa.Table) -> np.ndarray:
    """int64 (m,): indices of those documents that ``losers`` names by file and row."""
    pair = np.dtype([("flush", "<i8"), ("row", "<i8")])

    def pairs(table: pa.Table) -> np.ndarray:
        both = np.empty(len(table), dtype=pair)
        both["flush"], both["row"] = table["flush"].to_numpy(), table["row"].to_numpy()
        return both

    return np.flatnonzero(np.isin(pairs(documents), pairs(losers)))


def _distinct_texts(
    documents: pa.Table, known: pa.Table | None
) -> tuple[pa.Table, np.ndarray, int]:
    """Every distinct text once, for each document the row of its text, and how many are unknown.

    Texts whose vectors are not known come first, each kind shortest first; ``known`` is the row
    of ``known`` that tells of a text's vector.
    """
    encoded = pc.dictionary_encode(documents["text_sha256"].combine_chunks())
    group = encoded.indices.to_numpy().astype(np.int64)
    _, first = np.unique(group, return_index=True)
    texts = documents.select(["text_sha256", "text"]).take(first)
    where = np.full(len(texts), -1, dtype=np.int64)
    if known is not None:
        found = pc.index_in(texts["text_sha256"], value_set=known["text_sha256"])
        where = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    order = np.lexsort((pc.utf8_length(texts["text"]).to_numpy(), where >= 0))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    texts = texts.append_column("known", pa.array(where)).take(order)
    return texts, rank[group], int((where < 0).sum())


def _without_texts(texts: pa.Table, known: pa.Table) -> pa.Table:
    return known.take(texts["known"])


def _cut_chunks(settings: AssembleSettings, texts: pa.Table, unknown: int) -> np.ndarray:
    """int64 (n,): the chunk of each text; equal in estimated tokens, bounded in bytes.

    The first ``unknown`` texts share no chunk with the others.
    """
    tokens = estimate_tokens(texts["text"], settings.scan)
    size = pc.binary_length(texts["text"]).to_numpy()
    share = np.maximum(tokens / settings.chunk_tokens, size / CHUNK_BYTES)
    wanted = np.floor(np.cumsum(share) - share).astype(np.int64)
    wanted[unknown:] += 1
    return np.unique(wanted, return_inverse=True)[1].astype(np.int64)


def _place_documents(
    settings: AssembleSettings,
    documents: pa.Table,
    position: np.ndarray,
    chunk: np.ndarray,
    count: int,
) -> list[pa.Table]:
    """Documents by chunk, each with the row of its text in the chunk.

    Where the id is the text's hash, only a text's first document is left.
    """
    own_id = documents["id"].is_valid().to_numpy()
    first_of_text = np.zeros(len(documents), dtype=bool)
    hashed = np.flatnonzero(~own_id)
    first_of_text[hashed[np.unique(position[hashed], return_index=True)[1]]] = True
    left = np.flatnonzero(own_id | first_of_text)
    left = left[np.argsort(position[left], kind="stable")]
    documents, position = documents.take(left), position[left]
    starts = np.searchsorted(chunk, np.arange(count))
    place = position - starts[chunk[position]]
    columns = {
        "id": fill_ids(documents),
        "text_sha256": documents["text_sha256"],
        "place": place.astype(np.int32),
    }
    for name in settings.scan.columns.keep:
        column = documents[f"kept.{name}"]
        target = settings.kept_types.get(name)
        columns[f"kept.{name}"] = column if target is None else json_to_values(column, target)
    return split_by(pa.table(columns), chunk[position], count)


def fill_ids(documents: pa.Table) -> pa.Array:
    """Ids as strings; where a document has none, its text's hash."""
    if not documents["id"].null_count:
        return documents["id"].combine_chunks()
    hashes = [digest.hex() for digest in documents["text_sha256"].to_pylist()]
    return pc.coalesce(documents["id"].combine_chunks(), pa.array(hashes, pa.large_string()))
