"""``versions/N/version.json``: what belongs to a version, and that it is whole.

It is written after everything it names, by one file's appearance. Artifacts that two versions
share are one file, in the folder of the version that made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.errors import InputError
from pipelines.storage import join, list_files, read_bytes, write_bytes

VERSIONS_FOLDER = "versions"
FILE_NAME = "version.json"
FORMAT = 1


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
        artifacts = {name: Artifact(**found) for name, found in values["artifacts"].items()}
        return cls(**{**values, "reasons": tuple(values["reasons"]), "artifacts": artifacts})


def version_folder(store: str, number: int) -> str:
    """Address of the folder of a version's own artifacts."""
    return join(store, VERSIONS_FOLDER, str(number))


def write_record(store: str, record: VersionRecord) -> None:
    """Write a version's record; from now on it is whole."""
    text = json.dumps(record.to_json(), indent=2, ensure_ascii=False, default=str) + "\n"
    write_bytes(join(version_folder(store, record.version), FILE_NAME), text.encode())


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
    found: dict[int, list[str]] = {}
    for name in list_files(join(store, VERSIONS_FOLDER)):
        number, _, rest = name.partition("/")
        if number.isdigit() and rest:
            found.setdefault(int(number), []).append(f"{VERSIONS_FOLDER}/{name}")
    return found


def sealed_numbers(store: str) -> list[int]:
    """Numbers of the versions that have a record, in order."""
    files = list_version_files(store)
    return sorted(n for n, names in files.items() if f"{VERSIONS_FOLDER}/{n}/{FILE_NAME}" in names)
