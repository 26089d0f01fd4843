"""A model's weights, held against its configuration: none random, none left out."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from pipelines.encoder.adapters import FILE_NAME as ADAPTER_SETTINGS
from pipelines.encoder.padded import find_layers
from pipelines.encoder.quantized import SCALES
from pipelines.runtime.errors import InputError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# How torch names the first weight that does not go into its place.
_SHAPES = re.compile(r"size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)")
_NO_WEIGHTS = (
    "inv_freq", "masked_bias", "attn.bias", "attention.bias", "causal_mask", "position_ids",
    "cos_cached", "sin_cached", "_scale",
)  # fmt: skip
"""How names of tables end that older versions of models stored, and of scales of activations."""
_LATER_LAYERS = (
    "num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_layers",
    "mtp_num_hidden_layers", "nextn_predict_layers",
)  # fmt: skip
"""Settings that tell of layers after the last, which predict tokens after the next."""


def load_checked(
    kind: Any, plain: Path, folder: Path, options: Mapping[str, Any], trust_remote_code: bool
) -> tuple[Any, set[str], set[str]]:
    """A model, and the names of weights that its files lack and that nothing reads.

    Args:
        kind: one of transformers' automatic classes.
        plain: the folder, or a view of it.
        folder: what errors are to name.
        options: of ``from_pretrained``.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: it cannot be loaded, or has weights of other shapes.
    """
    try:
        model, report = kind.from_pretrained(
            plain,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them
            **options,
        )
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise InputError(
            f"the model in {folder} cannot be loaded here: {first_line(error)}"
        ) from error
    for name, stored, wanted in sorted(report["mismatched_keys"])[:1]:
        raise InputError(
            f"the weights in {folder} have {name} of shape {tuple(stored)}, its config.json calls "
            f"for {tuple(wanted)}: fetch the model again"
        )
    unread = [key for key in report["unexpected_keys"] if key.endswith(SCALES)]
    if unread:
        raise InputError(
            f"the weights in {folder} hold {min(unread)}, which nothing reads: they are quantised, "
            "and its config.json does not say so; give the model that it was made from"
        )
    # what makes one vector of a whole text there is not run here
    missing = {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    return model, missing, set(report["unexpected_keys"])


def refuse_unread(model: Any, names: Iterable[str], folder: Path) -> None:
    """Refuse weights that stand inside what is run, and that nothing reads.

    A bias, a norm, an adapter or layers that ``config.json`` does not speak of would be left out
    without a word. Heads, other towers and layers that predict later tokens decide no state.
    """
    parts = dict(model.named_modules())
    stack = find_layers(model)
    within = next(f"{name}." for name, module in parts.items() if module is stack)
    settings = model.config.get_text_config()
    later = any(getattr(settings, name, None) for name in _LATER_LAYERS)
    for key in sorted(names):
        name = key.removeprefix(f"{model.base_model_prefix}.")
        place = name.removeprefix(within).partition(".")[0]
        in_stack = name.startswith(within) and place.isdigit()
        beyond = in_stack and int(place) >= len(stack)
        above = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        in_part = any(next(parts[path].parameters(recurse=False), None) is not None
                      for path in above if path in parts)  # fmt: skip
        if name.endswith(_NO_WEIGHTS) or (beyond and later) or not (in_stack or in_part):
            continue
        way = (
            "they are an adapter's, not merged: merge it with PEFT's merge_and_unload"
            if ".lora_" in name
            else f"{f'it has {len(stack)} layers' if beyond else 'they would be left out'}; mend "
            "config.json, or fetch the model again"
        )
        raise InputError(
            f"the weights in {folder} hold {name}, which its config.json does not call for: {way}"
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from drawing progress bars and listing weights it does not need."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """``folder``, or a view of it without the adapter that lies beside the weights.

    transformers would add such an adapter to weights into which it may be merged already.
    """
    if not (folder / ADAPTER_SETTINGS).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as view:
        for path in folder.iterdir():
            if path.name not in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS):
                (Path(view) / path.name).symlink_to(path.absolute())
        yield Path(view)


def first_line(error: BaseException) -> str:
    """What an error of torch or transformers says, in one line."""
    shapes = _SHAPES.search(str(error))
    if shapes is not None:
        return f"{shapes[1]} has shape {shapes[2]}, the model wants {shapes[3]}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2])[:200]
