"""A base model with its adapter merged into the weights, ready to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.int8 import quantize_linears
from pipelines.encoder.padded import find_layers
from pipelines.runtime.errors import InputError


def load_base_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model in ``folder`` without its LM head, ready to run, ``adapter`` merged into it.

    Raises :class:`InputError` where the adapter was trained on another model.
    """
    with_head = adapter is not None and adapter_includes_head(adapter)
    kind = transformers.AutoModelForCausalLM if with_head else transformers.AutoModel
    with quiet_loading():
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise InputError(
            f"the weights in {folder} lack {min(report['missing_keys'])}, which its config.json "
            "calls for: they would be random; fetch the model again"
        )
    if adapter is not None:
        model = merge_adapter(model, adapter)
    if with_head:
        model = model.base_model
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from drawing progress bars and listing weights it does not need."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def adapter_includes_head(adapter: Path) -> bool:
    """Whether an adapter was trained on the model with its LM head (its keys lie one deeper)."""
    return any(key.startswith("base_model.model.model.") for key in adapter_keys(adapter))


def adapter_keys(adapter: Path) -> set[str]:
    """Names of an adapter's weights."""
    with safetensors.safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def merge_adapter(model: nn.Module, adapter: Path) -> Any:
    """``model`` with a PEFT adapter's change added to its weights."""
    import peft  # slow, and without an adapter not needed

    try:
        tuned = peft.PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"adapter {adapter} does not fit the model: {str(error).splitlines()[0]}; "
            "it must have been trained on this base model"
        ) from error
    unused = adapter_keys(adapter) - set(peft.get_peft_model_state_dict(tuned))
    if unused:
        raise InputError(
            f"adapter {adapter} does not fit the model: the model has no {min(unused)}; "
            "it must have been trained on this base model"
        )
    return tuned.merge_and_unload()


def load_described_model(description: EncoderDescription, device: torch.device) -> Any:
    """An encoder's base model with all its layers, adapter merged, in the encoder's precision.

    Raises :class:`InputError` where model or adapter are not the described ones.
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
