"""A corpus to pairs of texts that mean the same, for contrastive training without labels.

In: files of documents. Out: ``pairs/*.parquet`` with ``anchor``, ``positive``, ``id``, ``method``
and, where asked for, ``label``. One unit of work a shard of the corpus, one file a unit; what is
done is not done again when a run is repeated after a kill.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.command_line import JobResult
from pipelines.corpus import Columns, CorpusFile, Shard, find_files, inspect_files
from pipelines.embed import configure_ray_data
from pipelines.embedding.actor_stage import run_actor_stage
from pipelines.embedding.documents import check_id, check_text
from pipelines.embedding.readers import read_shard
from pipelines.embedding.stages import Receipt, run_stage
from pipelines.embedding.work_plan import listing_digest, listing_of
from pipelines.errors import InputError
from pipelines.packaged import build_once, load_labelled_corpus
from pipelines.run_record import RunRecord
from pipelines.storage import (
    atomic_output,
    join,
    make_folder,
    remove_folder,
    shoal_home,
)
from pipelines.training.pair_methods import (
    PLAIN_METHODS,
    crop_pair,
    document_generator,
    noise_pair,
)
from pipelines.training.pairs_config import PairsConfig
from pipelines.training.rewriting import Rewriter, clean_answer, fault_of

PAIRS_FOLDER = "pairs"
WORK_FOLDER = "_work"
_SHARD_BYTES = {"paraphrase": 1 << 17, "backtranslate": 1 << 17}
_PLAIN_SHARD_BYTES = 16 << 20


def generate_pairs(config: PairsConfig, record: RunRecord) -> JobResult:
    """Make pairs of a corpus in ``config.output``, going on with what is there.

    Raises :class:`InputError` for a corpus that cannot be read and for one that gives no pair.
    """
    files = find_corpus(config)
    digest = listing_digest(listing_of(files))
    previous = record.previous or {}
    if previous.get("status") == "complete":
        if previous["metrics"].get("corpus_digest") != digest:
            raise InputError(
                f"{config.output} holds the pairs of this corpus as it was at "
                f"{previous['started_at']}; it has changed since: choose another --output"
            )
        return _result(config, previous["counts"], previous["metrics"])
    work = join(config.output, WORK_FOLDER)
    counts, left_out = make_pairs(config, files, config.output, work)
    metrics = {"corpus_digest": digest, "left_out": dict(left_out.most_common())}
    record.counts.update(counts)
    record.metrics.update(metrics)
    record.complete()
    remove_folder(work)
    return _result(config, counts, metrics)


def find_corpus(config: PairsConfig) -> Sequence[CorpusFile]:
    """The corpus's files, looked into, in shards of work; :class:`InputError` for unreadable."""
    corpus = config.corpus or str(training_corpus())
    shard_bytes = _SHARD_BYTES.get(config.method, _PLAIN_SHARD_BYTES)
    files = inspect_files(find_files(corpus), config.columns, shard_bytes=shard_bytes)
    for file in files:
        if file.problem:
            raise InputError(f"{file.path}: {file.problem}; mend or remove the file")
    return files


def make_pairs(
    config: PairsConfig, files: Sequence[CorpusFile], output: str, work: str
) -> tuple[dict[str, int], Counter[str]]:
    """Write ``pairs/`` below ``output``; the counts, and why documents gave no pair.

    Raises :class:`InputError` where there is no pair at all.
    """
    configure_ray_data()
    make_folder(join(output, PAIRS_FOLDER))
    shards = {shard.name: shard for file in files for shard in file.shards()}
    units = {name: asdict(shard) for name, shard in shards.items()}
    function = functools.partial(make_shard_pairs, config, join(output, PAIRS_FOLDER))
    if config.method in PLAIN_METHODS:
        receipts = run_stage(work, "make", units, function)
    else:
        receipts = run_actor_stage(
            work, "make", units, function, functools.partial(Rewriter, config.rewriter),
            num_actors=config.num_actors,
        )  # fmt: skip
    left_out: Counter[str] = Counter()
    for receipt in receipts.values():
        left_out.update(receipt["left_out"])
    counts = {k: sum(r[k] for r in receipts.values()) for k in ("documents", "pairs")}
    if not counts["pairs"]:
        top = ", ".join(f"{why} ({count:,})" for why, count in left_out.most_common(3))
        raise InputError(
            f"{counts['documents']:,} documents gave no pair: {top or 'the corpus is empty'}"
        )
    return counts, left_out


