"""What the last token attends to: weights of one layer, heads averaged, text by text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pipelines.encoding.batching import token_budget_batches
from pipelines.encoding.described_model import load_described_model
from pipelines.encoding.encoder_description import EncoderDescription
from pipelines.encoding.padded_decoder import find_layers, pad_right
from pipelines.errors import InputError

# All heads' weights of all layers up to the wanted one are held at once.
_MOST_WEIGHTS = 1 << 27


def load_eager(description: EncoderDescription, device: torch.device) -> Any:
    """An encoder's base model, adapter merged, with attention that gives its weights.

    Layers above the one that is read, the single one of ``description.layers``, are not run.

    Raises :class:`InputError` for a model without such attention.
    """
    model = load_described_model(description, device)
    try:
        model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"{description.model}: this model cannot give its attention weights: {error}"
        ) from error
    stack = find_layers(model)
    del stack[description.layers[0] :]
    return model


@torch.inference_mode()
def last_token_attention(
    model: Any, token_ids: Sequence[Sequence[int]], layer: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Place of a text and its last token's weights, float32 (tokens,), which sum to 1.

    Args:
        model: what :func:`load_eager` gave.
        token_ids: texts within their prompts.
        layer: which layer's attention, from 1.

    Longest texts come first. Raises :class:`InputError` where the model gives no weights.
    """
    settings = model.config.get_text_config()
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in token_ids]
    a_token = layer * settings.num_attention_heads * max(lengths)
    for batch in token_budget_batches(lengths, max(1, _MOST_WEIGHTS // a_token)):
        input_ids, mask = pad_right([token_ids[index] for index in batch], device)
        output = model(
            input_ids=input_ids,
            attention_mask=mask.long(),
            output_attentions=True,
            use_cache=False,
        )
        if not output.attentions or output.attentions[layer - 1] is None:
            raise InputError(f"{type(model).__name__} gives no attention weights")
        weights = output.attentions[layer - 1].float().mean(dim=1)  # heads
        for place, index in enumerate(batch):
            last = lengths[index] - 1
            yield index, weights[place, last, : last + 1].cpu().numpy()
