"""Python code that comes with a model: run where it is trusted, refused where it would be missed.

A folder's ``auto_map`` names its own classes. Without them transformers runs its own of that kind,
which may be another model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from pipelines.encoder.description import EncoderConfig, EncoderDescription
from pipelines.encoder.sources import load_settings
from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)


def check_code(folder: Path, config: EncoderConfig, trained: EncoderDescription | None) -> None:
    """Refuse a folder that names classes of its own, where its code is not to be run.

    One of a stock class's name may attend otherwise, as gte-Qwen2's does: transformers' own is run
    only where ``--attention``, or what an adapter was trained with, says how.
    """
    named = _own_classes(folder / "config.json")
    elsewhere = [name for name in named.values() if "--" in name]
    if config.trust_remote_code and elsewhere:
        raise InputError(
            f"{config.model} takes its code from another repository ({elsewhere[0]}), so its files "
            "do not tell which code runs: copy that code into the model's folder"
        )
    if config.trust_remote_code:
        return
    _check_own_tokenizer(folder, config)
    for kind, name in named.items():
        if kind != "AutoConfig" and not kind.startswith("AutoModel"):
            continue
        wanted, stock = name.rpartition(".")[2], _stock_class(kind, load_settings(folder))
        if wanted != stock:
            raise InputError(
                f"{config.model} names a class of its own, {wanted}, where transformers would run "
                f"{stock}: pass --trust-remote-code if you trust whoever wrote it"
            )
        if config.attention == "auto" and trained is None:
            raise InputError(
                f"{config.model} names code of its own for {wanted}, which may not be what "
                "transformers has under that name: pass --trust-remote-code if you trust whoever "
                "wrote it, or --attention causal or bidirectional, as that code attends, to run "
                "transformers' own"
            )


def _check_own_tokenizer(folder: Path, config: EncoderConfig) -> None:
    """Tell, or refuse, that a folder's tokenizer is a class of its own, whose code is not run."""
    for file in ("tokenizer_config.json", "config.json"):
        name = _own_classes(folder / file).get("AutoTokenizer")
        if name is None:
            continue
        if not (folder / "tokenizer.json").is_file():
            raise InputError(
                f"{config.model} names a tokenizer of its own, {name}, and has no tokenizer.json: "
                "pass --trust-remote-code if you trust whoever wrote it"
            )
        log.warning(
            "%s names a tokenizer of its own, %s: texts are read by the rules of its "
            "tokenizer.json, its code is not run", config.model, name,
        )  # fmt: skip
        return


def _own_classes(path: Path) -> dict[str, str]:
    """Classes in a model's own code, by transformers' names of their kinds."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = content.get("auto_map") or {}
    named = {"AutoTokenizer": named} if isinstance(named, list) else named  # as it was at first
    flat = {k: [n for n in (v if isinstance(v, list) else [v]) if n] for k, v in named.items()}
    return {kind: str(names[-1]) for kind, names in flat.items() if names}


def _stock_class(kind: str, settings: Any) -> str:
    """The class that transformers has for a configuration."""
    import transformers  # slow, and a folder without code does not need it

    if kind == "AutoConfig":
        return type(settings).__name__
    for auto in (kind, "AutoModel"):
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        found = mapping.get(type(settings), None)
        if found is not None:
            return str((found[0] if isinstance(found, tuple) else found).__name__)
    return "none"


def digest_code(folder: Path) -> str | None:
    """SHA-256 of the Python files that come with a model; None where there are none."""
    files = sorted(folder.rglob("*.py"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
