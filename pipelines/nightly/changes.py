"""What changed in the corpus, embedded: the part of a night before the store is touched.

In: the corpus and the version it is compared with. Out, in the night's folder: ``embeddings/``
with the documents to write, and which others to delete or to touch up. Every stage leaves files
that a killed night's successor goes on from; only texts without a known vector are embedded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.files import CorpusFile
from pipelines.embedding import job as embed
from pipelines.embedding.encode import EncodeSettings, embed_chunks
from pipelines.embedding.job import EmbedRun, assemble_settings, result_settings, settle_run
from pipelines.embedding.keys import Assembled, assemble_corpus, scan_corpus
from pipelines.embedding.plan import ScanResult
from pipelines.embedding.write import ResultSettings, write_result
from pipelines.encoder.description import EncoderDescription
from pipelines.nightly.compare import (
    Comparison,
    KnownSettings,
    collect_known,
    deleted_ids,
    prepare_comparison,
    retouched_documents,
    settle_ids,
    settled_types,
)
from pipelines.nightly.config import STORE_COLUMNS, STORE_TIMES, TEXT, NightConfig
from pipelines.nightly.reuse import Leftover, ReuseSettings, copy_known_vectors
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, list_files, read_bytes
from pipelines.runtime.machines import ActorPlan
from pipelines.runtime.segments import bytes_to_table
from pipelines.store.columns import document_schema
from pipelines.store.version import Version


@dataclass(frozen=True)
class Before:
    """What a night starts from: the version before, and other places of usable vectors."""

    base: Version | None
    others: Sequence[Version]
    leftovers: Sequence[Leftover]
    same_encoder: bool

    @property
    def stored_types(self) -> dict[str, pa.DataType] | None:
        """Types of the kept columns in the store, the text's not among them."""
        if self.base is None:
            return None
        own = {TEXT, *STORE_COLUMNS, *STORE_TIMES}
        return {f.name: f.type for f in self.base.schema if f.name not in own}


@dataclass(frozen=True)
class Found:
    """The corpus, read and compared with the version before."""

    run: EmbedRun
    scanned: ScanResult
    assembled: Assembled
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


@dataclass(frozen=True)
class Changes:
    """The documents to write are on disk, with vectors; those to delete are known."""

    found: Found
    paths: list[str]
    """Parquet files of documents to write; none of them is empty."""
    schema: pa.Schema
    """Of the store's documents."""
    counts: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)

    def deleted(self) -> Iterator[pa.Array]:
        """Ids that the store must no longer have, failed documents' included."""
        if self.found.comparison is not None:
            yield from deleted_ids(self.found.comparison, self.found.id_type)
        yield from _failed_ids(self.found)

    def retouched(self) -> Iterator[pa.Table]:
        """Id and kept columns of documents whose text has not changed."""
        if self.found.comparison is not None and not self.found.rewrite:
            yield from retouched_documents(self.found.comparison, self.found.id_type)


def find_changes(
    config: NightConfig,
    folder: str,
    files: Sequence[CorpusFile],
    encoder: tuple[ActorPlan, EncoderDescription],
    before: Before,
) -> Found:
    """Read the corpus and compare it; raises :class:`InputError` for one that cannot be used."""
    run = settle_run(config.embed_config(folder), files, *encoder)
    run.plan.save(run.work)
    scanned = scan_corpus(run.scan, run.files, skip_unreadable=config.skip_unreadable_files)
    if not scanned.accepted:
        reasons = ", ".join(f"{why} ({count:,})" for why, count in scanned.reasons.items())
        raise InputError(f"none of {scanned.documents:,} documents can be embedded: {reasons}")
    settings = assemble_settings(run, scanned)
    kept = _kept_types(run, scanned, config)
    rewrite = _must_rewrite(config, before, kept)
    comparison = None
    if before.base is not None or before.others or before.leftovers:
        comparison = _prepare(run, scanned, before, kept, rewrite=rewrite)
        settings = replace(settings, select=comparison.select)
    assembled = assemble_corpus(settings)
    counts = _count(scanned, assembled, comparison)
    id_type = _id_type(scanned, before)
    return Found(run, scanned, assembled, comparison, rewrite, id_type, kept, counts)


