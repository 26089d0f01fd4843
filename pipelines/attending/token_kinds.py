"""Which part of a prompted text a token belongs to, and what kind of word it is of.

A content word is one that carries a topic: not a function word of English, a number or a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
