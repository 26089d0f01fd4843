"""A corpus to pairs of texts that mean the same, for contrastive training without labels.

In: files of documents. Out: ``pairs/*.parquet`` with ``anchor``, ``positive``, ``id``, ``method``,
``sketch`` (what near-duplicates share) and, where asked for, ``label``. One unit of work a shard of
the corpus, one file a unit; what is done is not done again when a run is repeated after a kill.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.documents import read_documents, require_readable
from pipelines.corpus.files import (
    CorpusFile,
    Shard,
    find_files,
    listing_digest,
    listing_of,
)
from pipelines.corpus.readers import inspect_files
from pipelines.encoder.answers import clean_answer
from pipelines.runtime.command import JobResult
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    join,
    list_files,
    make_folder,
    remove_files,
    remove_folder,
    shoal_home,
    write_table,
)
from pipelines.runtime.packaged import build_once, load_labelled_corpus
from pipelines.runtime.run_record import RunRecord, require_unchanged
from pipelines.runtime.units import Receipt, configure_ray_data, run_actor_stage, run_stage
from pipelines.training.batches import sketch
from pipelines.training.config import PairsConfig
from pipelines.training.rewriting import ALL_REASONING, Rewriter, fault_of

PlainMethod = Literal["auto", "crop", "noise", "dropout"]
"""``auto``: crops of texts that hold two, two halves of shorter ones unless ``halves`` is off,
noise on the rest (with halves, three words or fewer). ``crop``: two random pieces of the text
(contrastive cropping, Meng et al. 2021, arXiv:2102.08473). ``noise``: the text, and the text with
words deleted and swapped and characters mistyped. ``dropout``: the text twice, told apart by the
model's dropout alone (SimCSE, Gao et al. 2021, arXiv:2104.08821)."""

PLAIN_METHODS: tuple[str, ...] = get_args(PlainMethod)

# Scripts that put no spaces between words: one character counts as a word there.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def document_generator(seed: int, document: str, number: int = 0) -> np.random.Generator:
    """The random numbers of a document's pair of this number."""
    digest = hashlib.sha256(f"{seed} {number} {document}".encode("utf-8", "replace")).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def crop_pair(
    text: str, generator: np.random.Generator, words: tuple[int, int]
) -> tuple[str, str] | None:
    """Two different random pieces of ``text``, or None where it is too short.

    Args:
        text: at least one word longer than the shortest crop.
        generator: decides lengths and places.
        words: fewest and most words of a piece.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    fewest, most = words[0], min(words[1], len(spans) - 1)
    if most < fewest:
        return None
    pieces: list[tuple[int, int]] = []
    while len(pieces) < 2:
        length = int(generator.integers(fewest, most + 1))
        first = int(generator.integers(0, len(spans) - length + 1))
        piece = (spans[first][0], spans[first + length - 1][1])
        if piece not in pieces:
            pieces.append(piece)
    anchor, positive = (text[start:stop] for start, stop in pieces)
    return None if anchor == positive else (anchor, positive)


def noise_pair(text: str, generator: np.random.Generator, rate: float) -> tuple[str, str] | None:
    """``text`` and a damaged copy, or None where nothing could be damaged.

    Of its words a share of ``rate`` each is deleted, swapped with the next, or mistyped in one
    character. At least one word is left.
    """
    words = text.split()
    action = generator.random(len(words))
    damaged: list[str] = []
    swap_next = False
    for word, chance in zip(words, action, strict=True):
        if chance < rate and len(words) > 1:
            continue
        damaged.append(mistype(word, generator) if chance >= 1 - rate else word)
        if swap_next and len(damaged) > 1:
            damaged[-2:] = damaged[:-3:-1]
        swap_next = rate <= chance < 2 * rate
    result = " ".join(damaged)
    return None if not result or result == " ".join(words) else (text, result)


def halves(text: str, generator: np.random.Generator) -> tuple[str, str] | None:
    """The words before and after a place in the middle third of ``text``; None where equal."""
    spans = [match.span() for match in _WORD.finditer(text)]
    if len(spans) < 2:
        return None
    third = max(1, len(spans) // 3)
    cut = int(generator.integers(third, len(spans) - third + 1))
    first, second = text[: spans[cut - 1][1]].strip(), text[spans[cut][0] :].strip()
    return None if first == second else (first, second)


def suited_pair(
    text: str, generator: np.random.Generator, config: PairsConfig
) -> tuple[tuple[str, str] | None, str]:
    """The pair that a text's length allows, and what it was made by."""
    words = sum(1 for _ in _WORD.finditer(text))
    if words >= 2 * config.crop_words[0]:
        return crop_pair(text, generator, config.crop_words), "crop"
    if config.halves and words >= _FEWEST_HALVED and (pair := halves(text, generator)):
        return pair, "halves"
    tries = (noise_pair(text, generator, config.noise_rate) for _ in range(_NOISE_TRIES))
    return next((pair for pair in tries if pair is not None), None), "noise"


