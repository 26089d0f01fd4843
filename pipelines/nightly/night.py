"""One night as its steps share it, and which step it is at."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pipelines.nightly.changes import Before
from pipelines.nightly.config import NightConfig
from pipelines.runtime.run_record import RunRecord
from pipelines.store.edits import Edit, active_edits
from pipelines.store.lease import Lease
from pipelines.store.store import Store

log = logging.getLogger(__name__)

STEPS = (
    "take the lease",
    "compare the corpus with the published version",
    "embed what is new or changed",
    "write documents into a candidate",
    "cluster, from the centroids before",
    "write the clusters of all documents",
    "bring the vector index up to date",
    "compare, write scores and report",
    "check and seal",
    "publish",
    "clean up",
)


class Steps:
    """Tells which step begins, and how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._step = ""
        self._began = time.monotonic()

    def begin(self, number: int) -> None:
        """Announce step ``number``, from 1."""
        self.end()
        self._step = STEPS[number - 1]
        announce(number)

    def end(self) -> None:
        """The step that was begun last is done."""
        now = time.monotonic()
        if self._step:
            self.seconds[self._step] = round(now - self._began, 3)
        self._step, self._began = "", now


def announce(number: int) -> None:
    """One line to the log."""
    log.info("step %d of %d: %s", number, len(STEPS), STEPS[number - 1])


@dataclass
class Night:
    """One run, as its steps share it."""

    config: NightConfig
    store: Store
    lease: Lease
    record: RunRecord
    steps: Steps
    before: Before
    folder: str
    when: datetime
    edits: Sequence[Edit]
    """People's, undone ones among them."""
    corpus: str | None = None
    """Digest of the corpus as it was listed; None where files are too young to go by it."""

    @property
    def active(self) -> list[Edit]:
        """The edits that hold."""
        return active_edits(self.edits)
