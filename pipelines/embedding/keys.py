"""Repeated ids and repeated texts, found by their digests: no process sees all of them.

Every shard is read once, and of each document a few dozen bytes are kept, in partitions by hash:
digests of id and text, and where it is. :func:`find_repeated_ids` works on one partition of ids:
of several documents with one id the first in corpus order stays. :func:`settle_partition` works
on one partition of texts: it names which document owns a text, and which repeat it. Out:
``settled/`` with a segment a shard, which says what becomes of those documents of the shard that
are not simply encoded.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.documents import Checker, rejected_table
from pipelines.corpus.files import Columns, CorpusFile, Shard, describe_problem, listing_of
from pipelines.corpus.given_vectors import GivenVectors
from pipelines.corpus.passages import Cutter, cuts_of
from pipelines.corpus.readers import RowBatch, read_shard
from pipelines.embedding.plan import ScanResult, check_same_corpus, combine_receipts
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    check_store,
    in_threads,
    join,
    make_folder,
    write_bytes,
)
from pipelines.runtime.segments import (
    digest_column,
    digest_ids,
    digest_matrix,
    partition_of,
    read_segment,
    split_by,
    table_to_bytes,
    write_segments,
)
from pipelines.runtime.units import Receipt, run_stage

log = logging.getLogger(__name__)

FLUSH_BYTES = 64 << 20
_REASONS_KEPT = 100
_CHARACTERS_PER_TOKEN = 4

# What becomes of a document.
ENCODE = 0
"""Its text is encoded here."""
REPEAT = 1
"""It takes the vector of the document that owns its text."""
KNOWN = 2
"""It takes a vector that was computed before this run."""
REJECT = 3
"""Another document has its id."""
RETOUCH = 4
"""Only its kept columns are written."""
LEAVE_OUT = 5
"""Nothing of it is written."""


@dataclass(frozen=True)
class ScanSettings:
    """What every reading task has to know beside its shard.

    ``digest_kept`` digests the kept columns of checked documents, one digest a document, where a
    later comparison wants that; the digests of ids are then kept beside those of the texts too.
    ``has_ids`` says that some files may have ids of their own. ``keys`` is where keys are kept,
    a folder and a name in it: by default ``keys/`` below the work folder. ``cut`` cuts documents
    into passages; a row is then one of these.
    """

    work: str
    columns: Columns
    kept_schema: pa.Schema | None
    partitions: int
    clip_characters: int
    max_tokens: int
    prompt_tokens: int
    flush_bytes: int = FLUSH_BYTES
    has_ids: bool = True
    keys: tuple[str, str] | None = None
    digest_kept: Callable[[pa.Table], pa.Array] | None = None
    vectors: GivenVectors | None = None
    """Those that the corpus brings along; nothing is then encoded."""
    cut: Cutter | None = None

    def path(self, *parts: str) -> str:
        """A path below the work folder."""
        return join(self.work, *parts)

    def keys_place(self) -> tuple[str, str]:
        """Folder and name of where the keys are."""
        return self.keys or (self.work, "keys")

    def checker(self, cut: Cutter | None = None) -> Checker:
        """Checks the rows of one shard; ``cut`` knows its passages already."""
        columns, cut = self.columns, cut or self.cut
        return Checker(
            columns.keep, self.kept_schema, self.clip_characters, self.vectors, columns.text, cut
        )


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
    make_folder(settings.path("rejected"))
    shards = {shard.name: shard for file in files for shard in file.shards()}
    units = {name: shard.to_unit() for name, shard in shards.items()}
    function = functools.partial(scan_shard, settings)
    receipts = run_stage(*settings.keys_place(), units, function)
    scanned = combine_receipts(files, shards, receipts, cut=settings.cut is not None)
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
        write_bytes(settings.path("rejected", "files.arrow"), table_to_bytes(rejected_table(rows)))
    if hashed := sum(receipt.get("hashed_ids", 0) for receipt in receipts.values()):
        log.info("%s documents have no id: the hash of the text is it", f"{hashed:,}")
    if scanned.cut is not None:
        log.info("%s documents are %s passages", f"{scanned.cut:,}", f"{scanned.accepted:,}")
    scanned.save(settings.work)
    return scanned


def check_shard(
    settings: ScanSettings, shard: Shard, checker: Checker, problems: list[str]
) -> Iterator[tuple[RowBatch, pa.Table, pa.Table]]:
    """Batches of a shard with their accepted documents and rejected rows.

    It ends where the file cannot be read any further; why, is added to ``problems``.
    """
    try:
        for batch in read_shard(shard, settings.columns):
            yield batch, *checker.check(batch)
    except (OSError, pa.ArrowException) as error:
        check_store(shard.file.path, error)
        problems.append(describe_problem(error))


@dataclass
class _Pending:
    texts: list[pa.Table] = field(default_factory=list)
    ids: list[pa.Table] = field(default_factory=list)
    rejected: list[pa.Table] = field(default_factory=list)
    cuts: list[pa.Table] = field(default_factory=list)
    size_bytes: int = 0


def scan_shard(settings: ScanSettings, name: str, unit: Mapping[str, Any]) -> Receipt:
    """Read one shard; the receipt says what it holds and what could not be read."""
    shard = Shard.from_unit(unit)
    checker = settings.checker()
    problems: list[str] = []
    pending = _Pending()
    flushes = tokens = accepted = checksum = 0
    for _, documents, rejected in check_shard(settings, shard, checker, problems):
        texts, ids = _keys_of(settings, documents)
        pending.texts.append(texts)
        pending.ids.append(ids)
        pending.rejected.append(rejected)
        pending.size_bytes += texts.nbytes + ids.nbytes + rejected.nbytes
        if settings.cut is not None:
            pending.cuts.append(cuts_of(documents))
        accepted += len(documents)
        tokens += int(estimate_tokens(documents["text"], settings).sum())
        checksum = add_to_checksum(checksum, documents)
        if pending.size_bytes >= settings.flush_bytes:
            _flush(settings, f"{name}-{flushes:04d}", pending)
            pending = _Pending()
            flushes += 1
    if pending.texts:
        _flush(settings, f"{name}-{flushes:04d}", pending)
        flushes += 1
    return {
        "file": shard.file.path,
        "problem": problems[0] if problems else None,
        "rows": checker.rows,
        "accepted": accepted,
        "documents": checker.documents,
        "hashed_ids": checker.hashed_ids,
        "reasons": dict(checker.reasons.most_common(_REASONS_KEPT)),
        "flushes": flushes,
        "tokens": tokens,
        "checksum": checksum,
        "id_kinds": sorted(checker.id_kinds),
        "kept_kinds": {name: sorted(kinds) for name, kinds in checker.kept_kinds.items()},
    }


def estimate_tokens(texts: pa.ChunkedArray, settings: ScanSettings) -> np.ndarray:
    """int64 (n,): about how many tokens each text costs, the prompt's included."""
    lengths = pc.utf8_length(texts).to_numpy()
    body = np.minimum(lengths // _CHARACTERS_PER_TOKEN + 1, settings.max_tokens)
    return body.astype(np.int64) + settings.prompt_tokens


def add_to_checksum(checksum: int, documents: pa.Table) -> int:
    """A sum modulo 2^63 over texts and their rows: two reads of one shard must agree in it."""
    if not len(documents):
        return checksum
    leading = np.ascontiguousarray(digest_matrix(documents["text_sha256"])[:, :8]).view("<u8")
    rows = documents["row"].to_numpy().astype(np.uint64) * np.uint64(2) + np.uint64(1)
    total = int((leading.reshape(-1) * rows).sum(dtype=np.uint64))
    return (checksum + total) % (1 << 63)


def fill_ids(documents: pa.Table) -> pa.Array:
    """Ids as strings; where a document has none, its text's hash."""
    if not documents["id"].null_count:
        return documents["id"].combine_chunks()
    hashes = [digest.hex() for digest in documents["text_sha256"].to_pylist()]
    return pc.coalesce(documents["id"].combine_chunks(), pa.array(hashes, pa.large_string()))


def _keys_of(settings: ScanSettings, documents: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Keys of rows by text, and by their documents' ids where those can repeat."""
    digests = digest_matrix(documents["text_sha256"])
    if settings.vectors is not None:
        given = settings.vectors.to_matrix(documents[f"kept.{settings.vectors.column}"])
        digests = settings.vectors.digest(documents["id"].to_pylist(), digests, given)
    is_cut = settings.cut is not None
    own = (documents["own"] if is_cut else documents["id"].is_valid()).combine_chunks()
    texts = {"text": digest_column(digests), "row": documents["row"], "own": own}
    wants_ids = settings.has_ids or settings.digest_kept is not None
    ids = digest_ids(fill_ids(documents).to_pylist() if wants_ids else [])
    if settings.digest_kept is not None or is_cut:
        texts |= {"id": ids}
    if settings.digest_kept is not None:
        texts |= {"kept": settings.digest_kept(documents)}
    count = len(documents) if settings.has_ids else 0
    if is_cut:
        ids = digest_ids(documents["kept.document_id"].to_pylist())
    keys = {
        "digest": ids.slice(0, count),
        "partition": partition_of(digests, settings.partitions)[:count].astype(np.int32),
        "row": documents["row"].slice(0, count),
        "own": own.slice(0, count),
    }
    if is_cut:
        keys["document"] = documents["document"]
    return pa.table(texts), pa.table(keys)


def _flush(settings: ScanSettings, name: str, pending: _Pending) -> None:
    for kind, column, tables in (("texts", "text", pending.texts), ("ids", "digest", pending.ids)):
        keys = pa.concat_tables(tables).combine_chunks()
        partition = partition_of(digest_matrix(keys[column]), settings.partitions)
        path = join(*settings.keys_place(), f"{name}.{kind}")
        write_segments(path, split_by(keys, partition, settings.partitions))
    rejected = pa.concat_tables(pending.rejected)
    path = join(*settings.keys_place(), f"{name}.rejected")
    write_bytes(path, table_to_bytes(rejected), create_folder=False)
    if pending.cuts:
        path = join(*settings.keys_place(), f"{name}.cuts")
        write_bytes(path, table_to_bytes(pa.concat_tables(pending.cuts)), create_folder=False)


@dataclass(frozen=True)
class Selected:
    """What of a partition is to be written.

    ``fates`` is int8 (n,): for each document :data:`ENCODE`, :data:`KNOWN`, :data:`RETOUCH` or
    :data:`LEAVE_OUT`. ``counts`` goes into the receipt.
    """

    fates: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SettleSettings:
    """What the tasks that look for repeats have to know beside their partition.

    ``flushes`` names the files of keys in corpus order, each with its shard's number.
    ``select(name, number, keys)`` chooses among the documents of a partition (see
    :class:`Selected`); without it all are encoded.
    """

    scan: ScanSettings
    flushes: tuple[tuple[int, str], ...]
    shards: int
    select: Callable[[str, int, pa.Table | None], Selected] | None = None

    @property
    def usual(self) -> int:
        """What becomes of a document that ``settled/`` does not name."""
        return ENCODE if self.select is None else LEAVE_OUT


@dataclass(frozen=True)
class Settled:
    """How the rows of a corpus, documents or passages, divide.

    ``distinct`` texts are encoded and ``known`` ones have a vector already; ``duplicates`` are the
    rows beyond one a text. ``busy`` are the numbers of the shards of which something is to be
    written, None for all.
    """

    distinct: int
    known: int
    duplicates: int
    left_out: int
    """Duplicates that get no row, since their text's hash is their id."""
    repeated_ids: int
    """Documents that are rejected, since another has their id."""
    lost: int
    """Their rows."""
    selected: dict[str, int]
    """Sums of what ``select`` counted."""
    busy: frozenset[int] | None = None


def settle_corpus(settings: SettleSettings) -> Settled:
    """Find repeated ids and texts in all partitions."""
    work = settings.scan.work
    units = {f"{number:05d}": number for number in range(settings.scan.partitions)}
    function = functools.partial(settle_partition, settings)
    if len(units) > 1:
        run_stage(work, "ids", units, functools.partial(find_repeated_ids, settings))
    else:  # one task after the other: a stage less to start
        make_folder(join(work, "ids"))
        function = functools.partial(settle_whole, settings)
    receipts = run_stage(work, "settled", units, function).values()
    names = ("distinct", "known", "duplicates", "left_out", "repeated_ids")
    totals = {name: sum(receipt[name] for receipt in receipts) for name in names}
    lost = sum(r["lost"] if "lost" in r else r["repeated_ids"] for r in receipts)
    selected: Counter[str] = Counter()
    for receipt in receipts:
        selected.update(receipt["selected"])
    busy = None
    if settings.select is not None:
        busy = frozenset(number for receipt in receipts for number in receipt["busy"])
    return Settled(**totals, lost=lost, selected=dict(selected), busy=busy)


def find_repeated_ids(settings: SettleSettings, name: str, unit: int) -> Receipt:
    """Write which rows' documents come second in a partition of ids, by partition of texts."""
    partitions = settings.scan.partitions
    keys = _read_all(settings, "ids", unit)
    losers = pa.table({"shard": pa.array([], pa.int32()), "row": pa.array([], pa.int64())})
    partition = np.empty(0, dtype=np.int64)
    if keys is not None:
        order, starts = _group(keys["digest"])
        own = keys["own"].to_numpy()
        # texts that are their own ids repeat as texts do
        loses = (order != starts) & (own[order] | own[starts])
        if settings.scan.cut is not None:
            document = _place(keys["shard"], keys["document"])
            loses &= document[order] != document[starts]
        second = np.sort(order[loses])
        losers = keys.drop_columns(["digest", "own", "partition"]).take(pa.array(second))
        partition = keys["partition"].to_numpy()[second].astype(np.int64)
    path = settings.scan.path("ids", f"{name}.repeats")
    write_segments(path, split_by(losers, partition, partitions))
    return {"repeats": len(losers)}


def settle_whole(settings: SettleSettings, name: str, unit: int) -> Receipt:
    """Both steps, where there is but one partition."""
    find_repeated_ids(settings, name, unit)
    return settle_partition(settings, name, unit)


def settle_partition(settings: SettleSettings, name: str, unit: int) -> Receipt:
    """Write what becomes of the documents of one partition of texts, by shard."""
    keys = _read_all(settings, "texts", unit)
    receipt: Receipt = dict.fromkeys(
        ("distinct", "known", "duplicates", "left_out", "repeated_ids"), 0
    )
    fate_tables: list[pa.Table] = []
    counts: dict[str, int] = {}
    if keys is not None:
        losses = _losses(settings, unit, keys)
        losing = losses != ENCODE
        fate_tables.append(_fates(keys.filter(pa.array(losing)), losses[losing]))
        receipt |= {"repeated_ids": int((losses == REJECT).sum()), "lost": int(losing.sum())}
        keys = keys.filter(pa.array(~losing)).combine_chunks()
    fates = np.full(0 if keys is None else len(keys), ENCODE, dtype=np.int8)
    if settings.select is not None:
        selected = settings.select(name, unit, keys)
        fates, counts = selected.fates, selected.counts
    if keys is not None and len(keys):
        owners, found = _name_owners(keys, fates)
        receipt |= found
        table = _fates(keys, fates, owners)
        fate_tables.append(table.filter(pa.array(fates != settings.usual)))
    table = pa.concat_tables([_fates(None, 0), *fate_tables]).sort_by(
        [("shard", "ascending"), ("row", "ascending")]
    )
    shard = table["shard"].to_numpy().astype(np.int64)
    path = settings.scan.path("settled", f"{name}.fates")
    write_segments(path, split_by(table.drop_columns("shard"), shard, settings.shards))
    busy = shard[table["fate"].to_numpy() != LEAVE_OUT]
    return receipt | {"selected": counts, "busy": np.unique(busy).tolist()}


def _name_owners(keys: pa.Table, fates: np.ndarray) -> tuple[np.ndarray, Receipt]:
    """The shard of each document's owner, int32 (n,); sets in ``fates`` which documents repeat.

    Where the id is the text's hash, only a text's first document is left; of passages, whose ids
    have the hash of a whole text in them, the first with an id.
    """
    owners = np.full(len(keys), -1, dtype=np.int32)
    rows = np.flatnonzero((fates == ENCODE) | (fates == KNOWN))
    order, starts = _group(keys["text"].take(pa.array(rows)))
    order, starts = rows[order], rows[starts]
    own, is_first = keys["own"].to_numpy(), order == starts
    hashed = np.flatnonzero(~own[order])
    marks = [starts[hashed]]
    if "id" in keys.column_names:
        digests = np.ascontiguousarray(digest_matrix(keys["id"])).view("<u8")
        marks += list(digests[order[hashed]].T)
    by = np.lexsort([hashed, *marks])
    same = np.all([mark[by][1:] == mark[by][:-1] for mark in marks], axis=0)
    again = hashed[by][1:][same]  # second ones without an id of their own
    left_out = order[again]
    known = fates[order] == KNOWN
    repeats = order[~is_first & ~known]
    owners[repeats] = keys["shard"].to_numpy()[starts[~is_first & ~known]]
    fates[repeats] = REPEAT
    fates[left_out] = LEAVE_OUT
    return owners, {
        "distinct": int((is_first & ~known).sum()),
        "known": int((is_first & known).sum()),
        "duplicates": int((~is_first).sum()),
        "left_out": len(left_out),
    }


def _group(digests: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Rows ordered by digest, equal ones by row; and for each the first row of its digest."""
    halves = np.ascontiguousarray(digest_matrix(digests)).view("<u8")
    order = np.lexsort((np.arange(len(halves)), halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = np.any(ordered[1:] != ordered[:-1], axis=1)
    places = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    return order, order[places]


def _fates(keys: pa.Table | None, fate: Any, owners: np.ndarray | None = None) -> pa.Table:
    """Where documents are, what becomes of them, and the shard of their text's owner or -1."""
    count = 0 if keys is None else len(keys)
    none = np.full(count, -1, dtype=np.int32)
    columns = {
        "shard": pa.array([], pa.int32()) if keys is None else keys["shard"],
        "row": pa.array([], pa.int64()) if keys is None else keys["row"],
        "fate": np.broadcast_to(np.asarray(fate, dtype=np.int8), count).copy(),
        "owner": none if owners is None else owners,
    }
    return pa.table(columns)


def _read_all(settings: SettleSettings, kind: str, index: int) -> pa.Table | None:
    """One partition of every file of keys, in corpus order, with the shard's number."""
    paths = [join(*settings.scan.keys_place(), f"{flush}.{kind}") for _, flush in settings.flushes]
    tables = in_threads(lambda path: read_segment(path, index), paths)
    found = [
        table.append_column("shard", pa.array(np.full(len(table), shard, dtype=np.int32)))
        for (shard, _), table in zip(settings.flushes, tables, strict=True)
        if table is not None
    ]
    return pa.concat_tables(found).combine_chunks() if found else None


def _losses(settings: SettleSettings, index: int, keys: pa.Table) -> np.ndarray:
    """What becomes, int8 (n,), of the rows of a partition of texts whose ids are another's.

    :data:`ENCODE` is all others'. A document is rejected once, by the first of its passages.
    """
    partitions = range(settings.scan.partitions)
    paths = [settings.scan.path("ids", f"{number:05d}.repeats") for number in partitions]
    tables = [t for t in in_threads(lambda path: read_segment(path, index), paths) if t]
    losses = np.full(len(keys), ENCODE, dtype=np.int8)
    if tables:
        losers = pa.concat_tables(tables)
        lost = _place(losers["shard"], losers["row"])
        rejected = lost
        if "document" in losers.column_names:
            rejected = lost[_place(losers["shard"], losers["document"]) == lost]
        places = _place(keys["shard"], keys["row"])
        losses[np.isin(places, lost)] = LEAVE_OUT
        losses[np.isin(places, rejected)] = REJECT
    return losses


def _place(shards: pa.ChunkedArray, rows: pa.ChunkedArray) -> np.ndarray:
    """Shards and rows, int64 (n,), as one number each."""
    return (shards.to_numpy().astype(np.int64) << 40) | rows.to_numpy()
