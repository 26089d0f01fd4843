"""Two views of one text, made without a model: crops, noise, or the text twice.

Everything random comes from the generator that is passed in, so a document's pair is a function
of the seed and the document.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal, get_args

import numpy as np

PlainMethod = Literal["crop", "noise", "dropout"]
"""``crop``: two random pieces of the text (contrastive cropping, Meng et al. 2021,
arXiv:2102.08473). ``noise``: the text, and the text with words deleted and swapped and characters
mistyped. ``dropout``: the text twice, told apart by the model's dropout alone (SimCSE, Gao et al.
2021, arXiv:2104.08821)."""

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


def mistype(word: str, generator: np.random.Generator) -> str:
    """``word`` with one character deleted, doubled or replaced by a letter."""
    place = int(generator.integers(len(word)))
    replacement = ["", word[place] * 2, _LETTERS[int(generator.integers(26))]]
    return word[:place] + replacement[int(generator.integers(3))] + word[place + 1 :]
