"""A GGUF file becomes a folder of safetensors: weights, configuration and tokenizer.

transformers reads weights and vocabulary. What it leaves out without a word is read here as
llama.cpp means it, or the file is refused by what it holds: the split before the merges, the
opening token, scaled positions, Gemma's query scale.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.encoder.sentencepiece import put_around
from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

CONVERSION = 4
"""Number of this conversion; a folder made by another one is made anew."""

# By the names of tokenizer.ggml.pre, as llama.cpp's llama-vocab.cpp groups them.
_LIKE_GPT2 = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe")
_DIGITS_FIRST = (
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
)  # fmt: skip
_OPENED = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
)  # fmt: skip
_WHOLE_WORDS_FIRST = (*_OPENED, "tekken")
_FACTORS = {"both": "freqs", "short": "factors_short", "long": "factors_long"}
# What stands in a layer only where its configuration says so.
_SAID_PARTS = re.compile(
    r"blk\.\d+\.((attn_(q|k|v|qkv|output)|ffn_(up|down|gate))\.bias|attn_[qk]_norm\.weight)"
)
# Settings to which the shapes of weights hold, that transformers or what follows reads, or that
# decide no state.
_HEEDED = re.compile(
    r"(block_count|(context|embedding|(expert_(shared_)?)?feed_forward)_length|vocab_size|"
    r"expert_(used_)?count|nextn_predict_layers|full_attention_interval|pooling_type|"
    r"final_logit_softcapping|logit_scale|tensor_data_layout|"
    r"attention\.(causal|head_count(_kv)?|(key|value)_length|layer_norm_(rms_)?epsilon|"
    r"sliding_window)|"
    r"rope\.(dimension_count|freq_base(_swa)?|scale_linear|"
    r"scaling\.(type|factor|attn_factor|original_context_length|finetuned|"
    r"yarn_(attn_factor|beta_fast|beta_slow|ext_factor|log_multiplier)))|"
    r"shortconv\.l_cache|ssm\.(conv_kernel|group_count|inner_size|state_size|time_step_rank))"
)
# Settings that ask for nothing where they are so.
_NONE = {
    "attention.max_alibi_bias": 8.0, "expert_gating_func": 1, "ssm.dt_b_c_rms": False,
    "use_parallel_residual": False,
}  # fmt: skip
_EPSILONS = (
    "rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon",
)  # fmt: skip
# Models that turn a part of each head by their position.
_TURN_A_PART = ("phi3", "stablelm", "nemotron", "qwen35", "qwen35moe", "minimax-m2")
# Factors that llama.cpp applies, and the setting of transformers that is the same.
_SCALES = {
    "expert_weights_scale": "routed_scaling_factor",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.clamp_kqv": "clip_qkv",
    "attn_logit_softcapping": "attn_logit_softcapping",
}
# llama.cpp reads no window for them.
_WITHOUT_WINDOW = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")
_POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken"}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def convert_gguf(source: Path, folder: Path) -> None:
    """Unpack a GGUF file into a folder of bfloat16 safetensors, configuration and tokenizer.

    Raises :class:`InputError` for a file that is no GGUF model, and for settings in it that cannot
    be kept.
    """
    import gguf
    import torch
    import transformers

    log.info("converting %s to safetensors, once", source.name)
    try:
        reader = gguf.GGUFReader(source)
        fields = {name: _value(field) for name, field in reader.fields.items()}
        refuse_parts(source, fields)
        config = transformers.AutoConfig.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
        width = fields.get(f"{fields['general.architecture']}.attention.key_length")
        if width is not None and hasattr(config, "head_dim"):
            config.head_dim = width  # it is not read for every architecture
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them
            dtype=torch.float32,
            trust_remote_code=False,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    except InputError:
        raise
    except (ValueError, KeyError, OSError, IndexError, AssertionError) as error:
        raise InputError(
            f"{source} cannot be read as a GGUF model: {str(error).splitlines()[0]}"
        ) from error
    for name, stored, wanted in sorted(report["mismatched_keys"])[:1]:
        raise InputError(
            f"{source} has {name} of shape {tuple(stored)}, its settings call for {tuple(wanted)}: "
            "fetch it again, or give the model as safetensors"
        )
    if report["missing_keys"]:
        raise InputError(
            f"{source} lacks {min(report['missing_keys'])}, which would be random: fetch it again, "
            "or give the model as safetensors"
        )
    tensors = {t.name: t.data for t in reader.tensors if t.name.startswith("rope_")}
    try:
        split_as_trained(tokenizer, fields)
        open_as_trained(tokenizer, fields)
        scale_positions(model.config, fields, tensors)
        turn_as_trained(model.config, fields)
        scale_norms(model.config, fields)
        scale_queries(model.config, fields)
        refuse_left_out(model, fields, [tensor.name for tensor in reader.tensors])
        attend_as_said(model.config, fields)
        write_usage(folder, fields)
    except InputError as error:
        raise InputError(f"{source} cannot be used: {error}") from error
    model.to(torch.bfloat16).save_pretrained(folder)
    share_weights(folder)
    # HF_HUB_OFFLINE would be written down, and a folder's content is its revision
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(folder)


def share_weights(folder: Path) -> None:
    """Let weights be read by all who may read the rest: safetensors 0.8 lets their owner alone."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def refuse_parts(source: Path, fields: dict[str, Any]) -> None:
    """Refuse a file that holds some of a model's weights, whose others would be random."""
    parts = fields.get("split.count", 1)
    if parts > 1:
        raise InputError(
            f"{source} is one of {parts} parts of a model: join them (llama-gguf-split --merge) "
            "and give the whole"
        )


