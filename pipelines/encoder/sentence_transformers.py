"""Encoders as sentence-transformers folders, written and read without running that library.

Such a folder has no place for a suffix prompt. The export therefore writes the prompt into the
tokenizer: its post-processor puts the prompt's token ids around every text, after the text has
been cut. Whoever loads the folder there gets this encoder's vectors without a line of code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from pipelines.encoder.base_model import load_base_model
from pipelines.encoder.description import (
    EncoderConfig,
    EncoderDescription,
    Pooling,
)
from pipelines.encoder.sources import fetch_model, load_model_settings
from pipelines.encoder.tokenization import PromptedTokenizer, special_tokens_around
from pipelines.runtime.errors import InputError

_MODES: dict[Pooling, list[str]] = {
    "last": ["lasttoken"],
    "mean": ["mean"],
    "weighted-mean": ["weightedmean"],
    "max": ["max"],
    "first": ["cls"],
    "last+mean": ["lasttoken", "mean"],
}
_OLD_FLAGS = {
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
}
_MODULES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def export_sentence_transformer(description: EncoderDescription, folder: Path) -> None:
    """Write an encoder, adapter merged, as a folder that ``SentenceTransformer(folder)`` loads.

    The weights are written in the encoder's dtype. Raises :class:`InputError` for what has no
    equal there: the mean over the body alone, int8, and averaged layers.
    """
    if description.pooling not in _MODES:
        raise InputError(
            f"pooling {description.pooling!r} cannot be exported: sentence-transformers has no "
            f"such pooling; {', '.join(_MODES)} can be"
        )
    if description.dtype == "int8":
        raise InputError("an int8 encoder cannot be exported: use float32, its vectors are near")
    if len(description.layers) > 1:
        raise InputError("averaged layers cannot be exported: name one layer")
    files, adapter = description.fetch()
    model = load_base_model(
        files.folder,
        dtype=getattr(torch, description.dtype),
        device=torch.device("cpu"),
        adapter=None if adapter is None else adapter.folder,
        trust_remote_code=description.trust_remote_code,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer_with_prompt(PromptedTokenizer.load(description)).save_pretrained(folder)
    layer, count = description.layers[0], model.config.get_text_config().num_hidden_layers
    output = "last_hidden_state" if layer == count else ["hidden_states", layer]
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": output}},
            "module_output_name": "token_embeddings",
        },
    )
    modes = _MODES[description.pooling]
    pooling = {
        "embedding_dimension": description.dimension // len(modes),
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
    _write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def tokenizer_with_prompt(prompted: PromptedTokenizer) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that itself cuts a text and puts the prompt's token ids around it."""
    own = prompted.tokenizer
    backend = tokenizers.Tokenizer.from_str(own.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    if prompted.lead:
        lead = tokenizers.normalizers.Prepend(prompted.lead)
        rest = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([lead, *rest])
    around = {"head": prompted.head, "tail": prompted.tail}
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
        model_max_length=len(prompted.head) + prompted.max_tokens + len(prompted.tail),
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
    )


def import_sentence_transformer(name: str, *, prompt_name: str | None = None) -> EncoderConfig:
    """The encoder that a sentence-transformers model is.

    Args:
        name: folder or hub id of a model of a transformer, a pooling and maybe a normalisation.
        prompt_name: which of the model's prompts to use; None for its default, if it has one.

    Raises:
        InputError: other modules than these, or another pooling than Shoal has.
    """
    folder = fetch_model(name).folder
    modules = _read(folder / "modules.json")
    paths = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    unknown = sorted(paths.keys() - _MODULES.keys())
    if unknown or paths.get("Transformer") != "" or "Pooling" not in paths:
        raise InputError(
            f"{name} is made of {', '.join(paths)}; only a Transformer at the top, a Pooling and "
            "a Normalize can be imported"
        )
    prefix = _prompt(folder, prompt_name)
    transformer = _read(folder / "sentence_bert_config.json")
    pooling = _pooling(_read(folder / paths["Pooling"] / "config.json"), prefix)
    output = transformer.get("modality_config", {}).get("text", {}).get("method_output_name")
    return EncoderConfig(
        model=name,
        prompt=f"{prefix}{{text}}",
        pooling=pooling,
        layer=output[1] if isinstance(output, list) else -1,
        max_tokens=_body_limit(folder, transformer, prefix),
        normalize="Normalize" in paths,
    )


def _prompt(folder: Path, prompt_name: str | None) -> str:
    settings = _read(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts", {})
    prompt_name = prompt_name or settings.get("default_prompt_name")
    if prompt_name is not None and prompt_name not in prompts:
        raise InputError(f"no prompt {prompt_name!r}; the model has {sorted(prompts)}")
    return prompts.get(prompt_name, "")


def _pooling(settings: dict[str, Any], prefix: str) -> Pooling:
    modes = settings.get("pooling_mode") or [m for f, m in _OLD_FLAGS.items() if settings.get(f)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if prefix and not settings.get("include_prompt", True):
        raise InputError("the model leaves its prompt out of the pooling: import it without prompt")
    for pooling, known in _MODES.items():
        if modes == known:
            return pooling
    raise InputError(f"the model pools by {modes}, which has no equal here")


def _body_limit(folder: Path, transformer: dict[str, Any], prefix: str) -> int:
    """Tokens left to a text by the model's limit on prompt, text and special tokens together."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    limit = transformer.get("max_seq_length") or tokenizer.model_max_length
    limit = min(limit, load_model_settings(folder).max_position_embeddings)
    opening, closing = special_tokens_around(tokenizer)
    words = tokenizer.encode(prefix.rstrip(" "), add_special_tokens=False)
    return limit - len(opening) - len(words) - len(closing)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path.parent} is no sentence-transformers model: it has no {path.name}")
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
