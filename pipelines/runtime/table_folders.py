"""Which folders are Delta, Iceberg, Lance and Hudi tables, and paths that name only a part of one.

A part of a table holds rows that were deleted or replaced: only its folder stands for its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import in_threads, open_filesystem, with_inner_path, with_retries
from pipelines.runtime.table_view import HIVE_FOLDER

LANCE_SUFFIX = ".lance"


def table_kind(address: str) -> str | None:
    """Which kind of table a folder is: delta, iceberg, lance, hudi; None where it is none."""
    filesystem, inner = open_filesystem(address)
    if inner.rstrip("/").endswith(LANCE_SUFFIX):
        return "lance"
    marks = {"_delta_log": "delta", ".hoodie": "hudi", "metadata": "iceberg"}
    infos = with_retries(
        lambda: filesystem.get_file_info([f"{inner.rstrip('/')}/{mark}" for mark in marks]), address
    )
    for info, kind in zip(infos, marks.values(), strict=True):
        if info.type != pafs.FileType.Directory:
            continue
        if kind != "iceberg" or newest_metadata(address):
            return kind
    return None


def newest_metadata(address: str) -> str | None:
    """The metadata file of an Iceberg table's current state, an address; None where none is."""
    filesystem, inner = open_filesystem(address)
    selector = pafs.FileSelector(f"{inner.rstrip('/')}/metadata", allow_not_found=True)
    infos = with_retries(lambda: filesystem.get_file_info(selector), address)
    metadata = [info for info in infos if info.base_name.endswith(".metadata.json")]
    if not metadata:
        return None
    newest = max(metadata, key=lambda info: (_metadata_number(info.base_name), info.mtime_ns or 0))
    return with_inner_path(address, newest.path)


def _metadata_number(name: str) -> int:
    """The number that ``00003-UUID.metadata.json`` and ``v3.metadata.json`` begin with."""
    digits = name.removeprefix("v").split("-")[0].split(".")[0]
    return int(digits) if digits.isdigit() else -1


def refuse_files_of_tables(address: str, infos: Sequence[pafs.FileInfo]) -> None:
    """Raise :class:`InputError` where files or folders within a table are named, not its folder."""
    inner = open_filesystem(address)[1]
    inner = inner.rstrip("/") or inner
    folders = {str(PurePosixPath(i.path).parent) for i in infos if i.type == pafs.FileType.File}
    if folders and not re.search(r"[*?\[]", inner) and infos[0].path != inner:
        folders = {inner}  # whose search has seen the tables in it
    places = sorted({place for folder in folders for place in _places_of_tables(folder)})
    kinds = in_threads(lambda place: _kind_above(with_inner_path(address, place)), places)
    for place, kind in zip(places, kinds, strict=True):
        if kind is not None:
            raise InputError(
                f"{address} names files within a table ({place}), some of which may hold rows "
                "that were deleted or replaced. Give the table's folder"
            )


def require_table(version: str, address: str, infos: Sequence[pafs.FileInfo]) -> None:
    """Raise :class:`InputError` for a version of what is no table."""
    if version and not any(info.type == pafs.FileType.Directory for info in infos):
        raise InputError(
            f"--version {version} has no effect: {address} holds no Delta, Iceberg or Lance table"
        )


def _places_of_tables(folder: str) -> Iterator[str]:
    """Where the table would lie, of any writer's layout, whose files a folder holds."""
    path = PurePosixPath(folder)
    while HIVE_FOLDER.fullmatch(path.name):
        path = path.parent
    above = [each.parent for each in (path, *path.parents) if each.name == "data"]
    for place in (path, path.parent, *above):
        if place.name:
            yield str(place)


def _kind_above(address: str) -> str | None:
    """:func:`table_kind` of a folder that may lie above what one has the right to see."""
    try:
        return table_kind(address)
    except OSError:
        return None