def mistype(word: str, generator: np.random.Generator) -> str:
    """``word`` with one character deleted, doubled or replaced by a letter."""
    place = int(generator.integers(len(word)))
    replacement = ["", word[place] * 2, _LETTERS[int(generator.integers(26))]]
    return word[:place] + replacement[int(generator.integers(3))] + word[place + 1 :]


# Noise alone is too easy to learn from: on texts of ten words it took the V-measure of Reuters R8
# from 0.214 to 0.186 in 15 steps (benchmarks/short_texts.py --steps 15 --documents 300). With a
# teacher it does no harm, and halves are texts that nobody embeds: headlines tuned on with one had
# 0.659 with noise and 0.636 with halves (docs/results.md).
_FEWEST_HALVED = 4
_NOISE_TRIES = 50  # of four words with the default rate, all are left as they are in 24% of tries
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
        require_unchanged(config.output, previous, "corpus_digest", digest)
        return _result(config, previous["counts"], previous["metrics"])
    work = join(config.output, WORK_FOLDER)
    made = make_pairs(config, files, config.output, work)
    counts = made.counts
    metrics = {
        "corpus_digest": digest,
        "left_out": dict(made.left_out.most_common()),
        "made_by": dict(made.made_by.most_common()),
    }
    record.complete(counts, metrics)
    remove_folder(work)
    return _result(config, counts, metrics)


def find_corpus(config: PairsConfig) -> Sequence[CorpusFile]:
    """The corpus's files, looked into, in shards of work; :class:`InputError` for unreadable."""
    corpus = config.corpus or str(training_corpus())
    shard_bytes = _SHARD_BYTES.get(config.method, _PLAIN_SHARD_BYTES)
    files = inspect_files(
        find_files(corpus, config.reading),
        config.columns,
        shard_bytes=shard_bytes,
        options=config.reading,
    )
    require_readable(files)
    return files


@dataclass(frozen=True)
class MadePairs:
    """How many ``documents`` gave how many ``pairs``, why some gave none, how pairs are made."""

    counts: dict[str, int]
    left_out: Counter[str]
    made_by: Counter[str]


def make_pairs(
    config: PairsConfig, files: Sequence[CorpusFile], output: str, work: str
) -> MadePairs:
    """Write ``pairs/`` below ``output``; what an earlier try made of other files there is deleted.

    Raises :class:`InputError` where there is no pair at all.
    """
    configure_ray_data()
    folder = join(output, PAIRS_FOLDER)
    make_folder(folder)
    shards = {shard.name: shard for file in files for shard in file.shards()}
    units = {name: shard.to_unit() for name, shard in shards.items()}
    for place, ending in ((join(work, "make"), "json"), (folder, "parquet")):
        current = {f"{name}.{ending}" for name in units}
        remove_files([join(place, name) for name in list_files(place) if name not in current])
    function = functools.partial(make_shard_pairs, config, folder)
    if config.method in PLAIN_METHODS:
        receipts = run_stage(work, "make", units, function)
    else:
        receipts = run_actor_stage(
            work, "make", units, function, functools.partial(Rewriter, config),
            num_actors=config.num_actors,
        )  # fmt: skip
    left_out: Counter[str] = Counter()
    made_by: Counter[str] = Counter()
    for receipt in receipts.values():
        left_out.update(receipt["left_out"])
        made_by.update(receipt["made_by"])
    counts = {k: sum(r[k] for r in receipts.values()) for k in ("documents", "pairs")}
    if not counts["pairs"]:
        top = ", ".join(f"{why} ({count:,})" for why, count in left_out.most_common(3))
        raise InputError(
            f"{counts['documents']:,} documents gave no pair by method {config.method}: "
            f"{top or 'the corpus is empty'}"
        )
    return MadePairs(counts, left_out, made_by)


