"""Documents to passages: where long texts are cut, and the rows that come of it.

In: texts, and a reader that knows the model's tokens. Out: of each text the passages as [start,
stop) in characters, and rows of passages in place of rows of documents. A passage begins and ends
with a character that is not blank, and every such character of the text is in one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.runtime.errors import InputError

PASSAGE_COLUMNS = ("document_id", "passage", "start", "stop")
FEWEST_TOKENS = 8
"""Of a passage: a single character can be several tokens."""
_READ_CHARACTERS = 1 << 20
_AHEAD = 16
_KINDS = ("tokens", "sentences")

Cutter = Callable[[Sequence[str]], "list[np.ndarray]"]
"""Texts to their passages: of each int64 (p, 2), start and stop in characters."""


@dataclass(frozen=True)
class PassageOptions:
    """Whether documents are cut, and how."""

    passages: str = ""
    """Cut documents into passages, each with a vector: `tokens:N` of the model's own tokens, or
    `sentences:N`, whole ones of together N tokens at most; without N as many as --max-tokens."""
    passage_overlap: int = 0
    """Tokens that a passage has in common with the one before it; with --passages tokens:N."""

    def check_passages(self) -> None:
        """Raise :class:`InputError` for values that mean nothing."""
        kind, _, number = self.passages.partition(":")
        if not self.passages:
            if self.passage_overlap:
                raise InputError("--passage-overlap has no effect without --passages tokens:N")
            return
        if kind not in _KINDS or (":" in self.passages and not number.isdecimal()):
            raise InputError(
                f"--passages is {self.passages!r}; it must be tokens:N or sentences:N with a number"
            )
        if number and int(number) < FEWEST_TOKENS:
            raise InputError(
                f"--passages is {self.passages!r}; a passage needs {FEWEST_TOKENS} tokens at least"
            )
        if self.passage_overlap and kind == "sentences":
            raise InputError("--passage-overlap has no effect with --passages sentences")
        if self.passage_overlap < 0 or (number and self.passage_overlap >= int(number)):
            raise InputError(
                f"--passage-overlap is {self.passage_overlap}; it must be from 0 to below the "
                f"tokens of a passage, {number or '--max-tokens'}"
            )

    def cuts(self, max_tokens: int) -> Cuts | None:
        """How documents are cut for an encoder that reads ``max_tokens`` of a text; None: not.

        Raises :class:`InputError` for passages that it could not read to their end.
        """
        if not self.passages:
            return None
        kind, _, number = self.passages.partition(":")
        tokens = int(number or max_tokens)
        if tokens > max_tokens:
            raise InputError(
                f"--passages is {self.passages!r}, but the encoder reads {max_tokens} tokens of a "
                f"text: ask for shorter passages, or pass --max-tokens {tokens}"
            )
        if tokens < FEWEST_TOKENS or self.passage_overlap >= tokens:
            raise InputError(
                f"--max-tokens is {max_tokens}; passages need {FEWEST_TOKENS} tokens at least, and "
                f"more than --passage-overlap {self.passage_overlap}"
            )
        return Cuts(tokens, self.passage_overlap, kind == "sentences")


@dataclass(frozen=True)
class Cuts:
    """How texts are cut: tokens of a passage at most, and of its overlap with the one before."""

    tokens: int
    overlap: int = 0
    sentences: bool = False


class TokenReader(Protocol):
    """What is asked of a model's tokenizer."""

    def offsets(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Where the tokens of each text are, int64 (t, 2): start and stop in characters."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of its own each text has in its prompt."""


def cut_texts(texts: Sequence[str], cuts: Cuts, reader: TokenReader) -> list[np.ndarray]:
    """Passages of each text, int64 (p, 2): start and stop in characters, one at least.

    A passage ends after ``cuts.tokens`` of the text's tokens or, with ``cuts.sentences``, at the
    last end of a sentence before that (a longer sentence is cut by tokens). Read on its own it may
    have more tokens than as a part of the text; it then ends that much earlier. It overlaps with
    the one before by exactly ``cuts.overlap`` tokens of the text, or by fewer where a cut would
    part the tokens of one character, or the passage would hold nothing new. None is longer than
    asked unless it is a single character.
    """
    done: list[np.ndarray] = []
    start = 0
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and (stop == start or size + len(texts[stop]) <= _READ_CHARACTERS):
            size += len(texts[stop])
            stop += 1
        done += _cut_some(texts[start:stop], cuts, reader)
        start = stop
    return done


def _cut_some(texts: Sequence[str], cuts: Cuts, reader: TokenReader) -> list[np.ndarray]:
    pieces = [list(_pieces(text)) for text in texts]
    offsets = iter(reader.offsets([piece for some in pieces for piece in some]))
    planned = []
    for text, some in zip(texts, pieces, strict=True):
        parts, begin = [], 0
        for piece in some:
            parts.append(next(offsets) + begin)
            begin += len(piece)
        planned.append(_Plan(text, np.concatenate(parts), cuts))
    open_plans = [plan for plan in planned if not plan.done]
    while open_plans:
        proposed = [plan.propose() for plan in open_plans]
        counts = iter(reader.count([t for texts_ahead in proposed for t in texts_ahead]))
        for plan, texts_ahead in zip(open_plans, proposed, strict=True):
            plan.settle([next(counts) for _ in texts_ahead])
        open_plans = [plan for plan in open_plans if not plan.done]
    return [np.array(plan.passages, np.int64).reshape(-1, 2) for plan in planned]


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of about a million characters, parted before a blank where there is one."""
    start = 0
    while len(text) - start > _READ_CHARACTERS:
        stop = start + _READ_CHARACTERS
        blanks = (text.rfind(mark, start + 1, stop) for mark in "\n ")
        stop = next((place for place in blanks if place > start), stop)
        yield text[start:stop]
        start = stop
    yield text[start:]


@dataclass
class _Plan:
    """The passages of one text, settled from its beginning on.

    A cut is a number of tokens that come before it. ``begins`` and ``finishes`` say of every cut
    where a passage begins that starts there, and where one finishes that ends there.
    """

    text: str
    offsets: np.ndarray
    cuts: Cuts
    passages: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        following, before = _not_blank(self.text)
        count = len(self.offsets)
        starts = np.append(np.maximum.accumulate(self.offsets[:, 0]), len(self.text))
        reached = np.maximum.accumulate(np.append(0, self.offsets[:, 1]))
        self.begins = following[starts]
        self.begins[0] = following[0]
        self.finishes = before[self.begins]
        # no cut within a character, and of several around a blank only the first
        allowed = reached <= self.begins
        allowed[1:] &= self.begins[:-1] < self.begins[1:]
        allowed &= (self.begins > following[0]) & (self.begins < len(self.text))
        self.places = np.append(np.flatnonzero(allowed), count)
        self.best = self.places
        if self.cuts.sentences:
            ends = following[_sentence_ends(self.text)]
            self.best = self.places[np.isin(self.begins[self.places], ends)]
            self.best = np.union1d(self.best, [count])
        self.start, self.most = self._solid(0), self.cuts.tokens
        self.ahead: list[tuple[int, int]] = []
        self.reached = 0
        whole = (int(following[0]), int(before[len(self.text)]))
        # what is known of its tokens as a part of the text holds for all of it
        self.done = not count or (count <= self.cuts.tokens and whole == (0, len(self.text)))
        if self.done:
            self.passages = [whole]

    def propose(self) -> list[str]:
        """Texts of the next passages, as the tokens of the whole text would have them."""
        start, most = self.start, self.most
        self.ahead = []
        while len(self.ahead) < _AHEAD:
            stop = self._cut_before(start, start + most)
            self.ahead.append((start, stop))
            if stop >= len(self.offsets):
                break
            start, most = self._next_start(start, stop), self.cuts.tokens
        return [self.text[self.begins[a] : self.finishes[b]] for a, b in self.ahead]

    def settle(self, counts: Sequence[int]) -> None:
        """Take the proposed passages up to the first of too many tokens, which is to be cut."""
        for (start, stop), tokens in zip(self.ahead, counts, strict=True):
            excess = tokens - self.cuts.tokens
            self.start, self.most = start, stop - start - excess
            shorter = self._cut_before(start, start + self.most)
            if excess > 0 and shorter < stop:
                if shorter <= self.reached:  # it would hold nothing new: begin later
                    self.start = self._solid(self._place_from(start + 1))
                    self.most = self.cuts.tokens
                return
            self.passages.append((int(self.begins[start]), int(self.finishes[stop])))
            self.start, self.most = self._next_start(start, stop), self.cuts.tokens
            self.reached = stop
            self.done = stop >= len(self.offsets)

    def _cut_before(self, start: int, limit: int) -> int:
        """The last cut after ``start`` up to ``limit``, at a sentence's end if any; else the first.

        The first is beyond the limit where a single character is.
        """
        for places in (self.best, self.places):
            place = int(np.searchsorted(places, limit, side="right")) - 1
            if place >= 0 and places[place] > start:
                return int(places[place])
        return int(self.places[np.searchsorted(self.places, start, side="right")])

    def _next_start(self, start: int, stop: int) -> int:
        """The first token of the next passage, which reaches further than this one."""
        place = self._place_from(max(stop - self.cuts.overlap, start + 1))
        while place < stop:
            first = self._solid(place)
            if self._cut_before(first, first + self.cuts.tokens) > stop:
                return first
            place = self._place_from(place + 1)
        return self._solid(stop)

    def _place_from(self, place: int) -> int:
        """The first cut at ``place`` or after it."""
        return int(self.places[np.searchsorted(self.places, place)])

    def _solid(self, place: int) -> int:
        """The first token from ``place`` on that is not of blanks only."""
        return int(np.searchsorted(self.begins, self.begins[place], side="right")) - 1


@lru_cache(maxsize=1)
def _blanks() -> np.ndarray:
    marks = [code for code in range(0x110000) if chr(code).isspace()]
    return np.array(marks, np.uint32)


def _not_blank(text: str) -> tuple[np.ndarray, np.ndarray]:
    """For every place 0 to n of a text, int64 (n + 1,): the next character that is not blank, n
    without one; and the end of the last such before it, 0 without one."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    solid = ~np.isin(codes, _blanks())
    count = len(codes)
    places = np.arange(count)
    following = np.append(np.where(solid, places, count), count)
    following = np.minimum.accumulate(following[::-1])[::-1]
    before = np.maximum.accumulate(np.append(0, np.where(solid, places + 1, 0)))
    return following, before


def _sentence_ends(text: str) -> np.ndarray:
    """Where sentences end, int64 (n,), by Unicode's rules (UAX #29).

    A line that begins with a small letter goes on with the sentence of the line before.
    """
    from icu4py.breakers import SentenceBreaker
    from icu4py.locale import Locale

    joined = re.sub(r"\n(?=(\S))", lambda m: " " if m[1].islower() else "\n", text)
    # its offsets count UTF-16 units, its pieces are whole
    lengths = [len(sentence) for sentence in SentenceBreaker(joined, Locale("en"))]
    return np.cumsum(lengths, dtype=np.int64)


def passage_rows(documents: pa.Table, passages: Sequence[np.ndarray], first_row: int) -> pa.Table:
    """A row a passage in place of a row a document.

    A passage's id is its document's, ``#`` and its number: no two rows can have the same, since
    every row's id ends so. ``document`` is the row of its document's first passage, ``own`` whether
    the document has an id of its own.

    Args:
        documents: checked documents, with kept columns.
        passages: of each document int64 (p, 2), start and stop in characters.
        first_row: the first one's row.
    """
    counts = np.array([len(some) for some in passages], dtype=np.int64)
    index = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    numbers = np.arange(len(index)) - firsts[index]
    places = np.concatenate([np.empty((0, 2), np.int64), *passages])
    whole, hashes = documents["text"].to_pylist(), documents["text_sha256"].to_pylist()
    own = documents["id"].is_valid()
    ids = [
        digest.hex() if row_id is None else row_id
        for row_id, digest in zip(documents["id"].to_pylist(), hashes, strict=True)
    ]
    texts = [whole[i][a:b] for i, (a, b) in zip(index.tolist(), places.tolist(), strict=True)]
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    names = [f"{ids[i]}#{n}" for i, n in zip(index.tolist(), numbers.tolist(), strict=True)]
    taken = pa.array(index)
    columns = {
        "row": pa.array(first_row + np.arange(len(index)), pa.int64()),
        "id": pa.array(names, pa.large_string()),
        "text_sha256": pa.array(digests, pa.binary(32)),
        "text": pa.array(texts, pa.large_string()),
        "document": pa.array(first_row + firsts[index], pa.int64()),
        "own": own.combine_chunks().take(taken),
    }
    kept = [name for name in documents.column_names if name.startswith("kept.")]
    columns |= {name: documents[name].combine_chunks().take(taken) for name in kept}
    columns["kept.document_id"] = pa.array([ids[i] for i in index.tolist()], pa.large_string())
    columns["kept.passage"] = pa.array(numbers, pa.int32())
    columns["kept.start"] = pa.array(places[:, 0], pa.int64())
    columns["kept.stop"] = pa.array(places[:, 1], pa.int64())
    return pa.table(columns)


def cuts_of(passages: pa.Table) -> pa.Table:
    """Where documents were cut: the second read goes by it, and needs no tokenizer."""
    first = pc.equal(passages["row"], passages["document"])
    return pa.table(
        {"first": first, "start": passages["kept.start"], "stop": passages["kept.stop"]}
    )


def passage_types(document_id: pa.DataType) -> dict[str, pa.DataType]:
    """Types of :data:`PASSAGE_COLUMNS`."""
    kinds = (document_id, pa.int32(), pa.int64(), pa.int64())
    return dict(zip(PASSAGE_COLUMNS, kinds, strict=True))
