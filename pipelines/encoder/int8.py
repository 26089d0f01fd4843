"""Linear layers in int8: weights rounded once, activations row by row as they come.

A weight has one scale an output, an activation one scale a token, both symmetric, so a token's
outputs do not depend on the tokens beside it. Products are summed exactly in int32.

What loses most in such a rounding are a few inputs that are far larger than the others and take
their token's scale. So inputs are turned first, in blocks of 64, by a Hadamard matrix, which
spreads a large one over its block, and the weights are turned alike, which leaves the product as it
was (QuaRot, Ashkboos et al., arXiv 2404.00456). The least cosine to the float32 vectors is 0.9990
for 96 texts of 181 tokens in the packaged LLM, and 0.9952 for the first 20 tokens of each
(``benchmarks/encode.py``).

Legend of shapes: T tokens, i inputs, o outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.encoder.elementwise import PLAIN, Elementwise
from pipelines.runtime.errors import InputError

_LARGEST_BLOCK = 64
# Rounded activations are stored from 0 to 255, as the fastest products take them.
_ZERO = 128


class Int8Linear(nn.Module):
    """A linear layer that multiplies in int8 and gives float32."""

    packed: Tensor
    scale: Tensor
    zeros: Tensor
    turn: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, elementwise: Elementwise = PLAIN
    ) -> None:
        """Round a layer's weights.

        Args:
            weight: floating point (o, i).
            bias: floating point (o,), or none.
            elementwise: the work around the product.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._elementwise = elementwise
        turn = hadamard(self.in_features)
        turned = (weight.float().unflatten(1, (-1, len(turn))) @ turn).flatten(1)
        rounded, scale = PLAIN.quantize_rows(turned)
        # For any number of rows: the layout that the product reads fastest.
        packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", scale[:, 0].contiguous())
        self.register_buffer("zeros", torch.zeros(self.out_features, dtype=torch.int64))
        self.register_buffer("turn", turn.bfloat16())
        self.register_buffer("bias", None if bias is None else bias.float())
        # Callers ask a layer's weight for its device and precision: that of the activations.
        self.register_buffer("weight", torch.empty(0, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x floating point (..., i) to float32 (..., o)."""
        blocks = x.bfloat16().reshape(-1, len(self.turn)) @ self.turn
        rounded, scale = self._elementwise.quantize_rows(blocks.view(-1, self.in_features).float())
        out = multiply(rounded, self.packed, self.scale, self.zeros).mul_(scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)


def hadamard(size: int) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix for blocks of ``size`` inputs, float32 (b, b).

    b is the largest power of two up to 64 that divides ``size``.
    """
    block = min(size & -size, _LARGEST_BLOCK)
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / block**0.5


def multiply(rounded: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """Sums of int8 products, times the weights' scales, float32 (T, o).

    Args:
        rounded: int8 (T, i), activations.
        packed: what ``qlinear_prepack`` made of int8 weights (o, i).
        scale: float32 (o,), of the weights.
        zeros: int64 (o,), where the weights' zeros are: 0.
    """
    shifted = rounded.view(torch.uint8).bitwise_xor_(_ZERO)
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, _ZERO, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def require_exact_products() -> None:
    """Raise :class:`InputError` where this CPU's int8 products are not what they should be.

    Those without instructions for int8 (VNNI) sum pairs in int16, which large entries overflow.
    """
    rows = torch.full((4, 64), 127, dtype=torch.int8)
    weights = torch.full((32, 64), 127, dtype=torch.int8)
    weights[1::2] = -127
    expected = (rows.int() @ weights.int().T).float()
    try:
        packed = torch.ops.onednn.qlinear_prepack(weights, None)
        products = multiply(rows, packed, torch.ones(32), torch.zeros(32, dtype=torch.int64))
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"dtype int8 cannot run here ({error}): use float32") from error
    if not torch.equal(products, expected):
        raise InputError("this CPU multiplies in int8 inexactly: use --dtype float32 or bfloat16")


def quantize_linears(layers: nn.ModuleList) -> None:
    """Put :class:`Int8Linear` in the place of linear layers in a stack of decoder layers.

    Layers that compute something else of their weights, such as routers to experts, stay as they
    are. Raises :class:`InputError` where there is none, as in models with convolutions instead.
    """
    linears = [
        (module, name, child)
        for layer in layers
        for module in layer.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward
    ]
    if not linears:
        raise InputError(
            "dtype int8 needs a model of linear layers; this one has none: use float32"
        )
    for module, name, child in linears:
        setattr(module, name, Int8Linear(child.weight, child.bias))
