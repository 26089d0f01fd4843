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
    for pattern in _patterns(settings):
        if len(pattern) > LONGEST_PATTERN or repeats_a_repeat(pattern):
            raise InputError(
                f"adapter {name!r} has a pattern in {FILE_NAME} that may take for ever to match "
                f"({pattern[:60]!r}): list the names of its layers instead"
            )


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
