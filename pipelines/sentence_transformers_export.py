"""An encoder as a folder that sentence-transformers opens, with nothing of ours installed.

The adapter is merged into the weights, and the prompt goes into the tokenizer: its post-processor
puts prompt tokens around every text, and truncation leaves room for them, so that a long text
does not lose its suffix there either.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch

from pipelines.base_model import load_base_model
from pipelines.encoder_description import EncoderDescription, load_model_settings
from pipelines.errors import InputError
from pipelines.tokenization import PromptedTokenizer

_POOLING_FLAGS = {
    "last": ("pooling_mode_lasttoken",),
    "mean": ("pooling_mode_mean_tokens",),
    "weighted-mean": ("pooling_mode_weightedmean_tokens",),
    "max": ("pooling_mode_max_tokens",),
    "first": ("pooling_mode_cls_token",),
    "last+mean": ("pooling_mode_mean_tokens", "pooling_mode_lasttoken"),
}
_ALL_FLAGS = sorted({flag for flags in _POOLING_FLAGS.values() for flag in flags})
_MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    ("1_Pooling", "sentence_transformers.models.Pooling"),
    ("2_Normalize", "sentence_transformers.models.Normalize"),
)


def export_to_sentence_transformers(description: EncoderDescription, folder: Path) -> None:
    """Write the encoder into ``folder``, which must be local.

    Vectors agree with ours in every cosine; of ``last+mean`` the two halves change places. Raises
    :class:`InputError` for what sentence-transformers cannot do: ``body-mean``, and states of
    other layers than the last.
    """
    model_files, adapter_files = description.fetch()
    settings = load_model_settings(model_files.folder, description.trust_remote_code)
    if description.pooling not in _POOLING_FLAGS or description.layers != (
        settings.num_hidden_layers,
    ):
        raise InputError(
            f"sentence-transformers has no pooling {description.pooling} of layers "
            f"{list(description.layers)}: it knows {', '.join(_POOLING_FLAGS)} of the last layer"
        )
    model = load_base_model(
        model_files.folder,
        dtype=getattr(torch, description.dtype),
        device=torch.device("cpu"),
        adapter=None if adapter_files is None else adapter_files.folder,
        trust_remote_code=description.trust_remote_code,
    )
    model.save_pretrained(folder)  # type: ignore[operator]
    prompted = PromptedTokenizer.load(description)
    tokenizer = prompted.tokenizer
    tokenizer.backend_tokenizer.post_processor = surround(prompted)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    longest = prompted.max_tokens + prompted.prefix_tokens + prompted.suffix_tokens
    flags = _POOLING_FLAGS[description.pooling]
    contents = {
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": settings.hidden_size,
            **{flag: flag in flags for flag in _ALL_FLAGS},
        },
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": kind}
            for place, (path, kind) in enumerate(_MODULES[: 3 if description.normalize else 2])
        ],
    }
    for path, _ in _MODULES:
        (folder / path).mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def surround(prompted: PromptedTokenizer) -> tokenizers.processors.TemplateProcessing:
    """A post-processor that puts the prompt's tokens around a text."""
    parts = {"[HEAD]": prompted.head, "[TAIL]": prompted.tail}
    used = {name: ids for name, ids in parts.items() if ids}
    template = [name for name in ("[HEAD]", "$A", "[TAIL]") if name == "$A" or name in used]
    to_token = prompted.tokenizer.convert_ids_to_tokens
    special = [
        {"id": name, "ids": list(ids), "tokens": to_token(list(ids))} for name, ids in used.items()
    ]
    return tokenizers.processors.TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=special
    )
