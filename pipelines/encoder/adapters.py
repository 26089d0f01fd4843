"""What an adapter's own settings may ask for: they may come from anyone.

PEFT imports a module that ``megatron_core`` names and matches patterns of ``adapter_config.json``
against every layer's name; neither may be left to whoever wrote the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.runtime.errors import InputError

FILE_NAME = "adapter_config.json"


LONGEST_PATTERN = 2_000
_UNMERGEABLE = {
    "lora_bias": "a change of biases that the layers may not have",
    "alora_invocation_tokens": "one that acts only after its invocation tokens",
    "layer_replication": "a model with other layers",
    "use_qalora": "one for a quantised model",
    "arrow_config": "a choice between adapters for each token",
}

# By a random projection, and by covariances of texts that are not there any more.
_STARTS_ANEW = ("pissa_niter_", "corda")


_LITERALS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def check_adapter_settings(folder: Path, name: str) -> None:
    """Refuse an adapter that is not LoRA, or whose settings could run or stall this process.

    Raises :class:`InputError` that says which setting and what would do.
    """
    try:
        settings = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"adapter {name!r}: {FILE_NAME} is not JSON; fetch it again") from error
    if not isinstance(settings, Mapping):
        raise InputError(f"adapter {name!r}: {FILE_NAME} holds no settings; fetch it again")
    if settings.get("peft_type") != "LORA":
        raise InputError(
            f"adapter {name!r} has peft_type {settings.get('peft_type')!r}; LORA is required: only "
            "LoRA adapters are merged into the weights"
        )
    if settings.get("megatron_config"):
        raise InputError(
            f"adapter {name!r} names a Python module to import (megatron_config in {FILE_NAME}), "
            "which is not done: save the adapter with PEFT from a transformers model"
        )
    for key, kind in _UNMERGEABLE.items():
        if settings.get(key):
            raise InputError(
                f"adapter {name!r} cannot be merged into the weights: {key} in {FILE_NAME} makes "
                f"it {kind}; train it without"
            )
    start = str(settings.get("init_lora_weights"))
    if start.startswith(_STARTS_ANEW):
        raise InputError(
            f"adapter {name!r} began from a part of the base model that is worked out anew, and "
            f"otherwise, at each load (init_lora_weights {start!r} in {FILE_NAME}): save it with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    for pattern in _patterns(settings):
        if len(pattern) > LONGEST_PATTERN or repeats_a_repeat(pattern):
            raise InputError(
                f"adapter {name!r} has a pattern in {FILE_NAME} that may take for ever to match "
                f"({pattern[:60]!r}): list the names of its layers instead"
            )


def foreign_class(folder: Path) -> str | None:
    """The class that an adapter was trained on, where it is not one of transformers."""
    mapping = json.loads((folder / FILE_NAME).read_text(encoding="utf-8")).get("auto_mapping")
    library = str((mapping or {}).get("parent_library") or "transformers")
    if library.split(".")[0] == "transformers":
        return None
    return f"{mapping.get('base_model_class')} of {library}"


def added_tokens(folder: Path) -> set[str]:
    """Tokens that were added to the tokenizer in a folder; none where it holds no tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return set()
    content = json.loads(path.read_text(encoding="utf-8"))
    return {token["content"] for token in content.get("added_tokens", ())}


def repeats_a_repeat(pattern: str) -> bool:
    """Whether a group that repeats inside is repeated, as in ``(a+)+``: matching takes for ever."""
    inside = [False]
    shape = _LITERALS.sub("x", pattern)
    for place, character in enumerate(shape):
        repeated = shape[place + 1 : place + 2] in ("+", "*", "{")
        if character == "(":
            inside.append(False)
        elif character == ")" and len(inside) > 1:
            repeats = inside.pop()
            if repeats and repeated:
                return True
            inside[-1] |= repeats or repeated
        elif repeated:
            inside[-1] = True
    return False


def _patterns(settings: Mapping[str, Any]) -> Iterable[str]:
    """Everything that PEFT takes as a regular expression."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = settings.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, str))
    for key in ("rank_pattern", "alpha_pattern"):
        value = settings.get(key)
        if isinstance(value, Mapping):
            yield from value
