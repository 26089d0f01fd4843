"""The parts of a decoder that training spends its time in, with their backward passes by hand.

PEFT adds an adapter's output to a layer's in two passes over memory, and the norms and gated
products of transformers keep and walk over every intermediate result. Here an adapter's product
accumulates into the layer's own, only what a backward pass cannot do without is kept, and no
gradient is made that nobody asks for. Values and gradients are those of the parts replaced.

A part is replaced where it is known: LoRA on an ordinary linear layer, RMS norms, SiLU-gated
products. Norms and products are tried on random states first; whatever differs stays as it is.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import peft.tuners.lora
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


class RowSeeds(threading.local):
    """The seeds of the texts that are in the model at the moment, shared by its dropouts.

    They stay until the next are set, so that a backward pass that repeats a forward pass (gradient
    checkpointing) meets the same masks. None switches dropout off. Every thread has its own.
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


_TRIAL_ROWS = 3
_TOLERANCE = 1e-5


def lighten(model: nn.Module) -> dict[str, int]:
    """Replace what can be replaced inside a model with adapters; how many of each kind.

    Names, weights and the state dictionary stay as they are.
    """
    counts = {"lora": 0, "norm": 0, "gated": 0}
    for module in model.modules():
        if is_plain_lora(module):
            _set_forward(module, functools.partial(lora_forward, module))
            counts["lora"] += 1
        elif (
            type(module).__name__.endswith("RMSNorm")
            and getattr(module, "weight", None) is not None
        ):
            counts["norm"] += _replace(module, functools.partial(norm_forward, module))
    for module in model.modules():
        parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
        if all(isinstance(getattr(module, part, None), nn.Module) for part in parts):
            counts["gated"] += _replace(module, functools.partial(gated_forward, module))
    return counts


def is_plain_lora(module: Any) -> bool:
    """Whether a module is one LoRA adapter, of the plain kind, on a linear layer with weights."""
    return (
        type(module) is peft.tuners.lora.Linear
        and type(module.base_layer) is nn.Linear
        and len(module.lora_A) == 1
        and not module.lora_variant
        and not any(module.lora_bias.values())
    )


def lora_forward(module: Any, states: Tensor) -> Tensor:
    """What a LoRA layer gives for ``states`` (..., in): (..., out)."""
    (name,) = module.lora_A
    dropped = module.lora_dropout[name](states)
    return _LoraProduct.apply(
        states,
        None if dropped is states else dropped,
        module.base_layer.weight,
        module.base_layer.bias,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
    )


def norm_forward(module: Any, states: Tensor) -> Tensor:
    """What an RMS norm gives for ``states`` (..., d)."""
    epsilon = getattr(module, "variance_epsilon", None)
    return _RmsNorm.apply(states, module.weight, module.eps if epsilon is None else epsilon)


def gated_forward(module: Any, states: Tensor) -> Tensor:
    """What a gated product with SiLU gives for ``states`` (..., d)."""
    return module.down_proj(_GatedSilu.apply(module.gate_proj(states), module.up_proj(states)))


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + bias + scale · d Aᵀ Bᵀ for a frozen W; d is x, or x after dropout.

    Keeps d and d Aᵀ; the latter is as narrow as the adapter's rank.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        dtype = _product_dtype(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        read = rows if dropped is None else dropped.reshape(rows.shape).to(dtype)
        weight, down, up = weight.to(dtype), a.to(dtype), b.to(dtype)
        narrow = read @ down.T
        out = rows @ weight.T if bias is None else torch.addmm(bias.to(dtype), rows, weight.T)
        out.addmm_(narrow, up.T, alpha=scale)
        context.save_for_backward(read, narrow, weight, down, up)
        context.scale, context.shares_input = scale, dropped is None
        context.shape, context.dtypes = x.shape, (x.dtype, a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, narrow, weight, down, up = context.saved_tensors
        x_dtype, a_dtype, b_dtype = context.dtypes
        wants_x, wants_dropped, *_ = context.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1]).to(read.dtype)
        back = (rows @ up).mul_(context.scale)
        for_a = (back.T @ read).to(a_dtype)
        for_b = (rows.T @ narrow).mul_(context.scale).to(b_dtype)
        for_x = for_dropped = None
        if wants_x:
            for_x = rows @ weight
            if context.shares_input:
                for_x.addmm_(back, down)
            for_x = for_x.view(context.shape).to(x_dtype)
        if wants_dropped:
            for_dropped = (back @ down).view(context.shape).to(x_dtype)
        return for_x, for_dropped, None, None, for_a, for_b, None


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) · w along the last dimension, for a frozen w; keeps x and a number a row."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        context.save_for_backward(x, scale, weight)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = context.saved_tensors
        wide = x.float()
        unit = gradient.float() * weight
        shared = (unit * wide).sum(dim=-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        return unit.mul_(scale).addcmul_(wide, shared).to(x.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) · up; keeps the two alone."""

    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor) -> Tensor:
        context.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = context.saved_tensors
        for_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return for_gate, nn.functional.silu(gate).mul_(gradient)


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _replace(module: Any, forward: Callable[[Tensor], Tensor]) -> bool:
    """Take ``forward`` for a module's own where both give the same for random states."""
    weight = next(p for p in module.parameters() if p.is_floating_point())  # not a quantized one
    width = module.gate_proj.in_features if hasattr(module, "gate_proj") else weight.shape[-1]
    generator = torch.Generator().manual_seed(0)
    trial = torch.randn(1, _TRIAL_ROWS, width, generator=generator).to(weight)
    with torch.no_grad():
        expected, found = module(trial).float(), forward(trial).float()
    tolerance = max(_TOLERANCE, 4 * torch.finfo(weight.dtype).eps)
    same = expected.shape == found.shape and bool(
        (expected - found).norm() <= tolerance * expected.norm()
    )
    if same:
        _set_forward(module, forward)
    return same


def _set_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward
