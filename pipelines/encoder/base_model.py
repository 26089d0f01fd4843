"""A base model with its adapter merged into the weights, ready to run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import nn

from pipelines.encoder.adapters import FILE_NAME as ADAPTER_SETTINGS
from pipelines.encoder.checkpoint import (
    ADAPTER_WEIGHTS,
    first_line,
    load_checked,
    quiet_loading,
    refuse_unread,
    without_adapter,
)
from pipelines.encoder.padded import runs_layers_again, unshare_layers
from pipelines.encoder.pooling import Projection
from pipelines.encoder.quantized import (
    WHEN_LOADED,
    bare_model,
    made_plain,
    plain_options,
    quantization,
)
from pipelines.encoder.usage import check_dense, digest_module
from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

KEPT_START = "kept_start"
"""In the metadata of an adapter's weights: no step was better than the start."""
_PREFIX = "base_model.model."
BOTH_WAYS = "use_bidirectional_attention"
"""Gemma's own word for attention to later tokens."""
OWN_WORD = {"gemma3_text": True, "gemma4_text": "all", "gemma4_unified_text": "all"}
"""What it says then. Gemma 1 and 2 heed the word for a text alone at most, and never in a batch."""
_SAMPLER = ".lora_monteclora_sampler."
"""In the names of weights by which an adapter's training varies it; its result needs none."""
_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = tuple(
    f".{name}{inner}.weight"
    for name in ("embed_tokens", "wte", "embed_in", "word_embeddings")
    for inner in ("", ".base_layer")  # where the adapter also changes them by LoRA
)


def load_base_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Path | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model in ``folder`` without its LM head, ready to run, ``adapter`` merged into it.

    Weights that are quantised in the files are the plain numbers that they stand for.

    Args:
        folder: of the base model.
        dtype: of the weights.
        device: where it is to run; on ``meta`` only names and shapes are read.
        adapter: folder of a PEFT adapter.
        attention: ``causal`` or ``bidirectional``; None as the model's files say.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: weights that do not go with the configuration, an adapter of another model,
            and one that changes nothing.
    """
    method = quantization(folder)
    options: dict[str, Any] = {"dtype": dtype, **plain_options(method)}
    if attention is not None:
        options["config"] = with_attention(folder, attention, trust_remote_code)
    if device.type == "meta":
        options["device_map"] = "meta"
    with quiet_loading(), without_adapter(folder) as plain:
        if device.type == "meta" and method == WHEN_LOADED:
            model = bare_model(plain, options, trust_remote_code)
            missing, unread = set[str](), set[str]()
        else:
            kind = transformers.AutoModel
            model, missing, unread = load_checked(kind, plain, folder, options, trust_remote_code)
            model = made_plain(model, method, dtype)
        if missing and type(model.config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            # Embeddings that are stored under the head's name are known to the class with a head,
            # and some names that are translated (DeepSeek-V4's last norm) are right there alone.
            kind = transformers.AutoModelForCausalLM
            whole, lacking, left = load_checked(kind, plain, folder, options, trust_remote_code)
            if not lacking:
                model, missing, unread = made_plain(whole, method, dtype).base_model, lacking, left
    if missing:
        raise InputError(
            f"the weights in {folder} lack {min(missing)}, which its config.json "
            "calls for: they would be random; fetch the model again"
        )
    unshare_layers(model)
    refuse_unread(model, unread, folder)
    if adapter is not None:
        merge_adapter(model, adapter)
    model = model.eval().requires_grad_(False)
    return model if device.type == "meta" else model.to(device)


def learned_positions(model: nn.Module) -> int | None:
    """How many tokens a model with learned positions can read; None where they are computed."""
    for name, module in model.named_modules():
        place = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (place == "wpe" or "position" in place):
            # some begin after the padding token's place, or at an offset of their own
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - max(first, getattr(module, "offset", 0))
    return None


def with_attention(folder: Path, attention: str, trust_remote_code: bool) -> Any:
    """The configuration of the model in ``folder``, told to be causal or bidirectional."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    text, both_ways = config.get_text_config(), attention == "bidirectional"
    if text.model_type not in OWN_WORD:
        text.is_causal = not both_ways
        if hasattr(text, BOTH_WAYS):
            setattr(text, BOTH_WAYS, both_ways)
        return config
    # Windows are counted in another way then, so the word must stand there from the start.
    content, _ = config.get_config_dict(folder)
    told = content if text is config else content["text_config"]
    told.pop("is_causal", None)
    told[BOTH_WAYS] = OWN_WORD[text.model_type] if both_ways else None
    return config.from_dict(content)


