"""Texts and data as a page holds them: escaped, and of bounded size."""

from __future__ import annotations

import itertools
import json
import re


def inline_json(data: object) -> str:
    """JSON that no HTML parser can take for markup, whatever the texts in it hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


_COSTLY = re.compile(r"[<>&\"'\\\x00-\x1f\u2028\u2029]")
"""Characters that a page holds as escapes, of at most 6 bytes."""


def bytes_in_page(text: str) -> int:
    """Bytes of ``text`` in a page at most, as JSON or as HTML."""
    return len(text.encode("utf-8", errors="replace")) + 5 * len(_COSTLY.findall(text))


def shorten(text: str | None, room: int) -> str | None:
    """At most ``room`` bytes in a page, escapes included; whole characters, spaces collapsed."""
    if text is None:
        return None
    text = " ".join(text.split()).encode("utf-8", errors="replace").decode("utf-8")
    head = text[: room + 1]
    if bytes_in_page(head) <= room:
        return text
    used = itertools.accumulate(bytes_in_page(character) for character in head)
    cut = next(place for place, bytes_ in enumerate(used) if bytes_ > room - 3)
    return head[:cut].rstrip() + "…"
