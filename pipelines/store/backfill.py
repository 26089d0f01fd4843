"""Backfills: vectors of another encoder that gather over several nights, beside the old version.

``STORE/_work/backfill-FINGERPRINT.json`` says that a backfill is under way, and which folders of
unfinished work hold its vectors; as long as it is there, no other night removes them. A version
that is sealed with that encoder ends the backfill, and so does ``manage_store.py backfill
--cancel``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Self

import pyarrow.fs as pafs

from pipelines.runtime.command import Answer
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    join,
    list_files,
    open_filesystem,
    read_bytes,
    remove_files,
    remove_folder,
    with_retries,
    write_bytes,
)
from pipelines.store.config import BackfillConfig
from pipelines.store.store import Store

_PREFIX = "backfill-"


@dataclass(frozen=True)
class Backfill:
    """What is known of one backfill."""

    fingerprint: str
    """The encoder's."""
    begun_at: str
    nights: int
    """That have embedded for it, one that was killed among them."""
    texts: int
    """Distinct texts of the corpus as the last of them saw it."""
    embedded: int
    """Those of them that have a vector."""
    folders: tuple[str, ...]
    """Names of the folders below ``_work/`` that hold its vectors."""

    @classmethod
    def begin(cls, fingerprint: str) -> Self:
        """One that has nothing yet."""
        return cls(fingerprint, datetime.now(UTC).isoformat(timespec="seconds"), 0, 0, 0, ())

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{_PREFIX}{self.fingerprint}.json"

    def extended(self, folders: Sequence[str], *, texts: int, embedded: int, nights: int) -> Self:
        """With what a night adds."""
        names = dict.fromkeys((*self.folders, *folders))
        return replace(
            self,
            folders=tuple(names),
            texts=texts,
            embedded=embedded,
            nights=self.nights + nights,
        )

    def save(self, store: Store) -> None:
        """Write its file."""
        write_bytes(join(store.work_folder(), self.name), json.dumps(asdict(self)).encode())


def open_backfills(store: Store) -> list[Backfill]:
    """The backfills that are under way."""
    root = store.work_folder()
    names = [name for name in list_files(root) if name.startswith(_PREFIX) and "/" not in name]
    contents = (json.loads(read_bytes(join(root, name))) for name in names)
    return [Backfill(**{**content, "folders": tuple(content["folders"])}) for content in contents]


def end_backfill(store: Store, fingerprint: str) -> None:
    """A backfill is over: its vectors are in a version, or not wanted any more."""
    ended = [backfill for backfill in open_backfills(store) if backfill.fingerprint == fingerprint]
    remove_files([join(store.work_folder(), backfill.name) for backfill in ended])


def show_backfills(config: BackfillConfig) -> Answer:
    """How far each backfill is and what disk it takes, after ``--cancel`` those that are left."""
    store = Store.open(config.store)
    notes = [_cancel(store, config.cancel)] if config.cancel else []
    under_way = open_backfills(store)
    data = [{**asdict(backfill), "bytes": _size(store, backfill)} for backfill in under_way]
    rows = [
        [
            entry["fingerprint"][:12],
            entry["begun_at"],
            f"{entry['nights']:,}",
            f"{entry['embedded']:,} of {entry['texts']:,}",
            f"{entry['bytes'] / 2**20:,.1f} MiB",
        ]
        for entry in data
    ]
    columns = ("encoder", "begun", "nights", "texts with a vector", "disk")
    title = f"{config.store}: {len(rows)} backfills under way"
    return Answer(data, title, columns, rows, notes=notes)


def _cancel(store: Store, beginning: str) -> str:
    with store.take_lease("manage_store") as lease:
        under_way = open_backfills(store)
        meant = [b for b in under_way if b.fingerprint.startswith(beginning)]
        if len(meant) != 1:
            there = ", ".join(b.fingerprint[:12] for b in under_way) or "none"
            found = "no backfill" if not meant else f"{len(meant)} backfills"
            raise InputError(
                f"{found} of an encoder whose fingerprint begins with {beginning!r}; under way: "
                f"{there}"
            )
        lease.check()
        end_backfill(store, meant[0].fingerprint)
        shared = {name for b in open_backfills(store) for name in b.folders}
        for name in meant[0].folders:
            if name not in shared:
                remove_folder(join(store.work_folder(), name))
    return (
        f"the backfill of encoder {meant[0].fingerprint[:12]} is cancelled: "
        f"{meant[0].embedded:,} vectors removed"
    )


def _size(store: Store, backfill: Backfill) -> int:
    """Bytes of the files in its folders."""
    filesystem, root = open_filesystem(store.work_folder())
    total = 0
    for name in backfill.folders:
        selector = pafs.FileSelector(f"{root}/{name}", recursive=True, allow_not_found=True)
        look = functools.partial(filesystem.get_file_info, selector)
        total += sum(info.size or 0 for info in with_retries(look, store.work_folder()))
    return total
