"""The work between two matrix products of a decoder, plain or fused by ``torch.compile``.

Each function reads and writes whole activations, so its cost is memory traffic: fused, an
activation is read once instead of once an operation.

Legend of shapes: T tokens, d width of an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_LARGEST_INT8 = 127


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Rows of float32 x (T, d) scaled to root mean square 1, times ``weight`` (d,)."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale.add_(epsilon).rsqrt_()
    return torch.mul(x, scale).mul_(weight).to(dtype)


def gated(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of the columns times the second half, (T, 2d) to (T, d)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


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
    gated: Callable[[Tensor], Tensor] = gated
    quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]] = quantize_rows

    @classmethod
    def fused(cls) -> Elementwise:
        """Compiled at their first call, some twenty seconds with a C++ compiler on a CPU."""
        compiled: list[Any] = [
            torch.compile(function, dynamic=True) for function in (rms_norm, gated, quantize_rows)
        ]
        return cls(*compiled)


PLAIN = Elementwise()
