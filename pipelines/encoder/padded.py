"""The forward pass of any transformers model: texts padded to one length, one layer's states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.runtime.errors import InputError

TokenIds = Sequence[int] | np.ndarray
"""Tokens of a text; as an array, integers (t,), they cost no Python object each."""


class PaddedDecoder:
    """A base model run on padded texts; layers above the highest wanted are dropped."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self._model = model
        self._layers = layers
        self._count = len(find_layers(model))
        self.stack = cut_layers(model, layers)
        """The layers that are left."""
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def states(
        self, token_ids: Sequence[TokenIds], *, last_only: bool = False, padding: int = 0
    ) -> tuple[Tensor, Tensor]:
        """States (n, t, d) of the wanted layer, or the average of several, and mask bool (n, t).

        ``last_only`` saves nothing here: all states are given. ``padding`` is the token in places
        that no state may depend on.
        """
        input_ids, mask = pad_right(token_ids, self._device, padding)
        return read_states(
            self._model, self.stack, self._layers, self._count, input_ids, mask
        ), mask

    def padded_tokens(self, lengths: Sequence[int]) -> int:
        """Places that texts of these lengths take in one batch, padding included."""
        return len(lengths) * max(lengths)


def pad_right(
    token_ids: Sequence[TokenIds], device: torch.device, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids as int64 (n, t) and their mask, bool (n, t). Padding is never read."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    input_ids = torch.full(mask.shape, padding)
    input_ids[mask] = torch.from_numpy(np.concatenate(token_ids)).long()
    return input_ids.to(device), mask.to(device)


def find_layers(model: Any) -> nn.ModuleList:
    """The stack of layers that reads text inside a model, however deep it is wrapped."""
    count = model.config.get_text_config().num_hidden_layers
    # beside it there may be one that reads images, of as many layers
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in text.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} has no stack of {count} layers to read states from")


def runs_layers_again(model: Any) -> bool:
    """Whether a model runs one layer many times, as ALBERT does."""
    return hasattr(model.config, "num_hidden_groups")


def unshare_layers(model: Any) -> None:
    """Give a model that runs one layer many times a copy for each time.

    So it has a stack as all others have; it stays a valid model of its kind.
    """
    config = model.config
    for module in model.modules() if runs_layers_again(model) else ():
        groups = getattr(module, "albert_layer_groups", None)
        if groups is not None:
            times, each = config.num_hidden_layers, config.num_hidden_layers / len(groups)
            module.albert_layer_groups = nn.ModuleList(
                copy.deepcopy(groups[int(i / each)]) for i in range(times)
            )
            config.num_hidden_groups = times


def cut_layers(model: Any, layers: Sequence[int]) -> nn.ModuleList:
    """Drop the layers above the highest that is read, so that they are not run.

    Returns the stack that is left.
    """
    stack = find_layers(model)
    del stack[max(1, *layers) :]
    if runs_layers_again(model):  # it counts, instead of looking
        model.config.num_hidden_groups = model.config.num_hidden_layers = len(stack)
    return stack


def read_states(
    model: Any,
    stack: nn.ModuleList,
    layers: Sequence[int],
    count: int,
    input_ids: Tensor,
    mask: Tensor,
) -> Tensor:
    """States (n, t, d) after a layer, or the average of several, with gradients if enabled.

    Args:
        model: base model, wrapped by an adapter or not.
        stack: its layers, as :func:`find_layers` or :func:`cut_layers` gives them.
        layers: 0 for the token embeddings, i for the output of layer i, ``count`` for the last
            layer's with the final norm.
        count: layers of the model before any cut.
        input_ids: int64 (n, t).
        mask: bool (n, t), true for tokens, false for padding on either side.
    """
    inner = [layer for layer in layers if layer < count]
    inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
    if not mask[:, 0].all():  # padded on the left: a text's first token must still be its first
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with record_outputs(stack, inner) as recorded:
        output = model(**inputs, use_cache=False)
    unseen = [layer for layer in inner if layer not in recorded]
    if unseen:
        raise InputError(f"layer {unseen[0]} of {type(model).__name__} is not run on texts alone")
    states = [recorded[layer] for layer in inner]
    if count in layers:
        states.append(output.last_hidden_state)
    width = model.config.get_text_config().hidden_size
    for state in states:
        projected = (
            state.shape[-1] if tuple(layers) == (count,) else width
        )  # after the last layer alone
        wanted = (*mask.shape, projected)
        if state.shape != wanted:
            raise InputError(
                f"{type(model).__name__} has states of shape {tuple(state.shape)} there for texts "
                f"of {tuple(mask.shape)} tokens: {wanted} is required, name another layer"
            )
    if len(states) == 1:
        return states[0]
    return torch.stack([state.float() for state in states]).mean(dim=0)


@contextmanager
def record_outputs(
    stack: nn.ModuleList,
    layers: Sequence[int],
    keep: Callable[[Tensor], Tensor] = lambda states: states,
) -> Iterator[dict[int, Tensor]]:
    """Collect the states after some layers while a model runs; no others are kept.

    ``keep`` makes of a layer's states what is kept of them, before the next layer runs.
    """
    recorded: dict[int, Tensor] = {}

    def record_input(_: nn.Module, arguments: tuple, keywords: dict) -> None:
        recorded[0] = keep(arguments[0] if arguments else keywords["hidden_states"])

    def record_output(layer: int) -> Any:
        def record(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
            recorded[layer] = keep(output if isinstance(output, Tensor) else output[0])

        return record

    handles = [
        stack[0].register_forward_pre_hook(record_input, with_kwargs=True)
        if layer == 0
        else stack[layer - 1].register_forward_hook(record_output(layer))
        for layer in layers
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
