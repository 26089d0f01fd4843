"""What was published when: one file a publication, ``publications/NNNNNNNN.json``.

It is written before the tag moves, so that a way back is known whenever the tag has moved; the
tag alone says what is published.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from pipelines.storage import in_threads, join, list_files, read_bytes
from pipelines.storing.exclusive import create_exclusively
from pipelines.storing.lease import Lease, StaleWriterError

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
    names = [n for n in list_files(join(store, _FOLDER)) if n.removesuffix(".json").isdigit()]
    contents = in_threads(lambda name: read_bytes(join(store, _FOLDER, name)), names)
    return [Publication(**json.loads(content)) for content in contents]


def write_publication(
    store: str, lease: Lease, version: int, previous: int | None, action: Action
) -> Publication:
    """Record that the tag is about to move; :class:`StaleWriterError` if another was quicker."""
    names = [n for n in list_files(join(store, _FOLDER)) if n.removesuffix(".json").isdigit()]
    number = int(names[-1].removesuffix(".json")) + 1 if names else 1
    at = datetime.now(UTC).isoformat(timespec="seconds")
    entry = Publication(number, version, previous, action, at, lease.state.job, lease.state.host)
    path = join(store, _FOLDER, f"{number:08d}.json")
    if not create_exclusively(path, json.dumps(asdict(entry), indent=2).encode()):
        raise StaleWriterError(f"{store}: another run is publishing; look again with `list`")
    return entry


def version_before(
    publications: Sequence[Publication], current: int, present: Collection[int]
) -> int | None:
    """The version that was published before ``current`` and is still ``present``.

    A rollback does not count as a publication: rolling back twice goes back two versions.
    """
    earlier: int | None = current
    seen = set()
    while earlier is not None and earlier not in seen:
        seen.add(earlier)
        entries = [p for p in publications if p.version == earlier and p.action == "publish"]
        earlier = entries[-1].previous if entries else None
        if earlier in present and earlier != current:
            return earlier
    return None
