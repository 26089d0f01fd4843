"""What became of a night, posted to a webhook as a JSON object."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
_VARIABLE = "env:"


def require_notifiable(target: str) -> None:
    """Raise :class:`InputError` unless ``target`` is empty or something to post to."""
    if target and not target.startswith(("http://", "https://", _VARIABLE)):
        raise InputError(
            f"--notify {target!r}: it takes an http:// or https:// address, or env:NAME for an "
            "environment variable that holds one"
        )


def notify(target: str, message: Mapping[str, Any]) -> bool:
    """Post ``message``; whether it arrived. What is wrong is logged: a night does not fail by it.

    The address is not logged: such addresses are often secrets.
    """
    address = target
    if target.startswith(_VARIABLE):
        address = os.environ.get(target.removeprefix(_VARIABLE), "")
        if not address.startswith(("http://", "https://")):
            log.warning("nobody was notified: %s holds no http address", target)
            return False
    body = json.dumps(message, ensure_ascii=False, default=str).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        log.warning("the webhook of --notify answered %d", error.code)
    except (urllib.error.URLError, OSError, ValueError) as error:
        log.warning("the webhook of --notify was not reached: %s", type(error).__name__)
    return False