def make_shard_pairs(
    config: PairsConfig, folder: str, name: str, unit: dict[str, Any], rewriter: Any = None
) -> Receipt:
    """Make the pairs of one shard and write them as one file; what was made and what was not."""
    shard = Shard.from_unit(unit)
    left_out: Counter[str] = Counter()
    documents = [
        SourceText(document.id, document.text, *map(_label, document.kept))
        for document in read_documents(shard, config.columns, left_out)
    ]
    read = len(documents) + left_out.total()
    if rewriter is None:
        rows = list(plain_pairs(config, documents, left_out))
    else:
        rows = list(rewritten_pairs(config, documents, left_out, rewriter, name))
    table = pa.Table.from_pylist([asdict(row) for row in rows], _PAIR_SCHEMA)
    if not config.label_column:
        table = table.drop_columns(["label"])
    sketches = {
        d.id: s for d, s in zip(documents, sketch([d.text for d in documents]), strict=True)
    }
    table = table.append_column(
        "sketch", pa.array([sketches[row.id] for row in rows], pa.list_(pa.int64()))
    )
    write_table(join(folder, f"{name}.parquet"), table)
    made_by = Counter(row.method for row in rows)
    return {
        "documents": read, "pairs": len(rows), "left_out": dict(left_out), "made_by": dict(made_by),
    }  # fmt: skip


@dataclass(frozen=True)
class SourceText:
    """A document that pairs are made of."""

    id: str
    text: str
    label: str | None = None


@dataclass(frozen=True)
class Pair:
    """A row of ``pairs/*.parquet``."""

    anchor: str
    positive: str
    id: str
    label: str | None
    method: str


_PAIR_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("anchor", "positive", "id", "label", "method")]
)


def _label(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return None if value is None or value == "" else str(value)


def plain_pairs(
    config: PairsConfig, documents: Sequence[SourceText], left_out: Counter[str]
) -> Iterator[Pair]:
    """Pairs of documents by a method that needs no model."""
    for document in documents:
        for number in range(config.pairs_per_document):
            generator = document_generator(config.seed, document.id, number)
            made_by: str = config.method
            match config.method:
                case "auto":
                    pair, made_by = suited_pair(document.text, generator, config)
                case "crop":
                    pair = crop_pair(document.text, generator, config.crop_words)
                case "noise":
                    pair = noise_pair(document.text, generator, config.noise_rate)
                case _:
                    pair = (document.text, document.text)
            if pair is None:
                left_out["too short"] += 1
                break
            yield Pair(*pair, document.id, document.label, made_by)


def rewritten_pairs(
    config: PairsConfig,
    documents: Sequence[SourceText],
    left_out: Counter[str],
    rewriter: Any,
    salt: str,
) -> Iterator[Pair]:
    """Pairs of documents, the positive written by a model."""
    by_length = sorted(documents, key=lambda document: (len(document.text), document.id))
    for number in range(config.pairs_per_document):
        answers = rewriter.rewrite([document.text for document in by_length], f"{salt} {number}")
        for document, raw in zip(by_length, answers, strict=True):
            if raw is None:
                left_out[ALL_REASONING] += 1
                continue
            answer = clean_answer(raw)
            fault = fault_of(document.text, answer)
            if fault:
                left_out[fault] += 1
            else:
                yield Pair(document.text, answer, document.id, document.label, config.method)


def training_corpus() -> Path:
    """A Parquet file of the training documents of 20 Newsgroups: ``id``, ``text``, ``label``.

    The demo corpus is drawn from its test documents, so the two share none.
    """
    return build_once(
        shoal_home() / "corpora" / "20newsgroups-train.parquet",
        lambda target: pq.write_table(load_labelled_corpus("20newsgroups", "train"), target),
    )


def _result(
    config: PairsConfig, counts: Mapping[str, int], metrics: Mapping[str, Any]
) -> JobResult:
    shown = {name: f"{value:,}" for name, value in counts.items()}
    shown |= {f"made by {how}": f"{n:,}" for how, n in metrics.get("made_by", {}).items()}
    shown |= {f"left out: {why}": f"{n:,}" for why, n in metrics["left_out"].items()}
    return JobResult(dict(counts), dict(metrics), {**shown, "output": config.output})
