"""One layer of a Llama-like decoder: its weights, joined for larger products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipelines.encoding.elementwise import Elementwise
from pipelines.encoding.int8_linear import Int8Linear


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; joined ones share their memory with the model's own."""

    attention_norm: Any
    qkv: nn.Linear | Int8Linear
    q_norm: Any
    k_norm: Any
    out: nn.Linear | Int8Linear
    mlp_norm: Any
    gate_up: nn.Linear | Int8Linear
    down: nn.Linear | Int8Linear
    query: nn.Linear | Int8Linear
    """The part of ``qkv`` that gives queries."""
    key_value: nn.Linear | Int8Linear
    """The part of ``qkv`` that gives keys and values."""

    @classmethod
    def of(cls, layer: Any, *, int8: bool, elementwise: Elementwise) -> Layer:
        """The weights of a layer of a transformers model, rounded to int8 if asked."""
        attention, mlp = layer.self_attn, layer.mlp

        def prepare(linear: nn.Linear) -> nn.Linear | Int8Linear:
            return Int8Linear(linear.weight, linear.bias, elementwise) if int8 else linear

        qkv = join_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        query, key_value = split_linear(qkv, attention.q_proj.out_features)
        return cls(
            attention_norm=layer.input_layernorm,
            qkv=prepare(qkv),
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
            out=prepare(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm,
            gate_up=prepare(join_linear(mlp.gate_proj, mlp.up_proj)),
            down=prepare(mlp.down_proj),
            query=prepare(query),
            key_value=prepare(key_value),
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


def split_linear(linear: nn.Linear, first: int) -> tuple[nn.Linear, nn.Linear]:
    """Two layers for the ``first`` outputs and for the others; they share the one's weights."""
    sizes = [first, linear.out_features - first]
    biases = [None, None] if linear.bias is None else linear.bias.split(sizes)
    parts = []
    for weight, bias in zip(linear.weight.split(sizes), biases, strict=True):
        part = nn.Linear(linear.in_features, len(weight), bias=False, device="meta")
        part.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias, requires_grad=False)
        parts.append(part)
    return parts[0], parts[1]
