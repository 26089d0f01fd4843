"""Credentials stay out of settings, and so out of logs, ``run.json`` and process lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.errors import InputError

# user:secret@ or key@ before the host or bucket, and options that name a secret
_IN_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)
_IN_OPTIONS = re.compile(
    r"[?&][\w.-]*(secret|password|passwd|token|access_?key|account_?key|credential|signature|sas)"
    r"[\w.-]*=",
    re.IGNORECASE,
)

_FREE_TEXT = ("prompt", "query", "text")


def refuse_credentials(settings: Mapping[str, Any]) -> None:
    """Raise :class:`InputError`, which does not repeat it, where a setting's address has a secret.

    What is a setting ends in ``run.json``, on the screen, and in Ray's list of jobs.
    """
    for name, value in settings.items():
        if name in _FREE_TEXT:
            continue
        for text in _texts(value):
            if _IN_ADDRESS.search(text) or ("://" in text and _IN_OPTIONS.search(text)):
                raise InputError(
                    f"--{name.replace('_', '-')} holds credentials in its address, where logs and "
                    "run.json would show them: leave them out and pass them as the service's own "
                    "tools do (environment, configuration file, instance role)"
                )


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
