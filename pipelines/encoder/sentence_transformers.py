"""Encoders as sentence-transformers folders, written and read without running that library.

Such a folder has no place for a suffix prompt. The export therefore writes the prompt into the
tokenizer: its post-processor puts the prompt's token ids around every text, after the text has
been cut. Whoever loads the folder there gets this encoder's vectors without a line of code.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from pipelines.encoder.base_model import load_base_model
from pipelines.encoder.description import EncoderConfig, EncoderDescription
from pipelines.encoder.gguf_files import share_weights
from pipelines.encoder.prompts import PLACEHOLDER
from pipelines.encoder.sources import fetch_model
from pipelines.encoder.tokenization import PromptedTokenizer, apart_lead
from pipelines.encoder.tokenizer_file import TELLING_TEXTS
from pipelines.encoder.usage import LATE_LISTS, MODES, read_usage
from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

_MODULES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def check_export(description: EncoderDescription) -> list[str]:
    """The library's names of a pooling; :class:`InputError` for what has no equal there."""
    own = {part: mode for mode, part in MODES.items()}
    modes = [own.get(part, "") for part in description.pooling.split("+")]
    unlike = {
        f"pooling {description.pooling!r} (of {', '.join(own)})": "" in modes,
        "int8 (float32 is near)": description.dtype == "int8",
        f"the mean of layers {list(description.layers)} (name one)": len(description.layers) > 1,
        "projections after pooling": bool(description.projections),
        "attention other than the model's own": description.attention is not None,
        "a prompt that is not pooled": not description.pool_prompt,
        "texts in lower case": description.lower_case,
    }
    for what, there in unlike.items():
        if there:
            raise InputError(f"{what} cannot be exported: sentence-transformers has no equal to it")
    return modes


def export_sentence_transformer(description: EncoderDescription, folder: Path) -> None:
    """Write an encoder, adapter merged, as a folder that ``SentenceTransformer(folder)`` loads.

    The weights are written in the encoder's dtype. Raises :class:`InputError` for what has no
    equal there: the mean over the body alone, int8, and averaged layers.
    """
    modes = check_export(description)
    files, adapter = description.fetch()
    model = load_base_model(
        files.folder,
        dtype=getattr(torch, description.dtype),
        device=torch.device("cpu"),
        adapter=None if adapter is None else adapter.folder,
        trust_remote_code=description.trust_remote_code,
    )
    layer, count = description.layers[0], model.config.get_text_config().num_hidden_layers
    if layer != count and model.config.model_type in LATE_LISTS:
        raise InputError(
            f"layer {layer} of {type(model).__name__} cannot be exported: its layers are counted "
            "in another way there; export the last one"
        )
    if description.query_prompt is not None:
        log.warning(
            "the folder holds one prompt, that of documents: queries with %r are to be embedded by "
            "Shoal", description.query_prompt,
        )  # fmt: skip
    tokenizer, written_before = exported_tokenizer(
        PromptedTokenizer.load(description), model.config
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    share_weights(folder)
    tokenizer.save_pretrained(folder)
    output = "last_hidden_state" if layer == count else ["hidden_states", layer]
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": output}},
            "module_output_name": "token_embeddings",
        },
    )
    pooling = {
        "embedding_dimension": model.config.get_text_config().hidden_size,
        "pooling_mode": modes,
        "include_prompt": True,
    }
    _write(folder / "1_Pooling" / "config.json", pooling)
    names = ["Transformer", "Pooling"]
    if description.normalize:
        names.append("Normalize")
        _write(folder / "2_Normalize" / "config.json", {})
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": _MODULES[name]}
        for i, name in enumerate(names)
    ]
    _write(folder / "modules.json", modules)
    settings: dict[str, Any] = {"similarity_fn_name": "cosine"}
    if written_before:
        settings["prompts"] = dict.fromkeys(("query", "document", "text"), written_before)
        settings["default_prompt_name"] = "text"
    if description.dimensions is not None:
        settings["truncate_dim"] = description.dimensions
    _write(folder / "config_sentence_transformers.json", settings)


def exported_tokenizer(
    prompted: PromptedTokenizer, config: Any
) -> tuple[transformers.PreTrainedTokenizerFast, str]:
    """A tokenizer with the prompt for a model of this configuration, and what it could not hold.

    For some kinds of models (Qwen2) transformers builds every tokenizer anew and leaves out what
    it is to write before a text; that is then a prompt of the folder.

    Raises :class:`InputError` where transformers would read the tokenizer by other rules.
    """
    before, start = prompted.head, apart_lead(prompted.tokenizer, prompted.lead)
    if prompted.joined:  # the prompt's last words must be read together with the text
        before, start = prompted.head[: prompted.apart], prompted.lead
    for inside, outside in ((start, ""), ("", start)):
        tokenizer = tokenizer_with_prompt(prompted, before, inside)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            there = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        texts = [outside + text for text in TELLING_TEXTS]
        if there(texts)["input_ids"] == tokenizer(texts)["input_ids"]:
            return tokenizer, outside
    raise InputError(
        f"transformers reads the tokenizer of a {config.model_type} by rules of its own "
        f"({type(there).__name__}), which are not this model's: its vectors would be others there"
    )


def tokenizer_with_prompt(
    prompted: PromptedTokenizer, before: Sequence[int], start: str
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that itself cuts a text and puts the prompt around it.

    Args:
        prompted: tokenizer and prompt.
        before: token ids of the prompt before a text.
        start: what is written before a text and read with it.
    """
    own = prompted.tokenizer
    if not own.is_fast:
        raise InputError(
            f"a {type(own).__name__} cannot be exported: save the model's as tokenizer.json"
        )
    backend = tokenizers.Tokenizer.from_str(own.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    if start:
        lead = tokenizers.normalizers.Prepend(start)
        rest = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([lead, *rest])
    around = {"head": before, "tail": prompted.tail}
    pieces = [
        {"id": name, "ids": list(ids), "tokens": own.convert_ids_to_tokens(list(ids))}
        for name, ids in around.items()
        if ids
    ]
    single = " ".join(name for name in ("head", "$A", "tail") if name == "$A" or around[name])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=pieces
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=own.bos_token,
        eos_token=own.eos_token,
        pad_token=own.pad_token or own.eos_token or own.convert_ids_to_tokens(0),
        model_max_length=prompted.most_tokens,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
    )


def import_sentence_transformer(name: str, *, prompt_name: str | None = None) -> EncoderConfig:
    """The encoder that a sentence-transformers model is.

    Args:
        name: folder or hub id of a model of a transformer, a pooling and what may follow it.
        prompt_name: which of the model's prompts to use; None for its default, if it has one.

    Raises:
        InputError: modules or settings that have no equal here, or no such prompt.
    """
    folder = fetch_model(name).folder
    usage = read_usage(folder, name)
    if usage is None:
        raise InputError(f"{folder} is no sentence-transformers model: it has no modules.json")
    if prompt_name is not None and prompt_name not in usage.prompts:
        raise InputError(f"no prompt {prompt_name!r}; the model has {sorted(usage.prompts)}")
    prefix = None if prompt_name is None else usage.prompts[prompt_name]
    return EncoderConfig(
        model=name,
        prompt=None if prefix is None else f"{prefix}{PLACEHOLDER}",
        normalize=usage.normalize,
    )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
