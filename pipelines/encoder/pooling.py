"""Pooling: the states of a text's tokens become one vector.

Every way but ``max`` is a weighted sum over tokens, so a pooling is a table of weights. All of
it is computed in float32, for either padding side, and with gradients where the states have them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.encoder.description import POOLINGS, Pooling


def pool(
    states: Tensor,
    mask: Tensor,
    pooling: Pooling,
    *,
    prefix_tokens: int = 0,
    suffix_tokens: int = 0,
) -> Tensor:
    """One vector a text.

    Args:
        states: (n, t, d), any float dtype.
        mask: bool (n, t), true for a text's tokens, false for padding on either side; at least
            one true a row.
        pooling: which way.
        prefix_tokens: tokens of a text before its body, for ``body-mean``.
        suffix_tokens: tokens of a text after its body. A text whose body is empty is averaged
            over all its tokens.

    Returns:
        float32 (n, d), or (n, 2d) for ``last+mean``; not normalised.
    """
    mask = mask.bool()
    states = states.float().masked_fill(~mask[..., None], 0.0)
    if pooling == "max":
        return states.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    parts = []
    for part in pooling.split("+"):
        weights = token_weights(mask, part, prefix_tokens, suffix_tokens)
        parts.append(torch.bmm(weights[:, None, :], states)[:, 0, :])
    return torch.cat(parts, dim=-1)


def token_weights(mask: Tensor, pooling: str, prefix_tokens: int, suffix_tokens: int) -> Tensor:
    """Weights float32 (n, t) of each token in its text's vector; rows sum to 1."""
    position = mask.cumsum(dim=1)  # 1-based place of a token in its text
    length = mask.sum(dim=1, keepdim=True)
    match pooling:
        case "last":
            chosen = mask & (position == length)
        case "first":
            chosen = mask & (position == 1)
        case "mean":
            chosen = mask
        case "weighted-mean":
            chosen = mask * position
        case "body-mean":
            body = mask & (position > prefix_tokens) & (position <= length - suffix_tokens)
            chosen = torch.where(body.any(dim=1, keepdim=True), body, mask)
        case _:
            raise ValueError(f"unknown pooling {pooling!r}; known are {', '.join(POOLINGS)}")
    weights = chosen.float()
    return weights / weights.sum(dim=1, keepdim=True)


def normalize(vectors: Tensor) -> Tensor:
    """Vectors scaled to length 1, float32 (n, d)."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
