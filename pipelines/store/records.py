"""``versions/N/version.json``: what belongs to a version, and that it is whole.

It is written after everything it names, by one file's appearance. Artifacts that two versions
share are one file, in the folder of the version that made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    create_exclusively,
    in_threads,
    join,
    json_bytes,
    list_files,
    list_numbered,
    numbered_file,
    read_bytes,
    write_bytes,
)
from pipelines.runtime.tables import STORE_DOCUMENTS
from pipelines.store.lease import Lease

VERSION_TAG = "version-"
VERSIONS_FOLDER = "versions"
FILE_NAME = "version.json"
FORMAT = 1


class StaleWriterError(RuntimeError):
    """Another writer has changed the store since this one looked."""

    exit_code = 75


def documents_address(store: str) -> str:
    """Where a store keeps the documents of all its versions."""
    return join(store, STORE_DOCUMENTS)


@dataclass(frozen=True)
class Artifact:
    """A file that belongs to a version; ``path`` is relative to the store."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class VersionRecord:
    """The content of ``version.json``."""

    version: int
    lance_version: int
    """Lance's own number of the documents."""
    base: int | None
    """The version that it was built from."""
    created_at: str
    fingerprint: str
    """The encoder's."""
    counts: Mapping[str, int]
    scores: Mapping[str, Any]
    reasons: tuple[str, ...]
    """Why it was not to be published; empty where nothing spoke against it."""
    index: Mapping[str, Any] | None
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], path: str) -> VersionRecord:
        """The record in a file's content; :class:`InputError` where it is of another format."""
        if content.get("format") != FORMAT:
            raise InputError(
                f"{path} has format {content.get('format')!r}; this release reads {FORMAT}"
            )
        values = {k: v for k, v in content.items() if k != "format"}
        artifacts = {name: Artifact(**entry) for name, entry in values["artifacts"].items()}
        return cls(**{**values, "reasons": tuple(values["reasons"]), "artifacts": artifacts})


def version_folder(store: str, number: int) -> str:
    """Address of the folder of a version's own artifacts."""
    return join(store, VERSIONS_FOLDER, str(number))


def write_record(store: str, record: VersionRecord) -> None:
    """Write a version's record; from now on it is whole."""
    path = join(version_folder(store, record.version), FILE_NAME)
    write_bytes(path, json_bytes(record.to_json(), default=str))


def read_record(store: str, number: int) -> VersionRecord:
    """A version's record; :class:`FileNotFoundError` where it has none."""
    path = join(version_folder(store, number), FILE_NAME)
    return VersionRecord.from_json(json.loads(read_bytes(path)), path)


def put_artifact(store: str, number: int, name: str, data: bytes) -> Artifact:
    """Write a file into a version's folder.

    Raises :class:`ValueError` for a name that is the record's or leads out of the folder.
    """
    if name == FILE_NAME or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"an artifact cannot be named {name!r}")
    write_bytes(join(version_folder(store, number), name), data)
    path = f"{VERSIONS_FOLDER}/{number}/{name}"
    return Artifact(path, len(data), hashlib.sha256(data).hexdigest())


def list_version_files(store: str) -> dict[int, list[str]]:
    """Per number with a folder under ``versions/``, its files as paths relative to the store."""
    files: dict[int, list[str]] = {}
    for name in list_files(join(store, VERSIONS_FOLDER)):
        number, _, rest = name.partition("/")
        if number.isdigit() and rest:
            files.setdefault(int(number), []).append(f"{VERSIONS_FOLDER}/{name}")
    return files


def sealed_numbers(store: str) -> list[int]:
    """Numbers of the versions that have a record, in order."""
    files = list_version_files(store)
    return sorted(n for n, names in files.items() if f"{VERSIONS_FOLDER}/{n}/{FILE_NAME}" in names)


_FOLDER = "publications"
Action = Literal["publish", "rollback"]


@dataclass(frozen=True)
class Publication:
    """One move of the tag, as it was intended."""

    number: int
    version: int
    previous: int | None
    action: Action
    at: str
    job: str
    host: str


def read_publications(store: str) -> list[Publication]:
    """All publications in order."""
    contents = in_threads(read_bytes, list(list_numbered(join(store, _FOLDER)).values()))
    return [Publication(**json.loads(content)) for content in contents]


def write_publication(
    store: str, lease: Lease, version: int, previous: int | None, action: Action
) -> Publication:
    """Record that the tag is about to move; :class:`StaleWriterError` if another was quicker."""
    folder = join(store, _FOLDER)
    number = max(list_numbered(folder), default=0) + 1
    at = datetime.now(UTC).isoformat(timespec="seconds")
    entry = Publication(number, version, previous, action, at, lease.state.job, lease.state.host)
    if not create_exclusively(numbered_file(folder, number), json_bytes(asdict(entry))):
        raise StaleWriterError(f"{store}: another run is publishing; look again with `list`")
    return entry


def version_before(
    publications: Sequence[Publication], current: int, present: Collection[int]
) -> int | None:
    """The version that was published before ``current`` and is still ``present``.

    A rollback does not count as a publication: rolling back twice goes back two versions. Every
    publication is gone back over once, also where one version was published several times.
    """
    latest: dict[int, _Step] = {}  # by version, where it was published last
    for entry in publications:
        step: _Step | None = None
        if entry.previous is not None:
            step = latest.get(entry.previous, (entry.previous, None))
        if entry.action == "publish":
            latest[entry.version] = (entry.version, step)
            continue
        while step is not None and step[0] != entry.version:
            step = step[1]
        if step is not None:
            latest[entry.version] = step
    back = latest.get(current)
    while back is not None and (back[0] == current or back[0] not in present):
        back = back[1]
    return None if back is None else back[0]


_Step = tuple[int, "_Step | None"]
"""A version that was published, and the one that was before it."""