def split_as_trained(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Set the split that the file names; :class:`InputError` for one that is not known."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = fields.get("tokenizer.ggml.pre", "default")
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return
    backend = tokenizer.backend_tokenizer
    if name in _DIGITS_FIRST:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif name not in _LIKE_GPT2 and name not in GGUF_PRE_TOKENIZER_SPLITS:
        known = sorted({*_LIKE_GPT2, *_DIGITS_FIRST, *GGUF_PRE_TOKENIZER_SPLITS})
        raise InputError(
            f"its tokenizer splits texts as {name!r}, which is not known (known are "
            f"{', '.join(known)}): give the model as safetensors with its tokenizer.json"
        )
    if name in _WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True


def open_as_trained(tokenizer: Any, fields: dict[str, Any]) -> None:
    """Let the tokenizer put its opening and closing tokens as llama.cpp does."""
    pre, kind = fields.get("tokenizer.ggml.pre"), fields.get("tokenizer.ggml.model")
    opens = fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _OPENED)
    closes = fields.get("tokenizer.ggml.add_eos_token", False)
    around = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    wanted = [
        *([tokenizer.bos_token_id] if opens and tokenizer.bos_token_id is not None else []),
        *around[1],
        *([tokenizer.eos_token_id] if closes and tokenizer.eos_token_id is not None else []),
    ]
    if around[0] != wanted:
        put_around(tokenizer, opens=opens, closes=closes)