def embed_changes(config: NightConfig, found: Found) -> Changes:
    """Copy known vectors, compute the others, and join them with their documents."""
    run, chunks = found.run, found.assembled.chunks
    dimension = run.description.dimension
    reused = copy_known_vectors(
        ReuseSettings(run.work, config.store, dimension, config.float16), chunks
    )
    encode = EncodeSettings(
        run.work, json.dumps(run.description.to_json()), run.actors, config.float16
    )
    speed = embed_chunks(encode, embed.WORKERS, chunks, rejected=found.counts["rejected"])
    results = _results(config, found)
    written = write_result(results, chunks)
    counts = {
        **found.counts,
        "rejected": found.counts["rejected"] + written["failed_rows"],
        "embedded": sum(c.texts for c in chunks if not c.known) - written["failed_texts"],
        "reused": reused,
        "written": written["rows"],
        "tokens": written["tokens"],
    }
    paths = [join(run.config.output, "embeddings", name) for name in _parts(run.config.output)]
    schema = document_schema(
        found.id_type,
        {n: t for n, t in found.kept_types.items() if n != config.text_column},
        dimension,
        results.value_type,
        run.description.fingerprint,
    )
    return Changes(found, paths if written["rows"] else [], schema, counts, dict(speed))


def _prepare(
    run: EmbedRun,
    scanned: ScanResult,
    before: Before,
    kept: Mapping[str, pa.DataType],
    *,
    rewrite: bool,
) -> Comparison:
    """Collect the keys of what is known; how to compare with them."""
    stored = before.stored_types or {}
    compared = {} if rewrite else {n: t for n, t in stored.items() if n in kept}
    known = KnownSettings(run.work, run.plan.partitions, tuple(compared))
    names = collect_known(
        known, before.base, before.others, before.leftovers, same_encoder=before.same_encoder
    )
    json_columns = tuple(scanned.kept_types())
    comparison = Comparison(known, tuple(names), compared, json_columns, rewrite)
    prepare_comparison(comparison)
    return comparison


def _kept_types(run: EmbedRun, scanned: ScanResult, config: NightConfig) -> dict[str, pa.DataType]:
    found = result_settings(run, scanned).kept_types
    return {n: pa.string() if n == config.text_column else kind for n, kind in found.items()}


def _must_rewrite(config: NightConfig, before: Before, kept: dict[str, pa.DataType]) -> bool:
    """Whether the version before cannot be built on; settles the types of kept columns if it can.

    Raises :class:`InputError` where vectors were stored in half precision and are wanted in full.
    """
    stored = before.stored_types
    if before.base is None or stored is None or not before.same_encoder:
        return True
    names = {name for name in kept if name != config.text_column}
    is_half = before.base.schema.field("embedding").type.value_type == pa.float16()
    if is_half and not config.float16:
        raise InputError(
            f"{config.store} holds vectors in half precision: pass --float16, or begin a new store"
        )
    if names != set(stored) or is_half != config.float16:
        return True
    kept.update(settled_types(kept, stored))
    return False


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


def _count(
    scanned: ScanResult, assembled: Assembled, comparison: Comparison | None
) -> dict[str, int]:
    """Documents by what became of them: documents = new + changed + unchanged + the rest."""
    selected = assembled.selected
    repeats = selected.get("repeats", 0)
    kept = scanned.accepted - assembled.repeated_ids - repeats
    if comparison is None:
        # where texts are their own ids, repeats of a text are left out as they are written
        kept -= _repeats_of_own_ids(scanned, assembled)
        repeats = _repeats_of_own_ids(scanned, assembled)
        changes = {"new": kept, "changed": 0, "deleted": 0}
    else:
        changes = settle_ids(comparison)
    counts = {
        "documents": scanned.documents,
        **changes,
        "retouched": selected.get("retouched", 0),
        "unchanged": selected.get("unchanged", 0),
        "repeats": repeats,
        "rejected": scanned.documents - scanned.accepted + assembled.repeated_ids,
    }
    told = sum(n for kind, n in counts.items() if kind not in ("documents", "deleted"))
    if told != counts["documents"]:
        raise RuntimeError(f"the counts do not add up, so rows were lost or doubled: {counts}")
    return counts


def _repeats_of_own_ids(scanned: ScanResult, assembled: Assembled) -> int:
    documents = sum(chunk.documents for chunk in assembled.chunks)
    return scanned.accepted - assembled.repeated_ids - documents


def _results(config: NightConfig, found: Found) -> ResultSettings:
    return replace(
        result_settings(found.run, found.scanned),
        id_type=found.id_type,
        kept_types=found.kept_types,
        names={config.text_column: TEXT},
    )


def _parts(output: str) -> list[str]:
    names = list_files(join(output, "embeddings"))
    return [name for name in names if name.endswith(".parquet") and name[0] != "."]


def _failed_ids(found: Found) -> Iterator[pa.Array]:
    """Documents that have no vector: an older state of them must not stay in the store."""
    folder = join(found.run.work, "rejected")
    for name in list_files(folder):
        if name.startswith("part-"):
            ids = bytes_to_table(read_bytes(join(folder, name)))["id"].combine_chunks()
            if len(ids):
                yield pc.cast(ids, found.id_type)
