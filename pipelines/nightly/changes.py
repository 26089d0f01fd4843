"""What changed in the corpus, embedded: the part of a night before the store is touched.

In: the corpus and the version it is compared with. Out, in the night's folder: ``embeddings/``
with the documents to write, and which others to delete or to touch up. Every stage leaves files
that a killed night's successor goes on from; only texts without a known vector are embedded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.files import CorpusFile
from pipelines.corpus.passages import PassageOptions, passage_types
from pipelines.embedding import job as embed
from pipelines.embedding.chunks import plan_groups
from pipelines.embedding.encode import TAKE_VECTORS, embed_chunks
from pipelines.embedding.job import (
    EmbedRun,
    encode_settings,
    expected_tokens,
    found_types,
    read_settings,
    rejected_files,
    result_settings,
    settle_run,
    settle_settings,
)
from pipelines.embedding.keys import ENCODE, LEAVE_OUT, Settled, scan_corpus, settle_corpus
from pipelines.embedding.plan import ScanResult
from pipelines.embedding.write import ResultSettings, write_result
from pipelines.encoder.description import EncoderDescription
from pipelines.nightly.compare import (
    Comparison,
    KeptDigest,
    KnownSettings,
    collect_known,
    deleted_ids,
    prepare_comparison,
    retouched_documents,
    settle_ids,
    settled_types,
)
from pipelines.nightly.config import STORE_COLUMNS, STORE_TIMES, TEXT, NightConfig
from pipelines.nightly.known_files import with_known_files
from pipelines.nightly.own_vectors import given_vectors
from pipelines.nightly.reuse import (
    Leftover,
    copy_known_vectors,
    disk_needed,
)
from pipelines.runtime.arrow import plain_type
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, list_files, read_bytes
from pipelines.runtime.machines import ActorPlan
from pipelines.runtime.run_record import settings_of
from pipelines.runtime.segments import bytes_to_table
from pipelines.store.backfill import Backfill
from pipelines.store.columns import document_schema
from pipelines.store.version import Version

PASSAGES = "passages"


@dataclass(frozen=True)
class Before:
    """What a night starts from: the version before, and other places of usable vectors."""

    base: Version | None
    others: Sequence[Version]
    leftovers: Sequence[Leftover]
    same_encoder: bool
    backfills: Sequence[Backfill] = ()
    """Those that are under way."""

    @property
    def stored_types(self) -> dict[str, pa.DataType] | None:
        """Types of the kept columns in the store, the text's not among them."""
        if self.base is None:
            return None
        own = {TEXT, *STORE_COLUMNS, *STORE_TIMES}
        return {f.name: f.type for f in self.base.schema if f.name not in own}


@dataclass(frozen=True)
class ComparedCorpus:
    """The corpus, read and compared with the version before."""

    run: EmbedRun
    scanned: ScanResult
    settled: Settled
    comparison: Comparison | None
    rewrite: bool
    """Whether all documents are written, not only those that changed."""
    id_type: pa.DataType
    kept_types: dict[str, pa.DataType]
    counts: dict[str, int]

    @property
    def is_empty(self) -> bool:
        """Whether the corpus is what the version before already holds."""
        kinds = ("new", "changed", "deleted", "retouched")
        return not self.rewrite and not any(self.counts[kind] for kind in kinds)

    def disk(self, store: str) -> str:
        """What writing all documents beside the published version takes on disk, for people."""
        is_half = self.run.plan.float16
        text_bytes = sum(file.text_bytes for file in self.run.files)
        documents = max(1, self.scanned.accepted)
        vector_bytes = self.run.description.dimension * (2 if is_half else 4)
        return disk_needed(store, documents, vector_bytes + text_bytes / documents)


@dataclass(frozen=True)
class Changes:
    """The documents to write are on disk, with vectors; those to delete are known."""

    compared: ComparedCorpus
    paths: list[str]
    """Parquet files of documents to write; none of them is empty."""
    schema: pa.Schema
    """Of the store's documents."""
    counts: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)

    def deleted(self) -> Iterator[pa.Array]:
        """Ids that the store must no longer have, failed documents' included."""
        if self.compared.comparison is not None:
            yield from deleted_ids(self.compared.comparison, self.compared.id_type)
        yield from _failed_ids(self.compared)

    def retouched(self) -> Iterator[pa.Table]:
        """Id and kept columns of documents whose text has not changed."""
        if self.compared.comparison is not None and not self.compared.rewrite:
            yield from retouched_documents(self.compared.comparison, self.compared.id_type)


