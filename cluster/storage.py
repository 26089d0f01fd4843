"""Paths, local or remote, as pyarrow filesystems; output files appear whole or not at all."""

from __future__ import annotations

import functools
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError

EMBEDDINGS_FOLDER = "embeddings"
"""Where the output folder of an embedding job keeps its vectors, beside what it rejected."""
_FOLDER_SUFFIXES = (".lance",)
_OPTIONS = re.compile(r"\?\w+=[^&]*(&\w+=[^&]*)*$")


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of ``path`` (local, ``s3://``, ``gs://``, ``hf://``) and the path inside it.

    An address may end in options, such as ``?endpoint_override=host:port&scheme=http``.
    Raises :class:`InputError` for an address that cannot be opened.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
    try:
        if scheme in ("s3", "gs", "gcs"):
            # Only the bucket goes through the parser of URIs: a key may hold spaces and '%'.
            inner, options = _split_options(rest)
            return _open_bucket(f"{scheme}://{inner.split('/')[0]}{options}"), inner
        return pafs.FileSystem.from_uri(path)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot open {path!r}: {reason}. Check the address, the network and the credentials"
        ) from error


def join(folder: str, *parts: str) -> str:
    """``folder/part/part``, for local paths and URIs alike."""
    base, options = _split_options(folder) if "://" in folder else (folder, "")
    return "/".join([base.rstrip("/"), *parts]) + options


def with_inner_path(address: str, inner: str) -> str:
    """The address of ``inner`` on the filesystem that holds ``address``."""
    scheme, separator, rest = address.partition("://")
    return f"{scheme}://{inner}{_split_options(rest)[1]}" if separator else inner


@functools.lru_cache(maxsize=64)
def _open_bucket(uri: str) -> pafs.FileSystem:
    """A client for one bucket; it costs a request to find the bucket's region."""
    return pafs.FileSystem.from_uri(uri)[0]


def _split_options(address: str) -> tuple[str, str]:
    """An address without its options, and the options with their ``?``."""
    found = _OPTIONS.search(address)
    return (address[: found.start()], found.group()) if found else (address, "")


def find_files(path: str, suffixes: tuple[str, ...]) -> tuple[pafs.FileSystem, list[str]]:
    """Files at ``path`` (one file, a folder, or a glob) that end in one of ``suffixes``, sorted.

    Of an embedding job's output folder only ``embeddings/`` is looked at. Files and folders whose
    name starts with ``.`` or ``_`` are another program's working files
    and are passed over. Raises :class:`InputError` where nothing is found.
    """
    root, pattern = path, ""
    filesystem, inner = open_filesystem(root)
    info = filesystem.get_file_info(inner)
    cuts = _split_globs(path) if info.type == pafs.FileType.NotFound else ()
    for root, pattern in cuts:  # noqa: B007 - the last cut is used below
        filesystem, inner = open_filesystem(root)
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.Directory:
            break
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"no such file or folder: {path}")
    inner = info.path.rstrip("/")
    if info.type == pafs.FileType.File or inner.endswith(_FOLDER_SUFFIXES):
        return filesystem, [inner]
    results = filesystem.get_file_info(join(inner, EMBEDDINGS_FOLDER))
    if not pattern and results.type == pafs.FileType.Directory:
        inner = results.path
    found = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    names = [f.path for f in found if _is_match(f, suffixes) and not _is_hidden(f.path, inner)]
    if pattern:
        names = [name for name in names if fnmatchcase(name, join(_quoted(inner), pattern))]
    names = _outermost(sorted(names))
    if not names:
        raise InputError(f"{path} holds no file that ends in {' or '.join(suffixes)}")
    return filesystem, names


def _split_globs(path: str) -> Iterator[tuple[str, str]]:
    """Where a glob may be cut into a folder and a pattern below it, the longest folder first.

    Which cut is right only the filesystem can tell: a folder's name may hold ``[`` or ``*``.
    """
    base, options = _split_options(path) if "://" in path else (path, "")
    parts = base.split("/")
    for place in reversed(range(len(parts))):
        if any(mark in parts[place] for mark in "*?["):
            root = "/".join(parts[:place]) or ("/" if base.startswith("/") else ".")
            yield root + options, "/".join(parts[place:])


def _quoted(text: str) -> str:
    """A pattern that matches exactly ``text``."""
    return re.sub(r"([*?[])", r"[\1]", text)


def _is_match(info: pafs.FileInfo, suffixes: tuple[str, ...]) -> bool:
    is_folder = info.type == pafs.FileType.Directory
    return info.path.endswith(_FOLDER_SUFFIXES if is_folder else suffixes)


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
    """A stream to a file at ``path`` that readers see only once it is finished.

    A remote file is held in memory until then: leaving pyarrow's own remote stream on an exception
    would complete the upload of half a file.
    """
    filesystem, inner = open_filesystem(path)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        sink = pa.BufferOutputStream()
        yield sink
        with filesystem.open_output_stream(inner) as stream:
            stream.write(sink.getvalue())
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
    """Delete Parquet files of ``folder`` that are not in ``keep``: what an earlier run left."""
    filesystem, inner = open_filesystem(folder)
    selector = pafs.FileSelector(inner, allow_not_found=True)
    for info in filesystem.get_file_info(selector):
        stale = info.base_name.endswith(".parquet") and info.base_name not in keep
        if info.type == pafs.FileType.File and stale:
            filesystem.delete_file(info.path)
