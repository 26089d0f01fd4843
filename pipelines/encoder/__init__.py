"""Documents to vectors in one process: a model, its prompt, its pooling. No Ray here.

``encoder`` runs what ``description`` says; ``sources`` finds a model's files and ``base_model``
loads them with an adapter; ``prompts`` and ``tokenization`` make token ids, ``padded`` or
``packed`` their states, ``pooling`` the vectors.
"""

from __future__ import annotations

import importlib

__all__ = ["Encoder", "EncoderConfig", "EncoderDescription"]


def __getattr__(name: str) -> object:
    # a job that only reads a description does not wait for torch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "encoder" if name == "Encoder" else "description"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
