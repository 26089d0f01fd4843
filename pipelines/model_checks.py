"""Whether a folder holds a model that can be loaded, before anything loads it.

Files of others: every one is checked to be what its name says, and to lie within the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import InputError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_model_folder(folder: Path, name: str) -> None:
    """Refuse a folder from which a model cannot be loaded, saying what is missing."""
    if not (folder / "config.json").is_file():
        raise InputError(f"model {name!r} has no config.json (found: {list_names(folder)})")
    _read_object(folder / "config.json", name)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise InputError(f"model {name!r} has no tokenizer (found: {list_names(folder)})")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _shards_of(_read_object(index, name), name)
    else:
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        raise InputError(
            f"model {name!r} has no *.safetensors weights (found: {list_names(folder)}); other "
            "weight formats can run code when loaded and are not read: convert it with "
            "save_pretrained"
        )
    for shard in shards:
        if Path(shard).name != shard:
            raise InputError(
                f"model {name!r} has an index that names {shard!r}, a file outside its folder"
            )
        if not (folder / shard).is_file():
            raise InputError(
                f"model {name!r} lacks {shard}, which its index names: download it again"
            )
        check_safetensors(folder / shard)


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file that is shorter than its own header says (half downloaded)."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > size:
                raise ValueError("header cut off")
            header = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file: download it again") from error
    required = 8 + header_bytes + max(ends, default=0)
    if size < required:
        raise InputError(
            f"{path} is incomplete: {size} of {required} bytes are there: download it again"
        )


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"model {name!r}: {path.name} is not JSON ({first_sentence(error)}): fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"model {name!r}: {path.name} holds no settings: fetch it again")
    return content


def _shards_of(index: Mapping[str, Any], name: str) -> list[str]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise InputError(f"model {name!r}: its index names no weights: fetch it again")
    return sorted(set(shards.values()))


def list_names(folder: Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"


def first_sentence(error: BaseException) -> str:
    """An error's first line, for a message."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
