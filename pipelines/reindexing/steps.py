"""The steps of a night, announced as they begin."""

from __future__ import annotations

import logging
import time

STEPS = (
    "take the lease",
    "compare the corpus with the published version",
    "embed what is new or changed",
    "write documents into a candidate",
    "cluster, from the centroids before",
    "write the clusters of all documents",
    "write scores and report",
    "bring the vector index up to date",
    "check and seal",
    "publish",
    "clean up",
)

log = logging.getLogger(__name__)


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
