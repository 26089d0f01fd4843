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
from collections.abc import Callable
from typing import Any

import peft.tuners.lora
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
