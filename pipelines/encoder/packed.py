"""A faster forward pass for Llama-like decoders: texts packed without padding.

Written for prompted texts, where four things can be saved that a general forward pass pays for:

* Padding. All tokens of a batch lie one after the other; only attention sees texts apart.
* The prompt's prefix. It comes first in every text, so its keys, values and states are always the
  same: computed once at load.
* The last layer. When only last tokens are wanted, the last layer is run for them alone; the other
  tokens give only their keys and values.
* Small products. Query, key and value are one product, gate and up another.

The residual stream is float32 whatever the weights are. Legend of shapes: T tokens of a batch, n
texts, L longest text and P prefix tokens, K key heads, G query heads a key head, D width of a
head, d width of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.encoder.elementwise import PLAIN, Activation, Elementwise
from pipelines.encoder.int8 import Int8Linear
from pipelines.encoder.packed_attention import (
    Packing,
    attend,
    attend_both_ways,
    attend_from_last,
    attend_packed,
    can_attend_packed,
    rotate,
    to_device,
)
from pipelines.encoder.padded import TokenIds


class Linear(nn.Linear):
    """A linear layer that multiplies by oneDNN on CPUs, in float32 as torch does in half precision.

    There torch takes MKL, which needs 2.4 times as long on AMD's Zen 5.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., i) to (..., o)."""
        if x.is_cuda or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Linear:
        """A layer that shares its weights (o, i) and biases (o,)."""
        linear = cls(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm of a transformers model."""

    module: Any
    weight: Tensor
    """(w,): what rows are multiplied with."""
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        """Gemma's stores what is to be added to 1."""
        if hasattr(module, "eps"):
            return cls(module, 1.0 + module.weight.float(), module.eps)
        return cls(module, module.weight, module.variance_epsilon)

    @classmethod
    def named(cls, module: Any, name: str) -> Norm | None:
        """The one that ``module`` has under a name, if it has one."""
        return cls.of(getattr(module, name)) if hasattr(module, name) else None


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; joined ones share their memory with the model's own."""

    attention_norm: Norm
    qkv: nn.Linear | Int8Linear
    q_norm: Norm | None
    k_norm: Norm | None
    scale: float
    """Factor of the scores."""
    window: int | None
    """Tokens that one sees, itself among them; None for all."""
    rope: str | None
    """Which of the model's tables of angles; None where it has one."""
    out: nn.Linear | Int8Linear
    out_norm: Norm | None
    mlp_norm: Norm
    gate_up: nn.Linear | Int8Linear
    down: nn.Linear | Int8Linear
    down_norm: Norm | None
    query: nn.Linear | Int8Linear
    """The part of ``qkv`` that gives queries."""
    key_value: nn.Linear | Int8Linear
    """The part of ``qkv`` that gives keys and values."""

    @classmethod
    def of(cls, layer: Any, *, longest_tokens: int, int8: bool, elementwise: Elementwise) -> Layer:
        """The weights of a layer of a transformers model, rounded to int8 if asked."""
        attention, mlp = layer.self_attn, layer.mlp

        def prepare(linear: nn.Linear) -> nn.Linear | Int8Linear:
            if int8:
                return Int8Linear(linear.weight, linear.bias, elementwise)
            return Linear.of(linear.weight, linear.bias)

        qkv = join_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        query, key_value = split_linear(qkv, attention.q_proj.out_features)
        own_mlp_norm = Norm.named(layer, "pre_feedforward_layernorm")
        after_attention = Norm.of(layer.post_attention_layernorm)
        return cls(
            attention_norm=Norm.of(layer.input_layernorm),
            qkv=prepare(qkv),
            q_norm=Norm.named(attention, "q_norm"),
            k_norm=Norm.named(attention, "k_norm"),
            scale=attention.scaling,
            window=window_of(attention, longest_tokens),
            rope=rope_of(attention),
            out=prepare(attention.o_proj),
            # Where the MLP has a norm of its own, the other is for what attention adds.
            out_norm=after_attention if own_mlp_norm else None,
            mlp_norm=own_mlp_norm or after_attention,
            gate_up=prepare(join_linear(mlp.gate_proj, mlp.up_proj)),
            down=prepare(mlp.down_proj),
            down_norm=Norm.named(layer, "post_feedforward_layernorm"),
            query=prepare(query),
            key_value=prepare(key_value),
        )


def join_linear(*parts: nn.Linear) -> nn.Linear:
    """One product that gives the outputs of several, side by side.

    The parts go on to work and become views of the joined weights, so no memory is added.
    """
    sizes = [part.out_features for part in parts]
    weights = torch.cat([part.weight for part in parts])
    for part, weight in zip(parts, weights.split(sizes), strict=True):
        part.weight = nn.Parameter(weight, requires_grad=False)
    has_bias = parts[0].bias is not None
    return Linear.of(weights, torch.cat([part.bias for part in parts]) if has_bias else None)


def split_linear(linear: nn.Linear, first: int) -> tuple[nn.Linear, nn.Linear]:
    """Two layers for the ``first`` outputs and for the others; they share the one's weights."""
    sizes = [first, linear.out_features - first]
    biases = [None, None] if linear.bias is None else linear.bias.split(sizes)
    weights = linear.weight.split(sizes)
    return Linear.of(weights[0], biases[0]), Linear.of(weights[1], biases[1])


# By name: a class is slow to import, and a run needs one of them.
_FAMILIES = tuple(
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}{ending}"
    for name, ending in (
        ("Llama", "Model"),
        ("Mistral", "Model"),
        ("Qwen2", "Model"),
        ("Qwen3", "Model"),
        ("Gemma3", "TextModel"),
    )
)
# Rows are rounded up to these, where a product is compiled for each number of them.
_FEW_SHAPES = {"multiple": 64, "longest_multiple": 16}
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")


