"""A LoRA adapter on a base model: put on, taken up from a folder, saved.

Only the adapter's weights are trained; they are float32 whatever the base model is.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from pipelines.encoder.base_model import (
    KEPT_START,
    adapter_keys,
    with_attention,
)
from pipelines.encoder.checkpoint import quiet_loading, without_adapter
from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.padded import runs_layers_again
from pipelines.runtime.errors import InputError
from pipelines.training.config import LoraSettings, Quantize


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
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model in ``folder`` without its LM head, frozen, its linear layers quantized.

    Args:
        folder: of a base model.
        quantize: ``8bit`` (LLM.int8) or ``4bit`` (NF4 with quantized scales).
        dtype: of everything else, and of the products.
        device: where it is to run.
        attention: ``causal`` or ``bidirectional``; None as the model's files say.
        trust_remote_code: run Python code that comes with the model.
    """
    options: dict[str, Any] = {}
    if attention is not None:
        options["config"] = with_attention(folder, attention, trust_remote_code)
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
    with quiet_loading(), without_adapter(folder) as plain:
        model = transformers.AutoModel.from_pretrained(
            plain,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            quantization_config=settings,
            device_map={"": device},
            **options,
        )
    return model.eval().requires_grad_(False)


WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
_PREFIX = "base_model.model."


def add_adapter(base: nn.Module, settings: LoraSettings, start: Path | None) -> Any:
    """``base`` with a trainable adapter on all the layers it has (left).

    A new adapter begins without effect, its random half drawn from the seed. One taken up from
    the folder ``start`` goes on from its weights; its shape must be the one asked for.

    Raises :class:`InputError` for target names that the model does not have, for a ``start`` of
    another shape or another base model, and for a model that runs one layer many times.
    """
    if runs_layers_again(base):
        raise InputError(
            f"{type(base).__name__} runs one layer many times, so no adapter is trained on it: "
            "take another --model"
        )
    wanted: str | list[str] = list(settings.lora_targets)
    if settings.lora_targets == ("all-linear",):
        wanted = "all-linear"
    config = peft.LoraConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=wanted,
    )
    torch.manual_seed(settings.seed)
    try:
        model = peft.get_peft_model(base, config)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if is_linear(m)})
        raise InputError(
            f"lora_targets {list(settings.lora_targets)} name no linear layer of this model; "
            f"its are {', '.join(linear)}, or all-linear for all of them"
        ) from error
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast turns the small weights instead
    if start is not None:
        load_adapter(model, start)
    return model.eval()


# Settings that change no vector, or whose weights would not fit.
_HARMLESS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "task_type", "peft_type", "peft_version",
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "megatron_config",
    "megatron_core", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def require_plain(lora: Mapping[str, Any], adapter: str) -> None:
    """Raise :class:`InputError` for LoRA settings that would act otherwise in training here.

    An adapter is trained as a fresh one of its rank and alpha is: with another scaling, or another
    base than the model's weights, its weights would make other vectors.

    Args:
        lora: the content of its ``adapter_config.json``.
        adapter: its name, for the error.
    """
    usual = {**peft.LoraConfig().to_dict(), "init_lora_weights": True}
    for name, value in sorted(lora.items()):
        if name in _HARMLESS or name not in usual or (not value and not usual[name]):
            continue
        plain = _PLAIN_STARTS if name == "init_lora_weights" else (usual[name],)
        if value not in plain:
            raise InputError(
                f"adapter {adapter} has {name} {json.dumps(value)}, with which no training goes on "
                f"here: {json.dumps(usual[name])} is required. Begin anew with --adapter none, or "
                "merge it with PEFT and give that folder as --model"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can be put on a module."""
    return isinstance(module, nn.Linear)


def load_adapter(model: Any, folder: Path) -> None:
    """Take up the weights of the adapter in ``folder``; :class:`InputError` if they do not fit."""
    mine = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    theirs = adapter_keys(folder)
    if theirs != set(mine):
        odd = min(theirs ^ set(mine))
        raise InputError(
            f"adapter {folder} does not fit: {odd} is {'not ' if odd not in theirs else ''}in it "
            f"and {'not ' if odd not in mine else ''}wanted here; it must be of this base model "
            "and have the same --lora-targets and --layer"
        )
    load_weights(model, safetensors.torch.load_file(folder / WEIGHTS))


def load_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Set the adapter's weights; :class:`InputError` where a shape differs."""
    for name, weight in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if weights[name].shape != weight.shape:
            raise InputError(
                f"adapter weight {name} has shape {tuple(weights[name].shape)}, this model and "
                f"--lora-rank want {tuple(weight.shape)}: it is of another base model or rank"
            )
    peft.set_peft_model_state_dict(model, dict(weights))


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU, under the names PEFT saves them by."""
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.detach().cpu().clone() for name, weight in state.items()}


def adapter_files(
    settings: LoraSettings,
    description: EncoderDescription,
    weights: Mapping[str, Tensor],
    *,
    all_layers: bool,
    kept_start: bool = False,
) -> dict[str, bytes]:
    """The files of a PEFT adapter folder by name: its settings and its weights.

    Where only the lower layers of the model have an adapter, not ``all_layers``, the settings
    name each adapted layer in full. ``kept_start`` says in the file that no step was better than
    the start: then it changes nothing, and is meant to.
    """
    adapted = {name.split(".lora_")[0].removeprefix(_PREFIX) for name in weights}
    config = peft.LoraConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=description.model,
        inference_mode=True,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=sorted({n.rsplit(".", 1)[-1] for n in adapted} if all_layers else adapted),
    )
    metadata = {"format": "pt"} | ({KEPT_START: "true"} if kept_start else {})
    content = {key: _plain(value) for key, value in sorted(config.to_dict().items())}
    return {
        SETTINGS: (json.dumps(content, indent=2) + "\n").encode(),
        WEIGHTS: safetensors.torch.save(dict(weights), metadata=metadata),
    }


def enable_checkpointing(model: Any, stack: nn.ModuleList) -> None:
    """Drop activations inside layers and make them again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in stack:
        layer.training = True  # checkpointing asks for it; what is inside stays in evaluation mode


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
