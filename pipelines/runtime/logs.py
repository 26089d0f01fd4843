"""Log lines of a job: text for people, or one JSON object a line for machines.

``SHOAL_LOG_FORMAT=json`` makes every line of driver and workers an object that names the run
(``run_id``, that of ``run.json``), the job, and, where a unit of work is meant, its ``stage`` and
``shard``; Ray adds the ids of its job, node, worker, task and actor.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.runtime.errors import InputError

LOG_FORMAT = "SHOAL_LOG_FORMAT"
UNIT_LINES = "pipelines.runtime.units.done"
"""Logger of a line for every unit of work: for machines that read JSON, too many for people."""
RUN = "shoal_run"
"""Name under which Ray Data's context carries job and run id to workers."""
_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FORMATS = ("text", "json")
_NOISY = ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "botocore", "faiss.loader")


def log_format() -> str:
    """``text`` or ``json``; :class:`InputError` for anything else in ``SHOAL_LOG_FORMAT``."""
    found = os.environ.get(LOG_FORMAT, "").lower() or "text"
    if found not in _FORMATS:
        raise InputError(f"{LOG_FORMAT} is {found!r}; it must be text or json")
    return found


def log_level() -> str:
    """``SHOAL_LOG_LEVEL``, by default INFO; :class:`InputError` for a level that is none."""
    found = os.environ.get("SHOAL_LOG_LEVEL", "").upper() or "INFO"
    if found not in logging.getLevelNamesMapping():
        raise InputError(f"SHOAL_LOG_LEVEL is {found!r}; it must be DEBUG, INFO, WARNING or ERROR")
    return found


def configure_logging() -> None:
    """Log to stderr, one line a message. JSON lines are Ray's part, from :func:`job_logging` on."""
    if log_format() == "text":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_TextFormatter(_LINE, "%H:%M:%S"))
        logging.basicConfig(level=log_level(), handlers=[handler])
        logging.getLogger(UNIT_LINES).setLevel(logging.WARNING)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It tells of products of four bits that it lacks on a CPU, and none is made here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return show_controls(super().format(record))


def show_controls(text: str) -> str:
    """``text`` with control characters made visible, but for line ends and tabs.

    A file's or a column's name may hold sequences that a terminal would obey.
    """
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def job_logging() -> Any:
    """What ``ray.init`` is told of logging: JSON lines in all processes of the job, or nothing."""
    import ray

    if log_format() == "text":
        return None
    return ray.LoggingConfig("JSON", log_level(), additional_log_standard_attrs=["name"])


# Not read off the factory of records: Ray puts one of its own around ours when it is imported.
_run: tuple[str, str] | None = None


def mark_lines(job: str, run_id: str) -> None:
    """Give every line of this process from now on the run that it belongs to."""
    global _run
    if not run_id or current_run() == (job, run_id):
        return
    before = logging.getLogRecordFactory()
    make = before.make if isinstance(before, _MarkedRecords) else before
    logging.setLogRecordFactory(_MarkedRecords(make, (job, run_id)))
    _run = (job, run_id)


def current_run() -> tuple[str, str] | None:
    """Job and run id that this process's lines are marked with, None where they are not."""
    return _run


@dataclass(frozen=True)
class _MarkedRecords:
    make: Callable[..., logging.LogRecord]
    run: tuple[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.make(*args, **kwargs)
        record.__dict__.update(job=self.run[0], run_id=self.run[1])
        return record
