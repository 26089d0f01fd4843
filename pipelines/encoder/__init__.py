"""Documents to vectors in one process: a model, its prompt, its pooling. No Ray here.

``encoder``                texts to float32 (n, d): batches of like length, padded or packed
``decoder``                which forward pass, and that it computes what the model's own does
``describe``               flags, adapter and folder to a description; checks before any load
``description``            what decides a vector, and its fingerprint
``remembered``             what takes seconds to find out, kept on this machine
``sources``                a model's name to a local folder of checked files
``gguf_files``             a GGUF file to a folder, split and positions as trained
``usage``                  how a sentence-transformers folder says it is used
``model_code``             code that comes with a model: run, or refused where it would be missed
``adapters``               what an adapter's own settings may ask for
``checkpoint``             weights held against their configuration
``base_model``             weights, with an adapter merged
``quantized``              weights that are quantised in the files, made plain
``precision``              device and precision where the hardware decides them
``prompts``                the words around a text
``tokenization``           a text to token ids; none can lose its prompt's suffix
``tokenizer_file``         the rules of a tokenizer.json, whatever class is named
``sentencepiece``          a tokenizer.model as a fast tokenizer
``padded``                 the forward pass of any model
``packed``                 a faster one for Llama-like models, without padding
``packed_attention``       its attention
``elementwise``            the work between its products, plain or fused
``int8``                   linear layers in eight bits, rounded row by row
``pooling``                token states to one vector
``sentence_transformers``  folders of that library, in and out
``answers``                what of an LLM's answer is neither reasoning nor preamble
``chat``                   instruct LLMs of this machine
``endpoint``               LLMs behind an address, by OpenAI's protocol
``titles``                 names for groups of documents, by an instruct LLM
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
