"""The work between two matrix products of a decoder, plain or fused by ``torch.compile``.

Each function reads and writes whole activations, so its cost is memory traffic: fused, an
activation is read once instead of once an operation.

Legend of shapes: T tokens, d width of an activation.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipelines.encoder.sources import first_sentence

log = logging.getLogger(__name__)

_LARGEST_INT8 = 127

Activation = Literal["silu", "gelu_pytorch_tanh"]
"""Of a gate, as transformers names them."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Rows of x (T, d) scaled to root mean square 1 in float32, times ``weight`` (d,)."""
    x = x.float()
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale.add_(epsilon).rsqrt_()
    return torch.mul(x, scale).mul_(weight).to(dtype)


def added_norm(
    x: Tensor, more: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """Add ``more`` (T, d) to float32 x (T, d) in place, and give what :func:`rms_norm` does."""
    x += more
    return rms_norm(x, weight, epsilon, dtype)


def turned_heads(
    heads: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor, places: Tensor
) -> Tensor:
    """Heads (T, h, D), normed where there is a weight (D,), turned by their positions' angles.

    Args:
        heads: queries or keys.
        weight: of the norm of a head.
        epsilon: of the norm of a head.
        cos: float32 (L, D), of each position.
        sin: float32 (L, D), its first half negated.
        places: int64 (T,), the position of each token.
    """
    x = heads.float()
    if weight is not None:
        x = x * (x.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight
    # halves swapped by strides, which a compiler fuses, where joining them anew it would not
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos[places, None] + swapped * sin[places, None]).to(heads.dtype)


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """The activation of the first half of the columns times the second, (T, 2d) to (T, d)."""
    gate, up = gate_up.chunk(2, dim=-1)
    acted = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return acted.mul_(up)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as whole numbers and what they must be multiplied with.

    Args:
        x: float32 (T, d).

    Returns:
        int8 (T, d), each row's largest entry at 127 or -127, and scales float32 (T, 1).
    """
    scale = x.abs().amax(dim=-1, keepdim=True)
    scale = scale.clamp_(min=torch.finfo(torch.float32).tiny).div_(_LARGEST_INT8)
    return torch.div(x, scale).round_().to(torch.int8), scale


@dataclass(frozen=True)
class Elementwise:
    """The functions of this module, as they are or fused."""

    rms_norm: Callable[[Tensor, Tensor, float, torch.dtype], Tensor] = rms_norm
    added_norm: Callable[[Tensor, Tensor, Tensor, float, torch.dtype], Tensor] = added_norm
    turned_heads: Callable[[Tensor, Tensor | None, float, Tensor, Tensor, Tensor], Tensor] = (
        turned_heads
    )
    gated: Callable[[Tensor, Activation], Tensor] = gated
    quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]] = quantize_rows

    @classmethod
    def fused(cls) -> Elementwise:
        """Compiled at their first call: some twenty seconds with a C++ compiler on a CPU.

        Where nothing compiles, they run as they are, after a warning.
        """
        functions: tuple[Any, ...] = rms_norm, added_norm, turned_heads, gated, quantize_rows
        return cls(*(_compiled(function) for function in functions))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for any number of tokens, the first dimension of its (T, ...)."""
    from torch._dynamo.exc import TorchDynamoException  # two seconds, for those who compile

    chosen = torch.compile(function)

    @functools.wraps(function)
    def call(rows: Tensor, *others: Any) -> Any:
        nonlocal chosen
        for tensor in (rows, *others):
            if isinstance(tensor, Tensor) and len(tensor) == len(rows):
                is_weight = tensor.dim() == 1 and tensor.is_floating_point()
                if not is_weight:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return chosen(rows, *others)
        except TorchDynamoException as error:
            log.warning("%s is not compiled: %s", function.__name__, first_sentence(error))
            chosen = function
            return function(rows, *others)

    return call


PLAIN = Elementwise()
