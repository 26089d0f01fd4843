"""Batches of texts of like length that together hold a set number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


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
