"""Paths, local or remote, as pyarrow filesystems; small files written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pyarrow.fs as pafs

from pipelines.errors import InputError


def shoal_home() -> Path:
    """Folder of models, demo data and default outputs: ``$SHOAL_HOME`` or ``~/.cache/shoal``."""
    return Path(os.environ.get("SHOAL_HOME") or "~/.cache/shoal").expanduser().absolute()


def default_output(job: str) -> str:
    """Where a job writes when no ``--output`` is given."""
    return str(shoal_home() / "outputs" / job)


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that holds ``path``, and the path inside it.

    Local paths may be relative and may start with ``~``. ``s3://`` and ``gs://`` are pyarrow's
    own, ``hf://`` and whatever else fsspec knows come through fsspec. Credentials come from each
    service's usual chain (environment, configuration files, instance role).
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        return pafs.FileSystem.from_uri(path)
    except (OSError, ValueError, ImportError) as error:
        scheme = path.split("://", 1)[0]
        raise InputError(
            f"cannot open {path!r}: {_first_line(error)}. Check the {scheme}:// address, "
            "the network and the credentials"
        ) from error


def join(folder: str, *parts: str) -> str:
    """``folder/part/part``, for local paths and URIs alike."""
    return "/".join([folder.rstrip("/"), *parts])


def exists(path: str) -> bool:
    """Whether a file or folder is at ``path``."""
    filesystem, inner = open_filesystem(path)
    return filesystem.get_file_info(inner).type != pafs.FileType.NotFound


def list_files(folder: str) -> list[str]:
    """Every file below ``folder`` as a path relative to it, sorted; empty where there is none."""
    filesystem, inner = open_filesystem(folder)
    selector = pafs.FileSelector(inner, recursive=True, allow_not_found=True)
    prefix = inner.rstrip("/") + "/"
    return sorted(
        info.path.removeprefix(prefix)
        for info in filesystem.get_file_info(selector)
        if info.type == pafs.FileType.File
    )


def read_bytes(path: str) -> bytes:
    """The whole of a small file; ``FileNotFoundError`` where there is none."""
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_stream(inner) as stream:
        return stream.read()


def write_bytes(path: str, data: bytes) -> None:
    """Write a small file so that readers see the old content or the new, never a part."""
    filesystem, inner = open_filesystem(path)
    if isinstance(filesystem, pafs.LocalFileSystem):
        target = Path(inner)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        temporary.write_bytes(data)
        temporary.replace(target)
        return
    with filesystem.open_output_stream(inner) as stream:
        stream.write(data)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