def ropes_of(settings: Any) -> list[Mapping[str, Any]]:
    """How positions turn: in all layers, or in each kind of them; nothing where they do not."""
    ropes = getattr(settings, "rope_parameters", None) or {}
    kinds = [rope for rope in ropes.values() if isinstance(rope, Mapping)]
    return [ropes] if "rope_type" in ropes else kinds


def has_static_rope(ropes: Mapping[str, Any]) -> bool:
    """Whether positions turn by the same angles in texts of every length."""
    if ropes["rope_type"] == "longrope":
        return ropes["short_factor"] == ropes["long_factor"]
    return ropes["rope_type"] in _STATIC_ROPES


def activation_of(settings: Any) -> str:
    """What a model's gates go through."""
    return getattr(settings, "hidden_activation", None) or settings.hidden_act


def can_pack(model: Any) -> bool:
    """Whether the packed pass computes what ``model`` does."""
    kind = type(model)
    if f"{kind.__module__}.{kind.__qualname__}" not in _FAMILIES:
        return False
    settings, weight = model.config, model.embed_tokens.weight
    if weight.is_cuda and not can_attend_packed(weight):
        return False
    return (
        activation_of(settings) in get_args(Activation)
        and getattr(settings, "attn_logit_softcapping", None) is None
        and all(map(has_static_rope, ropes_of(settings)))
    )


def window_of(attention: Any, longest_tokens: int) -> int | None:
    """Tokens that one of texts up to so long sees in a layer, itself among them; None for all."""
    whole = getattr(attention.config, "sliding_window", None)  # Mistral's, of every layer
    window = getattr(attention, "sliding_window", whole)
    if window is not None and getattr(attention.config, "is_causal", True) is False:
        window += 1  # transformers counts that far to either side then, and the token itself
    return None if window is None or window >= longest_tokens else window


def rope_of(attention: Any) -> str | None:
    """The kind of a layer where each has its own angles; None where all have the same."""
    return None if "rope_type" in attention.config.rope_parameters else attention.layer_type


def has_kernel(device: torch.device) -> bool:
    """Whether attention to packed texts has a kernel there."""
    return device.type == "cuda"


