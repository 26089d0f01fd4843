"""Pooling: the states of a text's tokens become one vector.

Every way but ``max`` is a weighted sum over tokens, so a pooling is a table of weights. All of
it is computed in float32, for either padding side, and with gradients where the states have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.encoder.description import POOLING_PARTS


def pool(
    states: Tensor,
    mask: Tensor,
    pooling: str,
    *,
    prefix_tokens: int = 0,
    suffix_tokens: int = 0,
    skipped_tokens: int = 0,
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
        skipped_tokens: first tokens of a text that no pooling looks at, unless it has no others.

    Returns:
        float32 (n, d) times the number of ways joined by ``+``; not normalised.
    """
    mask = mask.bool()
    states = states.float().masked_fill(~mask[..., None], 0.0)
    parts = []
    for part in pooling.split("+"):
        if part == "max":
            seen = pooled_tokens(mask, skipped_tokens)
            parts.append(states.masked_fill(~seen[..., None], -torch.inf).amax(dim=1))
            continue
        weights = token_weights(mask, part, prefix_tokens, suffix_tokens, skipped_tokens)
        parts.append(torch.bmm(weights[:, None, :], states)[:, 0, :])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def pooled_tokens(mask: Tensor, skipped_tokens: int) -> Tensor:
    """Bool (n, t): the tokens that are looked at."""
    if not skipped_tokens:
        return mask
    seen = mask & (mask.cumsum(dim=1) > skipped_tokens)
    return torch.where(seen.any(dim=1, keepdim=True), seen, mask)


def token_weights(
    mask: Tensor, pooling: str, prefix_tokens: int, suffix_tokens: int, skipped_tokens: int = 0
) -> Tensor:
    """Weights float32 (n, t) of each token in its text's vector.

    Rows sum to 1; those of ``mean-sqrt`` to the root of the number of tokens.
    """
    position = mask.cumsum(dim=1)  # 1-based place of a token in its text
    length = mask.sum(dim=1, keepdim=True)
    seen = pooled_tokens(mask, skipped_tokens)
    match pooling:
        case "last":
            chosen = mask & (position == length)
        case "first":
            chosen = seen & (seen.cumsum(dim=1) == 1)
        case "mean" | "mean-sqrt":
            chosen = seen
        case "weighted-mean":
            chosen = seen * position
        case "body-mean":
            body = mask & (position > prefix_tokens) & (position <= length - suffix_tokens)
            chosen = torch.where(body.any(dim=1, keepdim=True), body, mask)
        case _:
            raise ValueError(f"unknown pooling {pooling!r}; known are {', '.join(POOLING_PARTS)}")
    weights = chosen.float()
    total = weights.sum(dim=1, keepdim=True)
    return weights / (total.sqrt() if pooling == "mean-sqrt" else total)


def normalize(vectors: Tensor) -> Tensor:
    """Vectors scaled to length 1, float32 (n, d)."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


@dataclass(frozen=True)
class Projection:
    """A linear layer after pooling, as sentence-transformers' Dense."""

    weight: Tensor
    """float32 (o, i)."""
    bias: Tensor | None
    """float32 (o,)."""
    activation: nn.Module

    def __call__(self, vectors: Tensor) -> Tensor:
        """Vectors float32 (n, i) to float32 (n, o)."""
        return self.activation(torch.nn.functional.linear(vectors, self.weight, self.bias))


@dataclass(frozen=True)
class VectorHead:
    """What makes one vector of a text's states: pooling and all that comes after it."""

    pooling: str
    prefix_tokens: int
    suffix_tokens: int
    skipped_tokens: int
    projections: Sequence[Projection]
    dimensions: int | None
    normalize: bool

    @property
    def last_only(self) -> bool:
        """Whether only the last token's state is looked at."""
        return self.pooling == "last"

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """States (n, t, d) and mask bool (n, t) to vectors float32 (n, dimension)."""
        vectors = pool(
            states,
            mask,
            self.pooling,
            prefix_tokens=self.prefix_tokens,
            suffix_tokens=self.suffix_tokens,
            skipped_tokens=self.skipped_tokens,
        )
        return self.after_pooling(vectors)

    def after_pooling(self, vectors: Tensor) -> Tensor:
        """Pooled vectors float32 (n, d) to vectors float32 (n, dimension)."""
        for projection in self.projections:
            vectors = projection(vectors)
        vectors = vectors[:, : self.dimensions]
        return normalize(vectors) if self.normalize else vectors
