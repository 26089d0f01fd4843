"""Where attention goes in all: shares of prompt, content words and the rest, and their shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.attending.token_kinds import PromptedToken

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
