"""What a path names: a file, the files of a folder, or all that a glob matches."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipelines.runtime.errors import InputError, StorageError
from pipelines.runtime.files import (
    exists,
    first_line,
    in_threads,
    join,
    open_filesystem,
    with_retries,
)

_WILDCARDS = re.compile(r"[*?\[]")


def match_files(path: str, *, datasets: tuple[str, ...] = ()) -> list[pafs.FileInfo]:
    """The files at ``path``, which is a file, a folder or a glob, sorted by path.

    A glob is the shell's: ``*``, ``?`` and ``[..]`` stay within a name, ``**/`` is any number of
    folders, none among them. A folder is searched with all below it, also one that a glob matches.
    What exists under a name is meant by it, though the name may also be read as a glob. Names that
    begin with ``.`` or ``_`` are passed over unless they are spelled out. A folder whose name ends
    in one of ``datasets``, and the folder of a Delta, Iceberg or Hudi table, is not searched but
    given itself.

    Raises :class:`InputError` where nothing is at ``path``; a glob may match nothing.
    """
    filesystem, inner = open_filesystem(path)
    inner = inner.rstrip("/") or inner

    def match() -> list[pafs.FileInfo]:
        info = filesystem.get_file_info(inner)
        if info.type != pafs.FileType.NotFound:
            return _search(filesystem, info, [], datasets)
        if not _WILDCARDS.search(inner):
            raise InputError(f"no such file or folder: {path}")
        return _expand(filesystem, inner, datasets)

    try:
        matches = with_retries(match, path)
    except StorageError:
        raise
    except OSError as error:
        raise InputError(f"cannot list {path}: {first_line(error)}") from error
    return sorted({info.path: info for info in matches}.values(), key=lambda info: info.path)


def root_of(path: str) -> str:
    """The folder, a slash behind it, below which :func:`match_files` looks for what a path names.

    Of a glob it is that before its marks.
    """
    inner = open_filesystem(path)[1].rstrip("/") + "/"
    if not exists(path):
        inner = _WILDCARDS.split(inner)[0]
    return inner.rpartition("/")[0] + "/"


def _expand(
    filesystem: pafs.FileSystem, pattern: str, datasets: tuple[str, ...]
) -> list[pafs.FileInfo]:
    """What a glob matches, a name of it at a time, so that only what may match is listed."""
    parts = pattern.split("/")
    first = next(place for place, part in enumerate(parts) if _WILDCARDS.search(part))
    root = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")
    infos = [filesystem.get_file_info(root)]
    parts = parts[first:]
    while parts and parts[0] != "**":
        part = parts.pop(0)
        folders = [info for info in infos if info.type == pafs.FileType.Directory]
        if _WILDCARDS.search(part):
            list_one = functools.partial(_entries, filesystem, part)
            infos = [info for entries in in_threads(list_one, folders) for info in entries]
        elif folders:
            infos = filesystem.get_file_info([f"{info.path}/{part}" for info in folders])
    search = functools.partial(_search, filesystem, parts=parts, datasets=datasets)
    return [info for matches in in_threads(search, infos) for info in matches]


def _entries(filesystem: pafs.FileSystem, part: str, folder: pafs.FileInfo) -> list[pafs.FileInfo]:
    """The entries of a folder that one name of a glob matches."""
    entries = filesystem.get_file_info(pafs.FileSelector(folder.path))
    literal = [info for info in entries if info.base_name == part]
    return literal or [info for info in entries if _fits([info.base_name], [part])]


def _search(
    filesystem: pafs.FileSystem,
    place: pafs.FileInfo,
    parts: Sequence[str],
    datasets: tuple[str, ...],
) -> list[pafs.FileInfo]:
    """The files at and below ``place`` whose names from there on fit the parts of a glob."""
    if place.type != pafs.FileType.Directory:
        return [place] if place.type == pafs.FileType.File and not parts else []
    if not parts and place.path.endswith(datasets):
        return [place]
    prefix = place.path.rstrip("/") + "/"
    entries = filesystem.get_file_info(pafs.FileSelector(place.path, recursive=True))
    below = [info.path.removeprefix(prefix).split("/") for info in entries]
    tables = {tuple(names[:depth]) for names in below for depth in _table_depths(names)}
    if () in tables and not parts:
        return [place]
    matches = {}
    for info, names in zip(entries, below, strict=True):
        if info.type != pafs.FileType.File:
            continue
        within = [
            depth
            for depth, name in enumerate(names[:-1], 1)
            if name.endswith(datasets) or tuple(names[:depth]) in tables
        ]
        folder = names[: within[0]] if within else []
        # a glob that names a table's files and not its folder is to be refused, not to miss them
        if within and (_fits(folder, parts) or names[within[0]] == "metadata"):
            names = folder
            info = pafs.FileInfo(prefix + "/".join(names), pafs.FileType.Directory)
        if _fits(names, parts):
            matches[info.path] = info
    return list(matches.values())


def _table_depths(names: Sequence[str]) -> list[int]:
    """How deep the folders of Delta, Hudi and Iceberg tables are in a path below some folder."""
    marks = [depth for depth, name in enumerate(names) if name in ("_delta_log", ".hoodie")]
    is_iceberg = names[-1].endswith(".metadata.json") and names[-2:-1] == ["metadata"]
    return [*marks, len(names) - 2] if is_iceberg else marks


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a glob match a path, or a folder of it and nothing hidden below."""
    if not parts:
        return not any(name.startswith((".", "_")) for name in names)
    if parts[0] == "**":
        deeper = bool(names) and not names[0].startswith((".", "_")) and _fits(names[1:], parts)
        return deeper or _fits(names, parts[1:])
    return bool(names) and _fits_name(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _fits_name(name: str, part: str) -> bool:
    part, literal = part.replace("[^", "[!"), part
    shown = not name.startswith((".", "_")) or part.startswith(name[0])
    return name == literal or (shown and fnmatch.fnmatchcase(name, part))


EMBEDDINGS_FOLDER = "embeddings"
"""Where the output folder of an embedding job keeps its vectors, beside what it rejected."""
_READ = ("corpus", "embeddings", "pairs", "against")
_WRITTEN = ("output", "store")


def refuse_own_output(settings: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` where what a job writes would be among the files that it reads.

    The next run would take its own output for documents. Links are followed.
    """
    for read in _READ:
        for written in _WRITTEN:
            source, target = settings.get(read), settings.get(written)
            if isinstance(source, str) and source and target and _holds(source, target):
                raise InputError(
                    f"--{written} {target} lies within --{read} {source}, so that what is written "
                    "there would be read as a part of it: give it a folder elsewhere"
                )


def _holds(source: str, target: str) -> bool:
    """Whether files written below ``target`` may be among those that ``source`` names."""
    if exists(join(source, EMBEDDINGS_FOLDER)):
        source = join(source, EMBEDDINGS_FOLDER)
    pattern = open_filesystem(source)[1].rstrip("/").split("/")
    wild = (
        [] if exists(source) else [n for n, part in enumerate(pattern) if _WILDCARDS.search(part)]
    )
    first = wild[0] if wild else len(pattern)
    if source.partition("://")[1] != target.partition("://")[1]:
        return False
    root = _real(source, "/".join(pattern[:first]) or "/")
    below = _real(target, open_filesystem(target)[1])
    if not f"{below}/".startswith(f"{root.rstrip('/')}/"):
        return False
    return _may_fit([name for name in below[len(root) :].split("/") if name], pattern[first:])


def _real(address: str, inner: str) -> str:
    return inner if "://" in address else str(Path(inner).resolve())


def _may_fit(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a glob may match a folder or, whatever they are called, files below it."""
    if not names:
        return all(_WILDCARDS.search(part) for part in parts)
    if not parts or parts[0] != "**":
        return _fits(names, parts) or (
            bool(parts) and _fits_name(names[0], parts[0]) and _may_fit(names[1:], parts[1:])
        )
    deeper = not names[0].startswith((".", "_")) and _may_fit(names[1:], parts)
    return deeper or _may_fit(names, parts[1:])