def make_shard_pairs(
    config: PairsConfig, folder: str, name: str, unit: dict[str, Any], rewriter: Any = None
) -> Receipt:
    """Make the pairs of one shard and write them as one file; what was made and what was not."""
    shard = Shard(CorpusFile(**unit["file"]), unit["start"], unit["stop"])
    left_out: Counter[str] = Counter()
    documents = list(read_documents(shard, config.columns, left_out))
    if rewriter is None:
        rows = list(plain_pairs(config, documents, left_out))
    else:
        rows = list(rewritten_pairs(config, documents, left_out, rewriter, name))
    names = ["anchor", "positive", "id", *(["label"] if config.label_column else [])]
    table = pa.table(
        [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        if rows
        else [pa.array([], pa.string()) for _ in names],
        names=names,
    )
    table = table.append_column("method", pa.array([config.method] * len(table), pa.string()))
    with atomic_output(join(folder, f"{name}.parquet")) as sink:
        pq.write_table(table, sink)
    read = len(documents) + sum(v for k, v in left_out.items() if k.startswith(("text ", "id ")))
    return {"documents": read, "pairs": len(table), "left_out": dict(left_out)}


def read_documents(
    shard: Shard, columns: Columns, left_out: Counter[str]
) -> Iterator[tuple[str, ...]]:
    """(id, text) or (id, text, label) of each document of a shard; the others are counted."""
    for batch in read_shard(shard, columns):
        kept = batch.kept.to_pydict() if isinstance(batch.kept, pa.Table) else None
        labels = list(kept.values()) if kept is not None else batch.kept
        for place, found in enumerate(batch.texts):
            text, raw, reason = check_text(found)
            row_id: str | None = None
            if batch.ids is not None and not reason:
                row_id, reason = check_id(batch.ids[place])
            reason = batch.problems[place] or reason
            if reason:
                left_out[reason] += 1
                continue
            document = row_id or content_id(raw)
            yield (document, text, *(str(column[place]) for column in labels))


def plain_pairs(
    config: PairsConfig, documents: Sequence[tuple[str, ...]], left_out: Counter[str]
) -> Iterator[tuple[str, ...]]:
    """(anchor, positive, id[, label]) of documents, by a method that needs no model."""
    for document, text, *label in documents:
        for number in range(config.pairs_per_document):
            generator = document_generator(config.seed, document, number)
            match config.method:
                case "crop":
                    pair = crop_pair(text, generator, config.crop_words)
                case "noise":
                    pair = noise_pair(text, generator, config.noise_rate)
                case _:
                    pair = (text, text)
            if pair is None:
                left_out["too short"] += 1
                break
            yield (*pair, document, *label)


def rewritten_pairs(
    config: PairsConfig,
    documents: Sequence[tuple[str, ...]],
    left_out: Counter[str],
    rewriter: Any,
    salt: str,
) -> Iterator[tuple[str, ...]]:
    """(anchor, positive, id[, label]) of documents, the positive written by a model."""
    by_length = sorted(documents, key=lambda row: (len(row[1]), row[0]))
    for number in range(config.pairs_per_document):
        answers = rewriter.rewrite([text for _, text, *_ in by_length], f"{salt} {number}")
        for (document, text, *label), raw in zip(by_length, answers, strict=True):
            answer = clean_answer(raw)
            fault = fault_of(text, answer)
            if fault:
                left_out[fault] += 1
            else:
                yield (text, answer, document, *label)


def content_id(raw: bytes) -> str:
    """The id of a document that has none: the SHA-256 of its text."""
    return hashlib.sha256(raw).hexdigest()


def training_corpus() -> Path:
    """A Parquet file of the training documents of 20 Newsgroups: ``id``, ``text``, ``label``.

    The demo corpus is drawn from its test documents, so the two share none.
    """
    path = shoal_home() / "corpora" / "20newsgroups-train.parquet"
    if not path.exists():
        with build_once(path) as target:
            if target is not None:
                pq.write_table(load_labelled_corpus("20newsgroups", "train"), target)
    return path


def _result(
    config: PairsConfig, counts: Mapping[str, int], metrics: Mapping[str, Any]
) -> JobResult:
    shown = {name: f"{value:,}" for name, value in counts.items()}
    shown |= {f"left out: {why}": f"{n:,}" for why, n in metrics["left_out"].items()}
    return JobResult(dict(counts), dict(metrics), {**shown, "output": config.output})
