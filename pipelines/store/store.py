"""The versioned store of documents: its versions, the published one, what to keep and remove.

``STORE/documents.lance`` holds the documents of every version
(:mod:`pipelines.store.documents`), ``STORE/versions/N/`` what else
belongs to version N (``encoder.json``, ``centroids.parquet``, ``lineage.parquet``,
``scores.json``, ``report.html``, ``run.json``, …), and its ``version.json``, written last, makes
it one whole. A *candidate* is built from a version under a lease, sealed under the next number,
and published by moving the one tag ``published``: readers see the old whole or the new one.

A night, in outline::

    store = Store.open_or_create(uri)
    with store.take_lease("nightly_reindex") as lease:
        base = store.published()                      # None on the first night
        candidate = store.begin(lease)                # cleans what a crashed night left
        candidate.upsert(paths, schema=…, when=now)   # or candidate.replace(…) for all documents
        candidate.delete(ids)
        refs = candidate.fragments()                  # picklable; workers read them
        candidate.set_assignments([assign_fragment(ref, assign) for ref in refs])
        candidate.put("scores.json", …)
        candidate.update_index()
        version = candidate.seal(counts=…, scores=…, reasons=[…])
        store.publish(version.number, lease, expected=base.number)

Columns of a document: ``id`` (string or int64), ``text`` (string), the kept columns,
``text_sha256`` (string), ``embedding`` fixed_size_list<float | halffloat>[d], ``cluster_id``
(int32), ``distance`` (float), ``first_seen`` and ``last_changed`` (timestamp[us, UTC]).
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any, Self

from pipelines.runtime.errors import InputError, StorageError
from pipelines.runtime.files import (
    create_exclusively,
    exists,
    in_threads,
    join,
    json_bytes,
    list_files,
    read_bytes,
    remove_files,
)
from pipelines.runtime.tables import PUBLISHED, STORE_MARK
from pipelines.store.candidate import Candidate, remove_leftovers
from pipelines.store.documents import Documents
from pipelines.store.lease import Lease, take_lease
from pipelines.store.records import (
    FILE_NAME,
    VERSION_TAG,
    Publication,
    StaleWriterError,
    documents_address,
    list_version_files,
    read_publications,
    read_record,
    sealed_numbers,
    version_before,
    version_folder,
    write_publication,
)
from pipelines.store.version import Version

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Store:
    """A folder, local or ``s3://``, of versions."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.documents_address = documents_address(uri)

    @classmethod
    def open(cls, uri: str) -> Self:
        """An existing store; :class:`InputError` where there is none."""
        path = join(uri, STORE_MARK)
        try:
            content = json.loads(read_bytes(path))
        except FileNotFoundError as error:
            raise InputError(
                f"{uri} is no store (it has no {STORE_MARK}); jobs/nightly_reindex.py makes one"
            ) from error
        if content.get("format") != FORMAT:
            raise InputError(
                f"{uri} has format {content.get('format')!r}; this release reads {FORMAT}"
            )
        return cls(uri)

    @classmethod
    def open_if_there(cls, uri: str) -> Self | None:
        """An existing store, None where nothing lies; :class:`InputError` where other files lie."""
        if exists(join(uri, STORE_MARK)):
            return cls.open(uri)
        files = list_files(uri)
        if files:
            raise InputError(
                f"{uri} is not empty (it holds {files[0]!r}) and is no store: choose "
                "another --store"
            )
        return None

    @classmethod
    def open_or_create(cls, uri: str) -> Self:
        """An existing store or a new, empty one; :class:`InputError` where other files lie."""
        store = cls.open_if_there(uri)
        if store is not None:
            return store
        created = {"format": FORMAT, "created_at": _now()}
        create_exclusively(join(uri, STORE_MARK), json_bytes(created))
        return cls.open(uri)

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
            documents = Documents.open(self.documents_address, PUBLISHED)
        except FileNotFoundError:
            return None
        return self._version(documents)

    def version(self, number: int | None = None) -> Version:
        """A sealed version, by default the published; :class:`InputError` where there is none."""
        if number is None:
            published = self.published()
            if published is None:
                raise InputError(f"{self.uri} has no published version yet")
            return published
        try:
            record = read_record(self.uri, number)
        except FileNotFoundError as error:
            present = ", ".join(map(str, sealed_numbers(self.uri))) or "none"
            raise InputError(
                f"{self.uri} has no version {number}; its versions are {present}"
            ) from error
        return self._version(Documents.open(self.documents_address, record.lance_version))

    def _version(self, documents: Documents) -> Version:
        if documents.number is None:
            raise StorageError(
                f"{self.uri}: Lance version {documents.lance_version} belongs to no version; "
                "`manage_store.py verify` says more"
            )
        return Version(self.uri, read_record(self.uri, documents.number), documents)

    def versions(self) -> list[Version]:
        """All sealed versions, published or not, by number; only their records are read."""
        records = in_threads(lambda n: read_record(self.uri, n), sealed_numbers(self.uri))
        return [Version(self.uri, record) for record in records]

    def begin(self, lease: Lease, *, base: int | None = None) -> Candidate:
        """A candidate with the documents of version ``base``, by default the published (or none).

        Cleans up first: what a crashed night left is undone, sealed versions stay.
        """
        self.clean(lease)
        version = self.published() if base is None else self.version(base)
        documents = None
        if version is not None:
            documents = Documents.open(self.documents_address, version.record.lance_version)
            documents.restore()
        numbers = [0, *list_version_files(self.uri), *(p.version for p in self.publications())]
        return Candidate(self.uri, lease, version, documents, max(numbers) + 1)

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
        tags = self.lance_tags()
        numbers = {
            lance_version: int(name.removeprefix(VERSION_TAG))
            for name, lance_version in tags.items()
            if name.startswith(VERSION_TAG)
        }
        return {
            name: numbers[lance_version]
            for name, lance_version in sorted(tags.items())
            if lance_version in numbers and not name.startswith(VERSION_TAG)
        }

    def lance_tags(self) -> dict[str, int]:
        """All tags of the documents, and the Lance versions that they name."""
        try:
            return Documents.open(self.documents_address).tags()
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
        names = [tag for tag in self.tags() if tag != PUBLISHED]
        if name not in names:
            raise InputError(
                f"no version is named {name!r}; names are {', '.join(names) or 'none'}"
            )
        lease.check()
        Documents.open(self.documents_address).untag(name)

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
        remove_leftovers(self.uri, lease)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
