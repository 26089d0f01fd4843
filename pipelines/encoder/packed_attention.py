"""Causal attention over texts of different lengths that lie packed one after the other.

Legend of shapes: T tokens of a batch, n texts, L longest text, P tokens of the prefix that all
texts share, K key heads, G query heads a key head, D width of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Queries attended to at once. A block sees no key after its own end, so small blocks skip most of
# the half of the scores that causality would throw away, and the scores stay in cache; measured
# best of 32 to 256 at 30 to 256 tokens a text.
_BLOCK_QUERIES = 64


@dataclass(frozen=True)
class Packing:
    """Where texts lie in a batch without padding."""

    lengths: Tensor
    """int64 (n,): tokens of each text, prefix not counted."""
    longest: int
    """L: tokens of the longest text, rounded up."""
    total: int
    """Tokens of all texts."""
    filler: int
    """Rows of no text at the end of the packed ones, which round their number up."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        *,
        multiple: int = 1,
        longest_multiple: int = 1,
    ) -> Packing:
        """The packing of texts of these lengths.

        Args:
            lengths: tokens of each text.
            device: where the rows are.
            multiple: what the number of packed rows is rounded up to a multiple of.
            longest_multiple: the same of the padded places of a text.
        """
        total = sum(lengths)
        longest = math.ceil(max(lengths) / longest_multiple) * longest_multiple
        sizes = to_device(np.array(lengths, np.int64), device)
        return cls(sizes, longest, total, -total % multiple)

    @functools.cached_property
    def ends(self) -> Tensor:
        """int64 (n,): the packed row after each text's last."""
        return self.lengths.cumsum(0)

    @functools.cached_property
    def last(self) -> Tensor:
        """int64 (n,): the packed row of each text's last token."""
        return self.ends - 1

    @functools.cached_property
    def starts(self) -> Tensor:
        """int32 (n + 1,): the packed row of each text's first token, and that after the last."""
        return torch.nn.functional.pad(self.ends, (1, 0)).int()

    @functools.cached_property
    def positions(self) -> Tensor:
        """int64 (T,): each packed row's place in its text, from 0."""
        first = (self.ends - self.lengths).repeat_interleave(self.lengths, output_size=self.total)
        return torch.arange(self.total, device=first.device) - first

    @functools.cached_property
    def _to_padded(self) -> Tensor | None:
        """int64 (n * L,): the packed row of each padded place; None where they are the same."""
        if self._is_even:
            return None
        places = torch.arange(self.longest, device=self.lengths.device)
        rows = (self.ends - self.lengths)[:, None] + places
        return torch.where(places < self.lengths[:, None], rows, 0).flatten()

    @functools.cached_property
    def _to_packed(self) -> Tensor | None:
        """int64 (T + filler,): the padded place of each packed row; None where the same."""
        if self._is_even:
            return None
        texts = torch.arange(len(self.lengths), device=self.lengths.device) * self.longest
        first = texts.repeat_interleave(self.lengths, output_size=self.total)
        return torch.nn.functional.pad(first + self.positions, (0, self.filler))

    @property
    def _is_even(self) -> bool:
        return self.total == len(self.lengths) * self.longest and not self.filler

    def pad(self, rows: Tensor) -> Tensor:
        """(T, w) to (n, L, w); padding repeats some row and is never looked at."""
        to_padded = self._to_padded
        padded = rows if to_padded is None else rows.index_select(0, to_padded)
        return padded.view(len(self.lengths), self.longest, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        """(n, L, w) to (T, w)."""
        rows, to_packed = padded.flatten(0, 1), self._to_packed
        return rows if to_packed is None else rows.index_select(0, to_packed)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor there; a GPU is not waited for."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Turn vectors (..., D) by their positions' angles, into ``out``; tables broadcast to them."""
    half = vectors.shape[-1] // 2
    torch.mul(vectors, cos, out=out)
    out[..., :half].addcmul_(vectors[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(vectors[..., :half], sin[..., half:])
    return out


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention, (n, K, L, G, D).

    Args:
        queries: (n, K, L, G, D), of the last L of the P + L positions.
        keys: (n, K, P + L, D).
        values: (n, K, P + L, D).
        scale: factor of the scores.
        window: so many of the last positions, its own among them, are what a query sees.
    """
    n, K, L, G, D = queries.shape
    prefix = keys.shape[2] - L
    queries = queries.view(n * K, L * G, D)
    keys, values = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    mixed = torch.empty_like(queries)
    later = torch.full((_BLOCK_QUERIES, _BLOCK_QUERIES), -torch.inf, dtype=queries.dtype).triu(1)
    for start in range(0, L, _BLOCK_QUERIES):
        stop = min(L, start + _BLOCK_QUERIES)
        rows = slice(start * G, stop * G)
        first = 0 if window is None else max(0, prefix + start - window + 1)
        seen = slice(first, prefix + stop)
        scores = queries.new_empty(n * K, (stop - start) * G, seen.stop - first)
        scores = scores.baddbmm_(queries[:, rows], keys[..., seen], beta=0, alpha=scale)
        by_query = scores.view(n * K, stop - start, G, -1)
        by_query[..., prefix + start - first :] += later[: stop - start, None, : stop - start]
        if window is not None:
            ages = torch.arange(prefix + start, prefix + stop)[:, None] - torch.arange(
                first, seen.stop
            )
            by_query.masked_fill_((ages >= window)[:, None], -torch.inf)
        torch.softmax(scores, dim=-1, out=scores)
        mixed[:, rows] = torch.bmm(scores, values[:, seen])
    return mixed.view(n, K, L, G, D)


def attend_both_ways(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of every token to every other of its text, (n, K, L, G, D).

    Args:
        queries: (n, K, L, G, D).
        keys: (n, K, L, D).
        values: (n, K, L, D).
        lengths: int64 (n,), tokens of each text.
        scale: factor of the scores.
        window: a query sees positions that are less far away.
    """
    n, K, L, G, D = queries.shape
    places = torch.arange(L, device=keys.device)
    scores = torch.matmul(queries.flatten(2, 3), keys.transpose(-1, -2)) * scale
    if window is not None:
        far = ((places[:, None] - places).abs() >= window).repeat_interleave(G, dim=0)
        scores.masked_fill_(far, -torch.inf)
    scores.masked_fill_((places >= lengths[:, None])[:, None, None], -torch.inf)
    return torch.matmul(scores.softmax(dim=-1), values).view(n, K, L, G, D)


def can_attend_packed(weight: Tensor) -> bool:
    """Whether this GPU has a kernel for packed texts in this precision."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return half and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def attend_packed(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    packing: Packing,
    scale: float,
    *,
    bidirectional: bool = False,
    window: int | None = None,
) -> Tensor:
    """Attention on CUDA without padding, (T, K * G, D), or (n, K * G, D) of last tokens alone.

    Args:
        queries: (T, K * G, D) of all tokens or (n, K * G, D) of last ones, bfloat16 or float16.
        keys: (T, K, D).
        values: (T, K, D).
        packing: where the texts lie.
        scale: factor of the scores.
        bidirectional: tokens see those after them too.
        window: tokens see those that are less far away.
    """
    # Here, as it loads torch's compiler: two seconds, which a CPU need not wait for.
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = packing.starts, packing.longest
    all_tokens = len(queries) == packing.total
    one_each = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
    left = -1 if window is None else window - 1
    sees_later = bidirectional or not all_tokens  # of which last tokens have none
    mixed = varlen_attn(
        queries,
        keys,
        values,
        starts if all_tokens else one_each,
        starts,
        longest if all_tokens else 1,
        longest,
        scale=scale,
        window_size=(left, left if sees_later else 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed


def attend_from_last(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of each text's last token alone, (n, K, G, D).

    Args:
        queries: (n, K, G, D).
        keys: (n, K, P + L, D).
        values: (n, K, P + L, D).
        ends: int64 (n,), tokens of each text with the P of the prefix.
        scale: factor of the scores.
        window: so many of the last positions are what it sees.
    """
    n, K, G, D = queries.shape
    positions = keys.shape[2]
    scores = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)) * scale
    places = torch.arange(positions, device=keys.device)
    beyond = places >= ends[:, None]
    if window is not None:
        beyond |= places < ends[:, None] - window
    scores.view(n, K, G, positions).masked_fill_(beyond[:, None, None], -torch.inf)
    return torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).view(n, K, G, D)
