"""A base model in eight or four bits to put an adapter on (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314): a half or a quarter of the memory, for large models on small GPUs.

Only training sees the rounded weights; the encoder merges the adapter into the model's own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from pipelines.encoding.base_model import quiet_loading
from pipelines.errors import InputError

Quantize = Literal["none", "8bit", "4bit"]
"""Bits of a base model's weights in training; ``none`` leaves them in the encoder's dtype."""


def require_quantization(quantize: Quantize, device_type: str) -> None:
    """Raise :class:`InputError` where this machine cannot train on a quantized base model."""
    if quantize == "none":
        return
    if device_type != "cuda":
        raise InputError(
            f"--quantize {quantize} needs a CUDA GPU for each training worker, found none: leave "
            "it out, or run where there are GPUs"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"--quantize {quantize} needs the package bitsandbytes, which is not installed here: "
            "pip install 'shoal[quantize]' on every machine, or leave it out"
        )


def load_quantized_base(
    folder: Path,
    quantize: Quantize,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Any:
    """The model in ``folder`` without its LM head, frozen, its linear layers quantized.

    Args:
        folder: of a base model.
        quantize: ``8bit`` (LLM.int8) or ``4bit`` (NF4 with quantized scales).
        dtype: of everything else, and of the products.
        device: where it is to run.
        trust_remote_code: run Python code that comes with the model.
    """
    settings = (
        transformers.BitsAndBytesConfig(load_in_8bit=True)
        if quantize == "8bit"
        else transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    with quiet_loading():
        model = transformers.AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            quantization_config=settings,
            device_map={"": device},
        )
    return model.eval().requires_grad_(False)