def scale_positions(config: Any, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write the file's scaling of positions into a model's configuration.

    Raises :class:`InputError` for a scaling that has no equal there.
    """
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None)
    if ropes is None:
        return
    arch = fields["general.architecture"]
    key = f"{arch}.rope.scaling"
    kind = fields.get(f"{key}.type", "none")
    factor = float(fields.get(f"{key}.factor") or fields.get(f"{arch}.rope.scale_linear") or 1.0)
    original = int(fields.get(f"{key}.original_context_length") or text.max_position_embeddings)
    if f"{key}.type" not in fields and factor != 1.0:
        kind = "linear"
    wide = ropes.get("full_attention", ropes)
    factors = {
        name: tensors[f"rope_{tensor}.weight"].tolist()
        for name, tensor in (
            ("both", "freqs"),
            ("short", "factors_short"),
            ("long", "factors_long"),
        )
        if f"rope_{tensor}.weight" in tensors
    }
    if factors:
        # each frequency has its own divisor, which is what longrope's tables say
        attention = fields.get(f"{key}.attn_factor")
        wide.update(
            rope_type="longrope",
            short_factor=factors.get("short", factors.get("both")),
            long_factor=factors.get("long", factors.get("both")),
            original_max_position_embeddings=original,
            attention_factor=1.0 if "both" in factors else attention,
            factor=text.max_position_embeddings / original,
        )
        if wide["short_factor"] is None or wide["long_factor"] is None:
            raise InputError("it has factors of short or of long texts alone")
    elif kind == "linear" and factor != 1.0:
        wide.update(rope_type="linear", factor=factor)
    elif kind == "yarn":
        wide.update(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
        for name in ("beta_fast", "beta_slow"):
            if f"{key}.yarn_{name}" in fields:
                wide[name] = float(fields[f"{key}.yarn_{name}"])
        plain = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0,
                 "yarn_log_multiplier": 0.0}  # fmt: skip
        for name, value in plain.items():
            if fields.get(f"{key}.{name}", value) not in (value, -1.0):
                raise InputError(f"its YaRN scaling has a {name} of its own")
    elif kind not in ("none", "linear"):
        raise InputError(f"its positions are scaled by {kind!r}, which is not read from GGUF")


def turn_as_trained(config: Any, fields: dict[str, Any]) -> None:
    """Write the base of the file's positions, and the part of each head that they turn.

    Raises :class:`InputError` where the model made of it cannot turn as it says.
    """
    arch, text = fields["general.architecture"], config.get_text_config()
    ropes = getattr(text, "rope_parameters", None)
    if ropes is None:
        return
    bases = {"freq_base": ropes.get("full_attention", ropes)}
    if "sliding_attention" in ropes:
        bases["freq_base_swa"] = ropes["sliding_attention"]
    elif fields.get(f"{arch}.rope.freq_base_swa", 0) not in (0, fields[f"{arch}.rope.freq_base"]):
        raise InputError("the positions of its windows have a base of their own")
    for name, rope in bases.items():
        base = float(fields.get(f"{arch}.rope.{name}", 10000.0))
        if not math.isclose(rope.get("rope_theta", 0.0), base, rel_tol=1e-6):
            rope["rope_theta"] = base
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    turned = fields.get(f"{arch}.rope.dimension_count", width)
    part = bases["freq_base"].get("partial_rotary_factor", 1.0)
    if turned == int(width * part):
        return
    if arch not in _TURN_A_PART:
        raise InputError(f"its positions turn {turned} of the {width} numbers of a head")
    bases["freq_base"]["partial_rotary_factor"] = turned / width


def scale_norms(config: Any, fields: dict[str, Any]) -> None:
    """Write what the file adds to a variance before it divides by its root."""
    arch, text = fields["general.architecture"], config.get_text_config()
    for name in ("layer_norm_epsilon", "layer_norm_rms_epsilon"):
        said = fields.get(f"{arch}.attention.{name}")
        own = next((key for key in _EPSILONS if hasattr(text, key)), None)
        if said is None:
            continue
        if own is None:
            raise InputError(f"its {arch}.attention.{name} of {said:g} is not read from GGUF")
        if not math.isclose(getattr(text, own), said, rel_tol=1e-4):
            setattr(text, own, said)


def scale_queries(config: Any, fields: dict[str, Any]) -> None:
    """Set Gemma's query scale, which llama.cpp takes from the model's size."""
    arch = fields["general.architecture"]
    text = config.get_text_config()
    if arch in _LAYERS_OF_27B and hasattr(text, "query_pre_attn_scalar"):
        width = text.hidden_size // text.num_attention_heads
        large = text.num_hidden_layers == _LAYERS_OF_27B[arch]
        text.query_pre_attn_scalar = width if large else text.head_dim


def refuse_left_out(model: Any, fields: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse weights and factors of a file that the model which was made of it does not have."""
    import gguf
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    arch, text = fields["general.architecture"], model.config.get_text_config()
    kind = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    count = text.num_hidden_layers
    later = fields.get(f"{arch}.nextn_predict_layers", 0)
    known = set()
    if kind is not None:
        places = gguf.get_tensor_name_map(kind, count)
        known = {places.get_name(n, try_suffixes=(".weight", ".bias")) for n in model.state_dict()}
    for name in sorted(names):
        number = name.split(".")[1] if name.startswith("blk.") else "0"
        beyond = number.isdigit() and int(number) >= count + later
        if beyond or (known and _SAID_PARTS.fullmatch(name) and name not in known):
            raise InputError(f"it holds {name}, which {type(model).__name__} would leave out")
    for key, setting in _SCALES.items():
        said, own = fields.get(f"{arch}.{key}"), getattr(text, setting, None)
        plain = text.head_dim**-0.5 if key == "attention.scale" and hasattr(text, "head_dim") else 1
        unset = {0.0, plain if key.endswith("scale") else 0.0}
        same = any(math.isclose(said or 0.0, x, rel_tol=1e-4) for x in {own or 0.0, *unset})
        if said is not None and not same:
            raise InputError(f"its {arch}.{key} of {said:g} is not read from GGUF")
    for key, value in fields.items():
        name = key.removeprefix(f"{arch}.")
        read = _HEEDED.fullmatch(name) or name in _SCALES or _NONE.get(name, _NONE) == value
        own = name == "rope.dimension_sections" and arch in GGUF_CONFIG_ARCHS
        if name != key and not read and not own:
            raise InputError(f"its {key} of {value} is not read from GGUF")
    window = fields.get(f"{arch}.attention.sliding_window")
    if window and arch not in _WITHOUT_WINDOW and window < text.max_position_embeddings:
        own = getattr(text, "sliding_window", None)
        if own != window:
            raise InputError(f"its window of {window} tokens is not read from GGUF (found: {own})")


def attend_as_said(config: Any, fields: dict[str, Any]) -> None:
    """Let a model attend both ways whose file says that it is not causal."""
    if fields.get(f"{fields['general.architecture']}.attention.causal") is False:
        config.get_text_config().is_causal = False


def write_usage(folder: Path, fields: dict[str, Any]) -> None:
    """Say beside an embedding model how it is pooled, as a sentence-transformers folder does.

    Raises :class:`InputError` for a model that ranks pairs of texts.
    """
    pooling = fields.get(f"{fields['general.architecture']}.pooling_type", 0)
    if not pooling:
        return
    if pooling not in _POOLINGS:
        raise InputError(
            f"its pooling_type {pooling} makes no vector of a text: take another model"
        )
    names = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "",
         "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)
    ]  # fmt: skip
    (folder / "1_Pooling").mkdir(parents=True)
    for path, content in (
        (folder / "modules.json", modules),
        (folder / "1_Pooling" / "config.json", {"pooling_mode": _POOLINGS[pooling]}),
    ):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _value(field: Any) -> Any:
    """A field's content; of an array only the number of its entries."""
    import gguf

    if field.types[0] == gguf.GGUFValueType.ARRAY:
        return len(field.data)
    value = field.parts[field.data[0]]
    if field.types[0] == gguf.GGUFValueType.STRING:
        return bytes(value).decode("utf-8", "replace")
    return value[0].item()
