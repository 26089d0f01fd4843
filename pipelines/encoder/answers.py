"""What an LLM writes, and what of it is the answer: neither its reasoning nor a preamble."""

from __future__ import annotations

import re

REFUSAL = re.compile(
    r"^\W*(i('m| am)? (sorry|afraid|unable)|i (can(no|')t|won't)|as an? (ai|language model)"
    r"|i('m| am) an? ((helpful )?ai|helpful assistant|language model)\b"
    r"|unfortunately,? i|it is not (possible|appropriate))",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"^\s*(sure|certainly|of course|here('s| is)|the rewritten text|rewritten( text)?)"
    r"[^:\n]{0,80}:\s*",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"<think(ing)?>|<(reasoning|thought)>|\[THINK\]|<\|begin_of_thought\|>"
    r"|<\|channel\|>\s*analysis\s*<\|message\|>"
)
_CLOSING = re.compile(
    r"</think(ing)?>|</(reasoning|thought)>|\[/THINK\]|<\|end_of_thought\|>"
    r"|<\|channel\|>\s*final\s*<\|message\|>"
)


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends with the opening mark of reasoning."""
    *_, last = [None, *_OPENING.finditer(prompt)]
    return last is not None and not prompt[last.end() :].strip()


def spoken_part(answer: str) -> str | None:
    """What follows the last closing mark of reasoning, None where reasoning is all there is."""
    *_, closing = [None, *_CLOSING.finditer(answer)]
    rest = answer if closing is None else answer[closing.end() :]
    opening = _OPENING.search(rest)
    rest = rest if opening is None else rest[: opening.start()]
    reasoned = closing is not None or opening is not None
    return None if reasoned and not any(map(str.isalnum, rest)) else rest


def clean_answer(answer: str) -> str:
    """An answer without the sentence that announces it and without quotes around it."""
    text = _PREAMBLE.sub("", answer).strip()
    if len(text) > 1 and text[0] in "\"'“«" and text[-1] in "\"'”»":
        text = text[1:-1].strip()
    return text
