"""Dropout whose mask depends on the text, not on the batch that the text is in.

Ordinary dropout draws its mask for a whole tensor, so the same text is treated differently in
another micro-batch, on another rank or when a forward pass is repeated. Here every text carries
a seed, and a mask is a hash of that seed, the layer, the token's place and the feature. Splitting
a batch over ranks or micro-batches, repeating a forward pass and resuming a run therefore change
nothing, and no random state has to be saved or replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


class RowSeeds:
    """The seeds of the texts that are in the model at the moment, shared by its dropouts.

    They stay until the next are set, so that a backward pass that repeats a forward pass (gradient
    checkpointing) meets the same masks. None switches dropout off.
    """

    def __init__(self) -> None:
        self.seeds: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None
        """The last input of a dropout, and what it became."""

    def set(self, seeds: Sequence[int] | None) -> None:
        """From now on the rows of a batch have these seeds."""
        self.seeds = None if seeds is None else torch.tensor(seeds, dtype=torch.long)
        self.last = None


class RowDropout(nn.Module):
    """Dropout of (n, t, d) states with one seed a row; does nothing while no seeds are in use."""

    def __init__(self, rate: float, salt: int, rows: RowSeeds) -> None:
        super().__init__()
        self.rate = rate
        self.salt = salt
        self.rows = rows

    def forward(self, states: Tensor) -> Tensor:
        """``states`` (n, t, d) with a share of ``rate`` set to zero and the rest scaled up.

        Some models run parts of a layer on all tokens as one long list, (n * t, d).

        Layers that read the very same states one after the other (queries, keys, values; gate
        and up) share a mask, which halves its cost.
        """
        seeds = self.rows.seeds
        if seeds is None or self.rate == 0.0:
            return states
        if states.shape[:-1].numel() % len(seeds):
            raise ValueError(
                f"states of shape {tuple(states.shape)} do not fit {len(seeds)} seeds: "
                "(n, t, d) or (n * t, d) with n seeds is required"
            )
        if self.rows.last is not None and self.rows.last[0] is states:
            return self.rows.last[1]
        tokens = states.shape[:-1].numel() // len(seeds)
        keep = row_mask(seeds.to(states.device), self.salt, tokens, states.shape[-1], self.rate)
        keep = keep.view(states.shape)
        dropped = torch.where(keep, states * (1 / (1 - self.rate)), 0)
        self.rows.last = (states, dropped)
        return dropped

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"rate={self.rate}, salt={self.salt}"


def install_row_dropout(model: nn.Module) -> RowSeeds:
    """Put a :class:`RowDropout` in place of every dropout inside a model's LoRA layers.

    The base model's own dropouts are left alone; they are off while it is in evaluation mode.
    """
    rows = RowSeeds()
    holders = [m for name, m in model.named_modules() if name.endswith("lora_dropout")]
    for salt, holder in enumerate(holders):
        for name, dropout in list(holder.named_children()):
            if isinstance(dropout, nn.Dropout):
                setattr(holder, name, RowDropout(dropout.p, salt, rows))
    return rows


def row_mask(seeds: Tensor, salt: int, tokens: int, features: int, rate: float) -> Tensor:
    """Bool (n, tokens, features), each false with probability ``rate``.

    The beginning of a row's mask is the same for any number of tokens.

    Args:
        seeds: int64 (n,), one a row.
        salt: which of a model's dropouts this is.
        tokens: t.
        features: d.
        rate: share of false, 0 to 1.
    """
    places = torch.arange(tokens, device=seeds.device)
    columns = torch.arange(features, device=seeds.device)
    layer = _mix(torch.tensor(salt + 1, device=seeds.device) * _GOLDEN)
    rows = _mix(_mix(seeds + layer)[:, None] + places * _GOLDEN).int()
    bits = rows[:, :, None] ^ _mix(columns - layer).int()
    # Two rounds of a 32-bit multiplicative hash on (n, t, d), in place: this runs for every LoRA
    # layer. Only the highest bits decide, and a last multiplication mixes those best. That the
    # shift spreads the sign costs one bit of 32.
    bits *= -2048144789
    bits ^= bits >> 15
    bits *= -1028477387
    return bits >= round(-(2**31) + rate * (2**32 - 1))


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014) on int64 values."""
    values = (values ^ _shift_right(values, 30)) * -4658895280553007687
    values = (values ^ _shift_right(values, 27)) * -7723592293110705685
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift int64 values without spreading their sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
