"""The model that a description names, for passes that read more of it than an encoder does."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.encoding.base_model import load_base_model
from pipelines.encoding.encoder_description import EncoderDescription
from pipelines.encoding.int8_linear import quantize_linears
from pipelines.encoding.padded_decoder import find_layers


def load_described_model(description: EncoderDescription, device: torch.device) -> Any:
    """An encoder's base model with all its layers, adapter merged, in the encoder's precision.

    Raises :class:`pipelines.errors.InputError` where model or adapter are not the described ones.
    """
    model, adapter = description.fetch()
    int8 = description.dtype == "int8"
    loaded = load_base_model(
        model.folder,
        dtype=torch.float32 if int8 else getattr(torch, description.dtype),
        device=device,
        adapter=None if adapter is None else adapter.folder,
        trust_remote_code=description.trust_remote_code,
    )
    if int8:
        quantize_linears(find_layers(loaded))
    return loaded