def find_changes(
    config: NightConfig,
    folder: str,
    files: Sequence[CorpusFile],
    encoder: tuple[ActorPlan, EncoderDescription],
    before: Before,
) -> ComparedCorpus:
    """Read the corpus and compare it; raises :class:`InputError` for one that cannot be used."""
    vectors = given_vectors(config, encoder[1])
    run = settle_run(config.embed_config(folder), files, *encoder, vectors)
    rewrite = _must_rewrite(config, before)
    stored = before.stored_types or {}
    require_same_passages(config, before.base)
    compares = before.base is not None or bool(before.others or before.leftovers)
    types = _digested_types(config, run) if before.base is None else _compared(config, stored)
    types = {} if before.base is not None and rewrite else types
    digest = KeptDigest(types, run.scan.kept_schema is None)
    run = replace(run, scan=replace(run.scan, digest_kept=digest))
    if not config.dry_run:
        run = with_known_files(
            run,
            config.store,
            types,
            reread=config.reread,
            backfills=bool(before.backfills or config.max_embed_hours),
        )
    run.plan.save(run.work)
    scanned = scan_corpus(run.scan, run.files, skip_unreadable=config.skip_unreadable_files)
    if not scanned.accepted:
        reasons = ", ".join(f"{why} ({count:,})" for why, count in scanned.reasons.items())
        raise InputError(f"none of {scanned.documents:,} documents can be embedded: {reasons}")
    kept = _kept_types(run, scanned, config)
    if not rewrite:
        is_json = run.scan.kept_schema is None
        kept |= settled_types(found_types(run, scanned), stored, is_json=is_json)
    settings, comparison = settle_settings(run, scanned), None
    if compares:
        compared = () if rewrite else tuple(_compared(config, stored))
        comparison = _prepare(run, before, compared, rewrite=rewrite)
        settings = replace(settings, select=comparison.select)
    settled = settle_corpus(settings)
    counts = _count(scanned, settled, comparison)
    id_type = pa.string() if config.passages else _id_type(scanned, before)
    return ComparedCorpus(run, scanned, settled, comparison, rewrite, id_type, kept, counts)


def embed_changes(config: NightConfig, compared: ComparedCorpus) -> Changes:
    """Copy known vectors, compute the others, and join them with their documents."""
    run, settled = compared.run, compared.settled
    results = _results(config, compared)
    groups = plan_groups(run.files, compared.scanned, settled, run.plan.shard_bytes)
    usual = ENCODE if compared.comparison is None else LEAVE_OUT
    tokens = expected_tokens(compared.scanned, settled)
    chunks, speed = embed_chunks(
        encode_settings(run, results),
        read_settings(run, compared.scanned, results, groups, tokens, usual=usual),
        embed.WORKERS if run.scan.vectors is None else TAKE_VECTORS,
        groups,
        texts=settled.distinct,
        tokens=tokens,
        rejected=compared.counts["rejected"],
        most_seconds=3600 * config.max_embed_hours,
    )
    copy_known_vectors(results, config.store, groups)
    written = write_result(results, groups, chunks, rejected_files(run, compared.scanned))
    _check_written(compared, written)
    counts = {
        **compared.counts,
        "rejected": compared.counts["rejected"] + written["failed_rows"],
        "embedded": 0 if run.scan.vectors else settled.distinct - written["failed_texts"],
        "reused": settled.known,
        "written": written["rows"],
        "tokens": written["tokens"],
    }
    paths = [join(run.config.output, "embeddings", name) for name in _parts(run.config.output)]
    schema = document_schema(
        compared.id_type,
        {n: t for n, t in compared.kept_types.items() if n != config.text_column},
        run.description.dimension,
        results.value_type,
        run.description.fingerprint,
    )
    return Changes(compared, paths if written["rows"] else [], schema, counts, dict(speed))


def _check_written(compared: ComparedCorpus, written: Mapping[str, int]) -> None:
    """Every document that was to be written was, or has no vector that is finite."""
    kinds = ("new", "changed", *(("unchanged", "retouched") if compared.rewrite else ()))
    expected = sum(compared.counts[kind] for kind in kinds)
    if written["rows"] + written["failed_rows"] != expected:
        raise RuntimeError(
            f"{expected:,} documents were to be written, and {written['rows']:,} were, with "
            f"{written['failed_rows']:,} that have no vector"
        )


def _prepare(
    run: EmbedRun, before: Before, compared: tuple[str, ...], *, rewrite: bool
) -> Comparison:
    """Collect the keys of what is known, with digests of ``compared`` columns."""
    given = run.scan.vectors
    known = KnownSettings(run.work, run.plan.partitions, compared, given)
    usable = before.same_encoder and given is None
    names = collect_known(known, before.base, before.others, before.leftovers, same_encoder=usable)
    comparison = Comparison(known, tuple(names), rewrite)
    prepare_comparison(comparison)
    return comparison


def _kept_types(run: EmbedRun, scanned: ScanResult, config: NightConfig) -> dict[str, pa.DataType]:
    kept_types = result_settings(run, scanned).kept_types
    return {n: pa.string() if n == config.text_column else kind for n, kind in kept_types.items()}


