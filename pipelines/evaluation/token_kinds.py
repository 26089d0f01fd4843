"""Which part of a prompted text a token belongs to, and what kind of word it is of.

A content word is one that carries a topic: not a function word of English, a number or a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

PARTS = ("prefix", "body", "suffix")
KINDS = ("content", "function", "other")


@dataclass(frozen=True)
class PromptedToken:
    """One token of a prompted text.

    ``part`` is one of :data:`PARTS`; ``kind`` one of :data:`KINDS` for a body's token, else None.
    """

    token_id: int
    text: str
    part: str
    kind: str | None


def describe_tokens(
    tokenizer: Any, token_ids: Sequence[int], prefix_tokens: int, suffix_tokens: int
) -> list[PromptedToken]:
    """Each token of a text with its part and kind.

    Args:
        tokenizer: the model's.
        token_ids: the text within its prompt.
        prefix_tokens: how many of them come before the body.
        suffix_tokens: how many come after it.
    """
    stop = len(token_ids) - suffix_tokens
    pieces = [tokenizer.decode([token]) for token in token_ids]
    kinds = word_kinds(
        _spaced(tokenizer, token_ids[prefix_tokens:stop], pieces[prefix_tokens:stop])
    )
    tokens = []
    for place, (token, piece) in enumerate(zip(token_ids, pieces, strict=True)):
        part = "prefix" if place < prefix_tokens else "body" if place < stop else "suffix"
        kind = kinds[place - prefix_tokens] if part == "body" else None
        tokens.append(PromptedToken(int(token), piece, part, kind))
    return tokens


def word_kinds(pieces: Sequence[str]) -> list[str]:
    """The kind of the word of each piece of a text; a piece that begins a word begins with space.

    A word is what lies between spaces, without the signs around it.
    """
    words: list[list[int]] = []
    for place, piece in enumerate(pieces):
        if not words or piece[:1].isspace():
            words.append([])
        words[-1].append(place)
    kinds = ["other"] * len(pieces)
    for places in words:
        word = "".join(pieces[place] for place in places).strip()
        bare = "".join(letter for letter in word if letter.isalnum() or letter == "'").lower()
        if not any(letter.isalpha() for letter in bare):
            continue
        head = bare.partition("'")[0]  # it's, don't
        kind = "function" if head in ENGLISH_STOP_WORDS or len(head) <= 1 else "content"
        for place in places:
            if any(letter.isalnum() for letter in pieces[place]) or "�" in pieces[place]:
                kinds[place] = kind
    return kinds


def _spaced(tokenizer: Any, token_ids: Sequence[int], pieces: Sequence[str]) -> list[str]:
    """Pieces that begin with a space where a word begins.

    SentencePiece tokenizers mark that in the token and drop it when a token is decoded alone.
    """
    marks = tokenizer.convert_ids_to_tokens(list(token_ids))
    return [
        f" {piece}" if mark.startswith(("▁", "Ġ")) and not piece[:1].isspace() else piece
        for piece, mark in zip(pieces, marks, strict=True)
    ]


GROUPS = (
    "first token",
    "prompt before",
    "content words",
    "function words",
    "other",
    "prompt after",
)
_OF_KIND = {"content": "content words", "function": "function words", "other": "other"}


def group_of(place: int, token: PromptedToken) -> str:
    """Which of :data:`GROUPS` a token is counted in.

    The first token stands apart: decoders put on it the attention that they need nowhere (Xiao et
    al. 2023, arXiv:2309.17453).
    """
    if place == 0:
        return "first token"
    if token.kind is not None:
        return _OF_KIND[token.kind]
    return "prompt before" if token.part == "prefix" else "prompt after"


def group_shares(tokens: Sequence[PromptedToken], weights: np.ndarray) -> dict[str, float]:
    """Attention on each group, which sum to 1.

    Args:
        tokens: a text's tokens.
        weights: float32 (tokens,), the last token's attention on them.
    """
    shares = dict.fromkeys(GROUPS, 0.0)
    for place, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        shares[group_of(place, token)] += float(weight)
    return shares


def prompt_and_content(shares: dict[str, float]) -> dict[str, float]:
    """Of the attention that is not on the first token: on the prompt, on content words.

    ``entropy``, in nats, is not among these: see :func:`summarize`.
    """
    rest = max(1.0 - shares["first token"], 1e-12)
    return {
        "prompt": (shares["prompt before"] + shares["prompt after"]) / rest,
        "content": shares["content words"] / rest,
    }


def summarize(texts: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard error over texts of every share.

    Args:
        texts: what :func:`group_shares` gave of each text.
    """
    rows = [{**shares, **prompt_and_content(shares)} for shares in texts]
    return {name: _mean([row[name] for row in rows]) for name in rows[0]}


def shift(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard error over texts of how much every share grew, text by text."""
    pairs = [
        ({**one, **prompt_and_content(one)}, {**other, **prompt_and_content(other)})
        for one, other in zip(before, after, strict=True)
    ]
    return {name: _mean([b[name] - a[name] for a, b in pairs]) for name in pairs[0][0]}


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}
