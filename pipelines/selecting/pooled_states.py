"""Every layer and every pooling of one prompt, from one forward pass.

In: token ids of prompted texts. Out: :class:`PooledStates`, from which the vectors of any layer
and pooling are taken. A layer's states are pooled as soon as the layer has run and are then
dropped, so that a batch never holds more than one layer's.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.encoder import is_out_of_memory
from pipelines.encoding.batching import token_budget_batches
from pipelines.encoding.padded_decoder import find_layers, pad_right, record_outputs
from pipelines.encoding.tokenization import PromptedTokenizer
from pipelines.pooling import Pooling, pool, token_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PooledStates:
    """Pooled, not normalised, vectors of some texts.

    ``parts`` holds float32 (n, d) for each layer (0 the token embeddings, the last with the final
    norm) and each pooling that is no combination of others.
    """

    parts: dict[tuple[int, str], np.ndarray]

    def vectors(self, layer: int, pooling: Pooling, *, normalize: bool = True) -> np.ndarray:
        """What an encoder of this layer and pooling gives: float32 (n, d), or (n, 2d)."""
        found = np.concatenate([self.parts[layer, part] for part in pooling.split("+")], axis=1)
        if normalize:
            lengths = np.linalg.norm(found, axis=1, keepdims=True)
            found = found / np.maximum(lengths, 1e-12)
        return found


class AllLayersPooler:
    """A base model that is run once for many layers and poolings."""

    def __init__(
        self, model: Any, layers: Sequence[int], poolings: Sequence[Pooling], budget_tokens: int
    ) -> None:
        """Prepare ``model``, as :func:`pipelines.encoding.base_model.load_base_model` gives it.

        Args:
            model: a base model whose layers have not been cut.
            layers: which states are wanted, from 0 for the token embeddings.
            poolings: which poolings are wanted.
            budget_tokens: tokens of a batch, padding included.
        """
        self._model = model
        self._stack = find_layers(model)
        self._layers = tuple(layers)
        self._sums = tuple(
            dict.fromkeys(part for way in poolings for part in way.split("+") if part != "max")
        )
        self._with_max = "max" in poolings
        self._device = next(model.parameters()).device
        self._budget_tokens = budget_tokens

    def pool(
        self, token_ids: Sequence[Sequence[int]], tokenizer: PromptedTokenizer
    ) -> PooledStates:
        """The pooled states of texts, in the order given.

        Args:
            token_ids: texts within the prompt of ``tokenizer``, each of at least one token.
            tokenizer: says which of a text's tokens are its prompt's.
        """
        batches = deque(token_budget_batches([len(ids) for ids in token_ids], self._budget_tokens))
        width = self._model.config.get_text_config().hidden_size
        names = [*self._sums, *(["max"] if self._with_max else [])]
        parts = {
            (layer, name): np.empty((len(token_ids), width), np.float32)
            for layer in self._layers
            for name in names
        }
        while batches:
            batch = batches.popleft()
            try:
                found = self._pool_batch([token_ids[index] for index in batch], tokenizer)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                found = None
            if found is None:  # outside the handler, which keeps the failed batch's memory alive
                half = len(batch) // 2
                log.warning("out of memory: %d texts are run in two halves", len(batch))
                batches.extendleft([batch[half:], batch[:half]])
                continue
            for layer, vectors in found.items():
                for place, name in enumerate(names):
                    parts[layer, name][batch] = vectors[:, place].cpu().numpy()
        return PooledStates(parts)

    @torch.inference_mode()
    def _pool_batch(
        self, token_ids: Sequence[Sequence[int]], tokenizer: PromptedTokenizer
    ) -> dict[int, Tensor]:
        """Vectors float32 (n, poolings, d) of each layer."""
        input_ids, mask = pad_right(token_ids, self._device)
        around = (tokenizer.prefix_tokens, tokenizer.suffix_tokens)
        weights = [token_weights(mask, name, *around) for name in self._sums]

        def pool_layer(states: Tensor) -> Tensor:
            # one product for all: pool() would turn the states to float32 once a pooling
            found = []
            if weights:
                kept = states.float().masked_fill(~mask[..., None], 0.0)
                found.append(torch.bmm(torch.stack(weights, dim=1), kept))
            if self._with_max:
                found.append(pool(states, mask, "max")[:, None])
            return torch.cat(found, dim=1)

        count = len(self._stack)
        inner = [layer for layer in self._layers if layer < count]
        with record_outputs(self._stack, inner, pool_layer) as recorded:
            output = self._model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
        if count in self._layers:
            recorded[count] = pool_layer(output.last_hidden_state)
        return recorded