def _digested_types(config: NightConfig, run: EmbedRun) -> dict[str, pa.DataType]:
    """What a first night digests kept columns as: as the store will have them, where that is known.

    So the next night finds keys that it can compare.
    """
    schema = run.scan.kept_schema
    if schema is None:
        return {}
    types = {name: plain_type(schema.field(name).type) for name in config.kept}
    own = passage_types(pa.null()) if config.passages else {}
    return _compared(config, own | types)


def _compared(config: NightConfig, stored: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
    """The columns in which a row can differ from another of the same id."""
    same = ("document_id", "passage") if config.passages else ()
    return {name: kind for name, kind in stored.items() if name not in same}


def require_same_passages(config: NightConfig, base: Version | None) -> None:
    """Raise :class:`InputError` where the store's documents are cut in another way than asked."""
    if base is None:
        return
    cut = base.record.details.get(PASSAGES, {"passages": "", "passage_overlap": 0})
    wanted = passage_details(config)[PASSAGES]
    if cut != wanted:
        raise InputError(
            f"{config.store} holds {_in_words(cut)}, and this night asks for {_in_words(wanted)}: "
            "pass the same --passages and --passage-overlap, or begin a new store"
        )


def passage_details(config: NightConfig) -> dict[str, Any]:
    """How documents are cut, as a version's record keeps it."""
    return {PASSAGES: settings_of(config, PassageOptions)}


def _in_words(cut: Mapping[str, Any]) -> str:
    if not cut["passages"]:
        return "whole documents"
    overlap = f" with --passage-overlap {cut['passage_overlap']}" if cut["passage_overlap"] else ""
    return f"passages of {cut['passages']}{overlap}"


def in_passages(counts: Mapping[str, int]) -> dict[str, str]:
    """For people: how many documents and passages; nothing where documents are whole."""
    if "passages" not in counts:
        return {}
    return {"corpus": f"{counts['documents']:,} documents, {counts['passages']:,} passages"}


def _must_rewrite(config: NightConfig, before: Before) -> bool:
    """Whether the version before cannot be built on.

    Raises :class:`InputError` where vectors were stored in half precision and are wanted in full.
    """
    stored = before.stored_types
    if before.base is None or stored is None or not before.same_encoder:
        return True
    is_half = before.base.schema.field("embedding").type.value_type == pa.float16()
    if is_half and not config.float16:
        raise InputError(
            f"{config.store} holds vectors in half precision: pass --float16, or begin a new store"
        )
    return set(config.stored) != set(stored) or is_half != config.float16


def _id_type(scanned: ScanResult, before: Before) -> pa.DataType:
    if before.base is None:
        return scanned.id_type
    stored = before.base.schema.field("id").type
    if pa.types.is_integer(stored) and not pa.types.is_integer(scanned.id_type):
        raise InputError(
            f"the store's ids are integers, and the corpus has others ({scanned.id_kinds}): mend "
            "the corpus, or begin a new store"
        )
    return stored


def _count(scanned: ScanResult, settled: Settled, comparison: Comparison | None) -> dict[str, int]:
    """Rows, documents or passages, by what became of them; and rejected documents."""
    selected = settled.selected
    repeats = selected.get("repeats", 0)
    rows = scanned.accepted - settled.lost
    kept = rows - repeats
    if comparison is None:
        # where texts are their own ids, repeats of a text are left out as they are written
        kept, repeats = kept - settled.left_out, settled.left_out
        changes = {"new": kept, "changed": 0, "deleted": 0}
    else:
        changes = settle_ids(comparison)
    counts = {
        "documents": scanned.documents,
        **({} if scanned.cut is None else {"passages": rows}),
        **changes,
        "retouched": selected.get("retouched", 0),
        "unchanged": selected.get("unchanged", 0),
        "repeats": repeats,
        "rejected": scanned.documents - scanned.accepted_documents + settled.repeated_ids,
    }
    if (
        sum(counts[kind] for kind in ("new", "changed", "retouched", "unchanged", "repeats"))
        != rows
    ):
        raise RuntimeError(f"the counts do not add up, so rows were lost or doubled: {counts}")
    return counts


def _results(config: NightConfig, compared: ComparedCorpus) -> ResultSettings:
    return replace(
        result_settings(compared.run, compared.scanned),
        id_type=compared.id_type,
        kept_types=compared.kept_types,
        names={config.text_column: TEXT},
    )


def _parts(output: str) -> list[str]:
    names = list_files(join(output, "embeddings"))
    return [name for name in names if name.endswith(".parquet") and name[0] != "."]


def _failed_ids(compared: ComparedCorpus) -> Iterator[pa.Array]:
    """Documents that have no vector: an older state of them must not stay in the store."""
    folder = join(compared.run.work, "rejected")
    for name in list_files(folder):
        if name.startswith("vectors-"):
            ids = bytes_to_table(read_bytes(join(folder, name)))["id"].combine_chunks()
            if len(ids):
                yield pc.cast(ids, compared.id_type)