def says_both_ways(settings: Any) -> bool:
    """Whether a model's configuration lets tokens see those after them."""
    word = OWN_WORD.get(settings.model_type)
    own = word is not None and getattr(settings, BOTH_WAYS, None) == word
    return own or getattr(settings, "is_causal", True) is False


def adapter_keys(adapter: Path) -> set[str]:
    """Names of an adapter's weights."""
    with safetensors.safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
        return set(file.keys())


def merge_adapter(model: Any, adapter: Path) -> float:
    """Add a PEFT adapter's change to the weights of ``model``; the share of layers that changed.

    An adapter of the model with its head names its layers as that model does. What it changes of
    the head itself decides no state and is left out: with tied embeddings it would move them.

    Raises :class:`InputError` where it does not fit, cannot be merged, or changes nothing without
    saying so itself.
    """
    import peft  # slow, and without an adapter not needed
    from peft.tuners.tuners_utils import BaseTunerLayer

    if runs_layers_again(model):
        raise InputError(
            f"adapter {adapter} changes a model that runs one layer many times "
            f"({type(model).__name__}), which has no equal here: merge it with PEFT, and give the "
            "result as --model"
        )
    keys = {key.removeprefix(_PREFIX) for key in adapter_keys(adapter)}
    prefix = f"{model.base_model_prefix}."
    if keys and all(key.split(".")[0] in _HEADS for key in keys):
        raise InputError(
            f"adapter {adapter} changes only {min(keys).split('.')[0]}, which decides no vector: "
            "leave it out"
        )
    shell: Any = model
    if any(key.startswith(prefix) for key in keys) and not hasattr(model, prefix[:-1]):
        # a model with its head is the base model under this name, and the head
        shell = nn.Module()
        setattr(shell, prefix[:-1], model)
        shell.config, shell.base_model_prefix = model.config, prefix[:-1]
        shell.get_input_embeddings = model.get_input_embeddings
        keys = {key for key in keys if key.startswith(prefix)}
    moved = _place_embeddings(model, adapter)
    tuned = _open_adapter(shell, adapter)
    placed = {
        key.removeprefix(_PREFIX)
        for key in peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    }
    unused = {k for k in keys - placed if not k.endswith(_EMBEDDINGS) and _SAMPLER not in k}
    if unused:
        raise InputError(
            f"adapter {adapter} does not fit the model: the model has no {min(unused)}; "
            "it must have been trained on this base model"
        )
    lacking = {key for key in placed - keys if ".lora_" in key}
    if lacking and next(model.parameters()).is_meta:  # told once, before the weights are read
        log.warning(
            "adapter %s lacks %s and %d more that its settings name: they stay as in the model",
            adapter, min(lacking), len(lacking) - 1,
        )  # fmt: skip
    layers = [module for module in tuned.modules() if isinstance(module, BaseTunerLayer)]
    if next(model.parameters()).is_meta:
        changed = int(_says_something(adapter))
    else:
        changed = sum(_merge_layer(layer, adapter) for layer in layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are merged already
            tuned.merge_and_unload()
    if not changed and not moved:
        if keeps_start(adapter):
            log.warning("adapter %s keeps what its training started from", adapter)
            return 0.0
        raise InputError(
            f"adapter {adapter} changes nothing: each of its {len(layers)} layers is as in the "
            "base model; leave it out, or give one that was trained"
        )
    return changed / max(1, len(layers))


def _open_adapter(model: Any, adapter: Path) -> Any:
    import peft

    config = peft.PeftConfig.from_pretrained(str(adapter))
    config.task_type = None  # the task's own class asks the model for what only one with head has
    if next(model.parameters()).is_meta:
        config.init_lora_weights = True  # other starts are worked out of the weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(model, str(adapter), config=config)
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"adapter {adapter} does not fit the model: {first_line(error)}; "
            "it must have been trained on this base model"
        ) from error


