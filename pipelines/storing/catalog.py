"""A store without its documents' format: versions, the published one, what to keep and remove.

:class:`pipelines.store.Store` adds how documents are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pyarrow as pa

from pipelines.errors import InputError, StorageError
from pipelines.storage import (
    exists,
    join,
    list_files,
    read_bytes,
    remove_files,
    remove_folder,
)
from pipelines.storing.candidate import Candidate
from pipelines.storing.exclusive import create_exclusively
from pipelines.storing.lease import Lease, StaleWriterError, take_lease
from pipelines.storing.publications import (
    Publication,
    read_publications,
    version_before,
    write_publication,
)
from pipelines.storing.records import (
    FILE_NAME,
    VERSIONS_FOLDER,
    list_version_files,
    read_record,
    sealed_numbers,
    version_folder,
)
from pipelines.storing.version import Version

if TYPE_CHECKING:
    from pipelines.store import Documents, WrittenFile

PUBLISHED = "published"
VERSION_TAG = "version-"
MARKER = "store.json"
FORMAT = 1
_DOCUMENTS = "documents.lance"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Catalog:
    """A folder, local or ``s3://``, of versions."""

    documents_type: ClassVar[type[Documents]]
    write_documents: ClassVar[Callable[..., WrittenFile]]

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.documents_address = join(uri, _DOCUMENTS)

    @classmethod
    def open(cls, uri: str) -> Self:
        """An existing store; :class:`InputError` where there is none."""
        path = join(uri, MARKER)
        try:
            content = json.loads(read_bytes(path))
        except FileNotFoundError as error:
            raise InputError(
                f"{uri} is no store (it has no {MARKER}); jobs/nightly_reindex.py makes one"
            ) from error
        if content.get("format") != FORMAT:
            raise InputError(
                f"{uri} has format {content.get('format')!r}; this release reads {FORMAT}"
            )
        return cls(uri)

    @classmethod
    def open_or_create(cls, uri: str) -> Self:
        """An existing store or a new, empty one; :class:`InputError` where other files lie."""
        if exists(join(uri, MARKER)):
            return cls.open(uri)
        files = list_files(uri)
        if files:
            raise InputError(
                f"{uri} is not empty (it holds {files[0]!r}) and is no store: choose "
                "another --store"
            )
        created = {"format": FORMAT, "created_at": _now()}
        create_exclusively(join(uri, MARKER), json.dumps(created, indent=2).encode())
        return cls.open(uri)

    def create_documents(self, schema: pa.Schema, written: Iterable[WrittenFile] = ()) -> Documents:
        """Documents of a candidate that takes over none: empty, or what workers wrote."""
        return self.documents_type.create(self.documents_address, schema, written)

    def work_folder(self) -> str:
        """``STORE/_work``: a night's unfinished work, such as embeddings to be resumed."""
        return join(self.uri, "_work")

    def take_lease(self, job: str, *, ttl_seconds: float = 120.0) -> Lease:
        """The right to write, as a context manager that renews it in the background.

        Raises :class:`LeaseHeldError` (exit code 75) that names the holder. A lease whose holder
        died on this machine is taken over at once, one of another machine after ``ttl_seconds``.
        """
        return take_lease(self.uri, job, ttl_seconds)

    def published(self) -> Version | None:
        """The version that the tag names; None before the first publication."""
        try:
            documents = self.documents_type.open(self.documents_address, PUBLISHED)
        except FileNotFoundError:
            return None
        return self._version(documents)

    def version(self, number: int | None = None) -> Version:
        """A sealed version, by default the published; :class:`InputError` where there is none."""
        if number is None:
            found = self.published()
            if found is None:
                raise InputError(f"{self.uri} has no published version yet")
            return found
        try:
            record = read_record(self.uri, number)
        except FileNotFoundError as error:
            present = ", ".join(map(str, sealed_numbers(self.uri))) or "none"
            raise InputError(
                f"{self.uri} has no version {number}; its versions are {present}"
            ) from error
        return self._version(self.documents_type.open(self.documents_address, record.lance_version))

    def _version(self, documents: Documents) -> Version:
        if documents.number is None:
            raise StorageError(
                f"{self.uri}: Lance version {documents.lance_version} belongs to no version; "
                "`manage_store.py verify` says more"
            )
        return Version(self.uri, read_record(self.uri, documents.number), documents)

    def versions(self) -> list[Version]:
        """All sealed versions, published or not, by number."""
        return [self.version(number) for number in sealed_numbers(self.uri)]

    def begin(self, lease: Lease, *, base: int | None = None) -> Candidate:
        """A candidate with the documents of version ``base``, by default the published (or none).

        Cleans up first: what a crashed night left is undone, sealed versions stay.
        """
        self.clean(lease)
        version = self.published() if base is None else self.version(base)
        documents = None
        if version is not None:
            documents = self.documents_type.open(
                self.documents_address, version.record.lance_version
            )
            documents.restore()
        numbers = [0, *list_version_files(self.uri), *(p.version for p in self.publications())]
        return Candidate(self, lease, version, documents, max(numbers) + 1)

    def publish(self, number: int, lease: Lease, *, expected: int | str | None = "any") -> None:
        """Move the tag to version ``number``.

        With ``expected`` (a number, or None for none) it refuses, as :class:`StaleWriterError`,
        when another version is published by now.
        """
        version = self.version(number)
        published = self.published()
        current = None if published is None else published.number
        if expected != "any" and expected != current:
            raise StaleWriterError(
                f"{self.uri}: version {current} is published, not {expected} as when version "
                f"{number} was made; publish it by hand if that is what you want"
            )
        if current != number:
            self._move_tag(version, lease, current, "publish")

    def rollback(self, lease: Lease) -> Version:
        """Move the tag back to the version published before; an error if none is left."""
        current = self.version()
        before = version_before(self.publications(), current.number, sealed_numbers(self.uri))
        if before is None:
            raise InputError(
                f"{self.uri}: no version published before {current.number} is left; "
                "`manage_store.py list` shows what there is"
            )
        version = self.version(before)
        self._move_tag(version, lease, current.number, "rollback")
        return version

    def _move_tag(self, version: Version, lease: Lease, previous: int | None, action: Any) -> None:
        lease.check()
        write_publication(self.uri, lease, version.number, previous, action)
        version.documents.tag(PUBLISHED, version.record.lance_version)

    def publications(self) -> list[Publication]:
        """What was published when, in order."""
        return read_publications(self.uri)

    def tags(self) -> dict[str, int]:
        """Names that people gave to versions; prune leaves these versions."""
        found = self.lance_tags()
        numbers = {
            lance_version: int(name.removeprefix(VERSION_TAG))
            for name, lance_version in found.items()
            if name.startswith(VERSION_TAG)
        }
        return {
            name: numbers[lance_version]
            for name, lance_version in sorted(found.items())
            if lance_version in numbers and not name.startswith(VERSION_TAG)
        }

    def lance_tags(self) -> dict[str, int]:
        """All tags of the documents, and the Lance versions that they name."""
        try:
            return self.documents_type.open(self.documents_address).tags()
        except FileNotFoundError:
            return {}

    def tag(self, number: int, name: str, lease: Lease) -> None:
        """Give a version a name, which keeps it from being pruned.

        Raises :class:`InputError` for a name that the store itself uses or Lance does not take.
        """
        version = self.version(number)
        if name == PUBLISHED or name.startswith(VERSION_TAG) or not _NAME.fullmatch(name):
            raise InputError(
                f"a version cannot be named {name!r}: a name has letters, digits, dots, dashes and "
                f"underscores, and is neither {PUBLISHED!r} nor {VERSION_TAG}N"
            )
        lease.check()
        version.documents.tag(name, version.record.lance_version)

    def untag(self, name: str, lease: Lease) -> None:
        """Take a name away; :class:`InputError` where no version has it."""
        names = [found for found in self.tags() if found != PUBLISHED]
        if name not in names:
            raise InputError(
                f"no version is named {name!r}; names are {', '.join(names) or 'none'}"
            )
        lease.check()
        self.documents_type.open(self.documents_address).untag(name)

    def prune(self, lease: Lease, keep: int) -> list[int]:
        """Remove all versions but the newest ``keep``, the published and tagged; the removed."""
        if keep < 1:
            raise InputError(f"keep is {keep}; at least one version must stay")
        lease.check()
        numbers = sealed_numbers(self.uri)
        kept = {*numbers[-keep:], *self.tags().values()}
        removed = [number for number in numbers if number not in kept]
        for number in removed:
            # The record goes first: from then on the version is not there, whole or in part.
            remove_files([join(version_folder(self.uri, number), FILE_NAME)])
        self.clean(lease)
        return removed

    def clean(self, lease: Lease) -> None:
        """Remove what belongs to no sealed version: leftovers of crashed nights."""
        lease.check()
        sealed = {number: read_record(self.uri, number) for number in sealed_numbers(self.uri)}
        used = {a.path for record in sealed.values() for a in record.artifacts.values()}
        used |= {f"{VERSIONS_FOLDER}/{number}/{FILE_NAME}" for number in sealed}
        for number, files in list_version_files(self.uri).items():
            if used.isdisjoint(files):
                remove_folder(version_folder(self.uri, number))
            else:
                remove_files([join(self.uri, path) for path in files if path not in used])
        try:
            newest = self.documents_type.open(self.documents_address)
        except FileNotFoundError:
            return
        for name in newest.tags():
            number_text = name.removeprefix(VERSION_TAG)
            if name.startswith(VERSION_TAG) and int(number_text) not in sealed:
                newest.untag(name)
        published = self.published()
        if published is not None and newest.lance_version != published.record.lance_version:
            newest = self.documents_type.open(
                self.documents_address, published.record.lance_version
            )
            newest.restore()
        newest.clean()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
