"""What takes seconds to find out about a model, and is the same tomorrow, kept on this machine.

A value is kept under a digest of all that it follows from: what was asked and the content of model
and adapter, which the caller gives, and the code of this package and of the libraries that read
them. So nothing has to be forgotten; what another release finds out lies under another name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.runtime.files import read_bytes, shoal_home, write_bytes

log = logging.getLogger(__name__)

FOLDER = "encoders"
"""Of the values, within Shoal's own folder."""
_HERE = Path(__file__).parent
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors")


def remember(kind: str, follows_from: Any, make: Callable[[], Any]) -> Any:
    """The value that ``make`` gives, made once on this machine; what it logs is logged each time.

    Args:
        kind: what it is, in one word.
        follows_from: all that decides it beside code; JSON can hold it.
        make: makes it, of what JSON can hold. Its errors are not remembered.
    """
    known = json.dumps([kind, follows_from, _code()], sort_keys=True)
    digest = hashlib.sha256(known.encode()).hexdigest()[:32]
    path = str(shoal_home() / FOLDER / f"{kind}-{digest}.json")
    try:
        kept = json.loads(read_bytes(path))
    except (OSError, ValueError):
        with _listening() as said:
            value = make()
        try:
            write_bytes(path, json.dumps({"value": value, "said": said}).encode())
        except OSError as error:
            log.info("not remembered: %s", error)
        return value
    for level, message in kept["said"]:
        log.log(level, "%s", message)
    return kept["value"]


@contextmanager
def _listening() -> Iterator[list[tuple[int, str]]]:
    """Levels and texts of what this package logs for people meanwhile."""
    said: list[tuple[int, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelno, record.getMessage()))

    listener, package = Listener(logging.INFO), logging.getLogger(__package__)
    package.addHandler(listener)
    try:
        yield said
    finally:
        package.removeHandler(listener)


@cache
def _code() -> list[str]:
    """Versions of libraries, and a digest of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(_HERE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.relative_to(_HERE).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    return [*versions, digest.hexdigest()]