def _place_embeddings(model: Any, adapter: Path) -> bool:
    """Take over whole embeddings that an adapter's file holds; whether they are others."""
    own, moved = model.get_input_embeddings().weight, False
    with safetensors.safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if not key.endswith(_EMBEDDINGS):
                continue
            rows = file.get_slice(key).get_shape()[0]
            if rows != len(own):
                raise InputError(
                    f"adapter {adapter} holds embeddings of {rows} tokens, the model has "
                    f"{len(own)}: tokens were added in training. Merge it with PEFT, save the "
                    "result with the adapter's tokenizer, and give that folder as --model"
                )
            if not own.is_meta:
                theirs = file.get_tensor(key).to(own)
                moved |= not torch.equal(theirs, own)
                own.data.copy_(theirs)
            else:
                moved = True
    return moved


def keeps_start(adapter: Path) -> bool:
    """Whether an adapter's file says that no step of its training was better than the start."""
    with safetensors.safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
        return KEPT_START in (file.metadata() or {})


def _says_something(adapter: Path) -> bool:
    """Whether an adapter holds more than the zeros that LoRA begins with.

    Raises :class:`InputError` for numbers that are not finite.
    """
    settings = json.loads((adapter / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
    if settings.get("lora_alpha") == 0 and not settings.get("alpha_pattern"):
        return False
    with safetensors.safe_open(adapter / ADAPTER_WEIGHTS, "pt") as file:
        keys = set(file.keys())
        for key in sorted(keys):
            if not file.get_tensor(key).isfinite().all():
                raise InputError(
                    f"adapter {adapter} is damaged: {key} is not finite; train it anew"
                )
        starts = {key for key in keys if ".lora_" in key}
        ends = (key for key in keys if ".lora_B" in key or ".lora_embedding_B" in key)
        return bool(keys - starts) or any(bool(file.get_tensor(key).any()) for key in ends)


def _merge_layer(layer: Any, adapter: Path) -> bool:
    """Merge one layer; whether its weights changed."""
    before = [weight.clone() for weight in layer.get_base_layer().parameters()]
    try:
        layer.merge(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(
            f"adapter {adapter} cannot be merged into the weights: {first_line(error)}"
        ) from error
    after = layer.get_base_layer().parameters()
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))


def load_projections(
    folder: Path, projections: Sequence[tuple[str, str]], device: torch.device
) -> list[Projection]:
    """The Dense modules of a model, float32.

    Args:
        folder: of the model.
        projections: folders within it, each with the digest that it must have.
        device: where they are to run.

    Raises:
        InputError: a module that is not the described one.
    """
    found = []
    for path, digest in projections:
        settings = check_dense(folder / path, str(folder))
        if digest_module(folder / path) != digest:
            raise InputError(f"{folder / path} is not the one described: describe the encoder anew")
        weights = safetensors.torch.load_file(folder / path / "model.safetensors")
        activation = settings.get("activation_function", "torch.nn.Tanh").rpartition(".")[2]
        bias = weights.get("linear.bias")
        found.append(
            Projection(
                weights["linear.weight"].float().to(device),
                None if bias is None else bias.float().to(device),
                getattr(nn, activation)(),
            )
        )
    return found
