"""A base model with its adapter merged, loaded once, and the states of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from torch import Tensor, nn

from pipelines.errors import InputError


def load_base_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
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


def find_layers(model: Any) -> nn.ModuleList:
    """The stack of decoder layers inside a model, however deep it is wrapped."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} has no stack of {count} layers to read states from")


def cut_layers(model: nn.Module, layers: Sequence[int]) -> nn.ModuleList:
    """Drop the layers above the highest that is read, so that they are not run.

    Returns the stack that is left.
    """
    stack = find_layers(model)
    del stack[max(1, *layers) :]
    return stack


def read_states(
    model: nn.Module,
    stack: nn.ModuleList,
    layers: Sequence[int],
    count: int,
    input_ids: Tensor,
    mask: Tensor,
) -> Tensor:
    """States (n, t, d) after a layer, or the average of several, with gradients if enabled.

    Args:
        model: base model, wrapped by an adapter or not.
        stack: its layers, as :func:`find_layers` or :func:`cut_layers` gives them.
        layers: 0 for the token embeddings, i for the output of layer i, ``count`` for the last
            layer's with the final norm.
        count: layers of the model before any cut.
        input_ids: int64 (n, t).
        mask: bool (n, t), true for tokens, false for padding on either side.
    """
    inner = [layer for layer in layers if layer < count]
    inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
    if not mask[:, 0].all():  # padded on the left: a text's first token must still be its first
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with record_outputs(stack, inner) as recorded:
        output = model(**inputs, use_cache=False)
    states = [recorded[layer] for layer in inner]
    if count in layers:
        states.append(output.last_hidden_state)
    if len(states) == 1:
        return states[0]
    return torch.stack([state.float() for state in states]).mean(dim=0)


@contextmanager
def record_outputs(stack: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the states after some layers while a model runs; no others are kept."""
    recorded: dict[int, Tensor] = {}

    def record_input(_: nn.Module, arguments: tuple, keywords: dict) -> None:
        recorded[0] = arguments[0] if arguments else keywords["hidden_states"]

    def record_output(layer: int) -> Any:
        def record(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
            recorded[layer] = output if isinstance(output, Tensor) else output[0]

        return record

    handles = [
        stack[0].register_forward_pre_hook(record_input, with_kwargs=True)
        if layer == 0
        else stack[layer - 1].register_forward_hook(record_output(layer))
        for layer in layers
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
