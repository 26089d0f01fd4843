"""Batches of texts of like length that together hold a set number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

# On a CPU 1024 and 2048 measure alike and best in floating point, 1024 in int8: large enough for
# full matrix products, small enough that a layer's activations stay in cache.
_CPU_BUDGET_TOKENS = 1024
_LEAST_CUDA_BUDGET_TOKENS, _MOST_CUDA_BUDGET_TOKENS = 2048, 131072
_SHARE_OF_FREE_MEMORY = 0.25


def token_budget_batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches that fill a budget.

    Texts of like length share a batch, so padding a batch to its longest text costs little. A
    batch counts ``texts x longest`` tokens, at most ``budget_tokens``; a text longer than that is
    a batch alone. The longest come first, so that a lack of memory shows at once.

    Args:
        lengths: tokens of each text.
        budget_tokens: most tokens a batch may hold, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = max(1, budget_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def default_budget_tokens(settings: Any, device: torch.device) -> int:
    """Tokens of a batch for a model of these settings on this device, by its free memory.

    Counts what a layer holds for a token at once (residual stream, attention and gated product)
    and takes a quarter of the memory for it; what still proves too much, the encoder halves.
    """
    if device.type != "cuda":
        return _CPU_BUDGET_TOKENS
    free_bytes, _ = torch.cuda.mem_get_info(device)
    inner = getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size
    bytes_per_token = 4 * 4 * settings.hidden_size + 2 * (4 * settings.hidden_size + 3 * inner)
    tokens = int(free_bytes * _SHARE_OF_FREE_MEMORY / bytes_per_token)
    return min(max(tokens, _LEAST_CUDA_BUDGET_TOKENS), _MOST_CUDA_BUDGET_TOKENS)