class PackedDecoder:
    """A base model run on packed texts that all begin with the same tokens."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        prefix: Sequence[int],
        longest_tokens: int,
        *,
        int8: bool = False,
        bidirectional: bool = False,
        elementwise: Elementwise = PLAIN,
    ) -> None:
        """Prepare ``model``, whose layers above the highest of ``layers`` may have been cut.

        Args:
            model: one that :func:`can_pack`.
            layers: whose states are wanted; several are averaged.
            prefix: token ids with which most texts begin; none where tokens see later ones.
            longest_tokens: most tokens of a text, prefix included.
            int8: round the weights of ``model``, which must be float32, to int8.
            bidirectional: tokens see those after them too.
            elementwise: the work between the products.
        """
        settings = model.config
        self._key_heads = settings.num_key_value_heads
        self._groups = settings.num_attention_heads // self._key_heads
        self._width = model.layers[0].self_attn.head_dim
        self._activation: Any = activation_of(settings)
        self._embedding = model.embed_tokens
        self._final_norm = Norm.of(model.norm)
        self._final = settings.num_hidden_layers
        self._wanted = set(layers)
        self._bidirectional = bidirectional
        self._elementwise = elementwise
        self._device = model.embed_tokens.weight.device
        self.has_kernel = has_kernel(self._device)
        """Whether attention to packed texts is a kernel's."""
        # Of activations between products; the residual stream is float32.
        self._dtype = torch.bfloat16 if int8 else model.dtype
        # oneDNN compiles its products in half precision for every shape that it meets.
        compiled = self._device.type == "cpu" and self._dtype != torch.float32
        self._multiples = _FEW_SHAPES if compiled else {}
        most = longest_tokens + self._multiples.get("longest_multiple", 1) - 1
        self._layers = [
            Layer.of(layer, longest_tokens=most, int8=int8, elementwise=elementwise)
            for layer in model.layers[: max(layers)]
        ]
        self._angles = {layer.rope: self._tables(model, layer.rope, most) for layer in self._layers}
        self.prefix: tuple[int, ...] = ()
        nothing = torch.empty(1, self._key_heads, 0, self._width, dtype=self._dtype)
        self._prefix_keys = [(nothing, nothing)] * len(self._layers)
        self._prefix_states = torch.empty(0, settings.hidden_size)
        self._without_prefix = copy.copy(self)
        if prefix and not self.has_kernel:  # which knows no shared keys
            self._keep_prefix(prefix)

    @torch.inference_mode()
    def states(self, token_ids: Sequence[TokenIds], *, last_only: bool) -> tuple[Tensor, Tensor]:
        """States of the wanted layer, or the average of several.

        Args:
            token_ids: texts; where one of them does not begin with the prefix and go on, that is
                computed anew for all of them.
            last_only: give each text's last token alone.

        Returns:
            States (n, t, d) and mask bool (n, t), true for a text's tokens; t is 1 if
            ``last_only``, else the tokens of the longest text.
        """
        shared = len(self.prefix)
        if any(tuple(ids[:shared]) != self.prefix or len(ids) == shared for ids in token_ids):
            return self._without_prefix.states(token_ids, last_only=last_only)
        own = [ids[shared:] for ids in token_ids]
        packing = Packing.of([len(ids) for ids in own], self._device, **self._multiples)
        rows = self._run(own, packing, last_only=last_only)
        if last_only:
            return rows[:, None], torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
        prefix = self._prefix_states.expand(len(own), -1, -1)
        texts = packing.pad(rows)[:, : max(map(len, own))]
        states = torch.cat([prefix, texts], dim=1) if shared else texts
        ends = packing.lengths[:, None] + len(self.prefix)
        return states, torch.arange(states.shape[1], device=rows.device) < ends

    def padded_tokens(self, lengths: Sequence[int]) -> int:
        """Places that texts of these lengths take in one batch: as many as they have tokens."""
        return sum(lengths)

    @torch.inference_mode()
    def _keep_prefix(self, prefix: Sequence[int]) -> None:
        packing = Packing.of([len(prefix)], self._device)
        keys: list[tuple[Tensor, Tensor]] = []
        self._prefix_states = self._run([prefix], packing, last_only=False, keep=keys)
        self._prefix_keys = keys
        self.prefix = tuple(prefix)

    def _run(
        self,
        token_ids: Sequence[TokenIds],
        packing: Packing,
        *,
        last_only: bool,
        keep: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Averaged states of the wanted layers, float32 (T, d), or (n, d) if ``last_only``.

        ``keep`` is filled with every layer's keys and values.
        """
        flat = to_device(np.concatenate(token_ids), self._device)
        x = self._embedding(torch.nn.functional.pad(flat, (0, packing.filler))).float()
        wanted = []
        if 0 in self._wanted:
            wanted.append(x[packing.last] if last_only else x.clone())
        more: Tensor | None = None  # what is still to be added to x
        for number, layer in enumerate(self._layers, start=1):
            for_last = last_only and number == len(self._layers)
            h = self._norm(x, more, layer.attention_norm)
            if for_last:
                mixed = self._attend_from_last(number, h, packing)
                x = x[packing.last]
            else:
                mixed = self._attend(number, h, packing, keep)
            h = self._norm(x, self._after(layer.out(mixed), layer.out_norm), layer.mlp_norm)
            gated = self._elementwise.gated(layer.gate_up(h), self._activation)
            more = self._after(layer.down(gated), layer.down_norm)
            if number in self._wanted:
                x += more
                more = None
                state = self._last_norm(x) if number == self._final else x
                wanted.append(state[packing.last] if last_only and not for_last else state.clone())
        return wanted[0] if len(wanted) == 1 else torch.stack(wanted).mean(dim=0)

    def _norm(self, x: Tensor, more: Tensor | None, norm: Norm) -> Tensor:
        """The norm of x, to which ``more`` is added before."""
        if more is None:
            return self._elementwise.rms_norm(x, norm.weight, norm.epsilon, self._dtype)
        return self._elementwise.added_norm(x, more, norm.weight, norm.epsilon, self._dtype)

    def _after(self, more: Tensor, norm: Norm | None) -> Tensor:
        """What is to be added to the residual stream, normed where the model does."""
        if norm is None:
            return more
        return self._elementwise.rms_norm(more, norm.weight, norm.epsilon, torch.float32)

    def _last_norm(self, x: Tensor) -> Tensor:
        norm = self._final_norm
        return self._elementwise.rms_norm(x, norm.weight, norm.epsilon, x.dtype)

    def _attend(
        self, number: int, h: Tensor, packing: Packing, keep: list[tuple[Tensor, Tensor]] | None
    ) -> Tensor:
        """What attention of layer ``number`` mixes for every token, (T, K * G * D)."""
        layer = self._layers[number - 1]
        K, G, D, P = self._key_heads, self._groups, self._width, len(self.prefix)
        if self.has_kernel:
            return self._attend_packed(layer, h, packing)
        heads = packing.pad(layer.qkv(h).to(self._dtype)).unflatten(-1, (-1, D))
        queries, keys, values = heads.split([K * G, K, K], dim=2)
        if layer.q_norm is not None:
            queries = layer.q_norm.module(queries).to(self._dtype)
        queries = queries.unflatten(2, (K, G)).transpose(1, 2)
        span = slice(P, P + packing.longest)
        turned = queries.new_empty(queries.shape)
        cos, sin = self._angles[layer.rope]
        rotate(queries, cos[span, None], sin[span, None], out=turned)
        keys, values = self._with_prefix(number, keys, values)
        if keep is not None:
            keep.append((keys, values))
        if self._bidirectional:
            mixed = attend_both_ways(
                turned, keys, values, packing.lengths, layer.scale, layer.window
            )
        else:
            mixed = attend(turned, keys, values, layer.scale, layer.window)
        return packing.unpad(mixed.transpose(1, 2).flatten(2))

    def _attend_packed(self, layer: Layer, h: Tensor, packing: Packing) -> Tensor:
        """The same where a kernel reads packed texts, (T, K * G * D)."""
        K, G, D = self._key_heads, self._groups, self._width
        queries, keys, values = layer.qkv(h).unflatten(-1, (-1, D)).split([K * G, K, K], dim=1)
        mixed = attend_packed(
            self._turned(queries, layer.q_norm, layer, packing.positions),
            self._turned(keys, layer.k_norm, layer, packing.positions),
            values,
            packing,
            layer.scale,
            bidirectional=self._bidirectional,
            window=layer.window,
        )
        return mixed.flatten(1)

    def _tables(self, model: Any, rope: str | None, most: int) -> tuple[Tensor, Tensor]:
        """Angles (L, D) as :func:`rotate` or, with a kernel, :func:`turned_heads` wants them."""
        places = torch.arange(most, device=self._device)[None]
        named = [] if rope is None else [rope]
        cos, sin = model.rotary_emb(torch.empty(0, device=self._device), places, *named)
        if not self.has_kernel:
            return cos[0].to(self._dtype), sin[0].to(self._dtype)
        first, second = sin[0].chunk(2, dim=-1)
        return cos[0], torch.cat([-first, second], dim=-1)

    def _turned(self, heads: Tensor, norm: Norm | None, layer: Layer, places: Tensor) -> Tensor:
        weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.epsilon)
        return self._elementwise.turned_heads(
            heads, weight, epsilon, *self._angles[layer.rope], places
        )

    def _attend_from_last(self, number: int, h: Tensor, packing: Packing) -> Tensor:
        """What attention of layer ``number`` mixes for last tokens alone, (n, K * G * D)."""
        layer = self._layers[number - 1]
        K, G, D = self._key_heads, self._groups, self._width
        if self.has_kernel:
            keys, values = layer.key_value(h).unflatten(-1, (2 * K, D)).chunk(2, dim=1)
            keys = self._turned(keys, layer.k_norm, layer, packing.positions)
            queries = layer.query(h[packing.last]).unflatten(-1, (-1, D))
            queries = self._turned(queries, layer.q_norm, layer, packing.lengths - 1)
            mixed = attend_packed(queries, keys, values, packing, layer.scale, window=layer.window)
            return mixed.flatten(1)
        queries = layer.query(h[packing.last]).to(self._dtype).unflatten(-1, (K, G, D))
        if layer.q_norm is not None:
            queries = layer.q_norm.module(queries).to(self._dtype)
        place = packing.lengths + len(self.prefix) - 1
        cos, sin = self._angles[layer.rope]
        cos, sin = cos[place, None, None], sin[place, None, None]
        queries = rotate(queries, cos, sin, out=torch.empty_like(queries))
        heads = packing.pad(layer.key_value(h).to(self._dtype)).unflatten(-1, (2 * K, D))
        keys, values = self._with_prefix(number, *heads.chunk(2, dim=2))
        mixed = attend_from_last(queries, keys, values, place + 1, layer.scale, layer.window)
        return mixed.flatten(1)

    def _with_prefix(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (n, K, P + L, D) of prefix and texts, from (n, L, K, D)."""
        layer, (first_keys, first_values) = self._layers[number - 1], self._prefix_keys[number - 1]
        n, L, K, D = keys.shape
        P = len(self.prefix)
        if layer.k_norm is not None:
            keys = layer.k_norm.module(keys).to(self._dtype)
        all_keys, all_values = keys.new_empty(n, K, P + L, D), keys.new_empty(n, K, P + L, D)
        all_keys[:, :, :P] = first_keys
        all_values[:, :, :P] = first_values
        span = slice(P, P + L)
        cos, sin = self._angles[layer.rope]
        rotate(keys.transpose(1, 2), cos[span], sin[span], out=all_keys[:, :, P:])
        all_values[:, :, P:] = values.transpose(1, 2)
        return all_keys, all_values
