"""Paths, local or remote, as pyarrow filesystems; output files appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.errors import InputError

EMBEDDINGS_FOLDER = "embeddings"
"""Where the output folder of an embedding job keeps its vectors, beside what it rejected."""


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of ``path`` (local, ``s3://``, ``gs://``, ``hf://``) and the path inside it.

    Raises :class:`InputError` for an address that cannot be opened.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    try:
        return pafs.FileSystem.from_uri(path)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot open {path!r}: {reason}. Check the address, the network and the credentials"
        ) from error


def join(folder: str, *parts: str) -> str:
    """``folder/part/part``, for local paths and URIs alike."""
    return "/".join([folder.rstrip("/"), *parts])


def find_files(path: str, suffixes: tuple[str, ...]) -> tuple[pafs.FileSystem, list[str]]:
    """Files at ``path`` (one file, a folder, or a glob) that end in one of ``suffixes``, sorted.

    Of an embedding job's output folder only ``embeddings/`` is looked at. Files and folders whose
    name starts with ``.`` or ``_`` are another program's working files
    and are passed over. Raises :class:`InputError` where nothing is found.
    """
    is_glob = any(mark in path for mark in "*?[")
    root = path
    if is_glob:
        parts = path.split("/")
        first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
        root = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    filesystem, inner = open_filesystem(root)
    info = filesystem.get_file_info(inner)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"no such file or folder: {path}")
    if info.type == pafs.FileType.File or inner.endswith(suffixes):
        return filesystem, [inner]
    results = filesystem.get_file_info(join(inner, EMBEDDINGS_FOLDER))
    if not is_glob and results.type == pafs.FileType.Directory:
        inner = results.path
    found = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    names = [f.path for f in found if f.path.endswith(suffixes) and not _is_hidden(f.path, inner)]
    if is_glob:
        pattern = join(inner, *parts[first:])
        names = [name for name in names if fnmatchcase(name, pattern)]
    names = _outermost(sorted(names))
    if not names:
        raise InputError(f"{path} holds no file that ends in {' or '.join(suffixes)}")
    return filesystem, names


def _is_hidden(path: str, root: str) -> bool:
    parts = PurePosixPath(path.removeprefix(root.rstrip("/") + "/")).parts
    return any(part.startswith((".", "_")) for part in parts)


def _outermost(names: list[str]) -> list[str]:
    """Drop what lies inside another match: the files within a Lance dataset's folder."""
    kept: list[str] = []
    for name in names:
        if not (kept and name.startswith(kept[-1] + "/")):
            kept.append(name)
    return kept


@contextmanager
def written_whole(path: str) -> Iterator[pa.NativeFile]:
    """A stream to a file at ``path`` that readers see only once it is finished."""
    filesystem, inner = open_filesystem(path)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(inner) as stream:
            yield stream
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with filesystem.open_output_stream(str(temporary)) as stream:
            yield stream
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(path: str, table: pa.Table) -> None:
    """Write a table as one Parquet file, whole or not at all."""
    with written_whole(path) as stream:
        pq.write_table(table, stream)


def write_text(path: str, text: str) -> None:
    """Write a small text file as UTF-8, whole or not at all."""
    with written_whole(path) as stream:
        stream.write(text.encode())


def delete_others(folder: str, keep: set[str]) -> None:
    """Delete files of ``folder`` that are not in ``keep``: what an earlier run left."""
    filesystem, inner = open_filesystem(folder)
    selector = pafs.FileSelector(inner, allow_not_found=True)
    for info in filesystem.get_file_info(selector):
        if info.type == pafs.FileType.File and info.base_name not in keep:
            filesystem.delete_file(info.path)
