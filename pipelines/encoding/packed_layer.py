"""One layer of a Llama-like decoder: its weights, joined for larger products, and what they do.

Legend of shapes: T tokens of a batch, d width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; joined ones share their memory with the model's own."""

    attention_norm: Any
    qkv: nn.Linear
    q_norm: Any
    k_norm: Any
    out: nn.Linear
    mlp_norm: Any
    gate_up: nn.Linear
    down: nn.Linear

    @classmethod
    def of(cls, layer: Any) -> Layer:
        """The weights of a layer of a transformers model."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention_norm=layer.input_layernorm,
            qkv=join_linear(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
            out=attention.o_proj,
            mlp_norm=layer.post_attention_layernorm,
            gate_up=join_linear(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
        )


def join_linear(*parts: nn.Linear) -> nn.Linear:
    """One product that gives the outputs of several, side by side.

    The parts go on to work and become views of the joined weights, so no memory is added.
    """
    sizes = [part.out_features for part in parts]
    joined = nn.Linear(parts[0].in_features, sum(sizes), bias=False, device="meta")
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    for part, weight in zip(parts, joined.weight.split(sizes), strict=True):
        part.weight = nn.Parameter(weight, requires_grad=False)
    if parts[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    return joined


def feed_forward(layer: Layer, h: Tensor) -> Tensor:
    """The gated product of a layer, (T, d)."""
    gate, up = layer.gate_up(h).chunk(2, dim=-1)
    return layer.down(F.silu(gate).mul_(up))


def rms_norm(x: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """Rows of float32 x (T, d) scaled to root mean square 1, times the weights of ``norm``."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale.add_(norm.variance_epsilon).rsqrt_()
    return torch.mul(x, scale).to(dtype).mul_(norm.weight)
