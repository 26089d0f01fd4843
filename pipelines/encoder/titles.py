"""Names for groups of documents, written by an instruct LLM from keywords and excerpts.

Greedy decoding, one group at a time: a group's name does not depend on what stands beside it,
unless another of its level has that name already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import ray

from pipelines.encoder.chat import REFUSAL, ChatModel, clean_answer, spoken_part
from pipelines.runtime.machines import need_ray

_INSTRUCTION = (
    "Below are keywords and excerpts of documents that belong to one group. Write a title of two "
    "to five words that says what they have in common. Answer with the title only, in the language "
    "of the documents."
)
_RIVAL = (
    'Another group, about {keywords}, has the title "{name}" already. Write another title, which '
    "tells this group from that one."
)
_NAME_TOKENS = 24
_LONGEST_NAME = 60
_PROMPT_TOKENS = 1_024


class Group(Protocol):
    """What is shown of one group."""

    @property
    def keywords(self) -> list[str]:
        """Words that set it apart."""

    @property
    def texts(self) -> list[str]:
        """Beginnings of its documents."""


class GroupNamer:
    """A loaded instruct LLM that names groups."""

    def __init__(self, model: str) -> None:
        """Raises :class:`InputError` for a model that follows no instructions."""
        self._chat = ChatModel(model)

    def name(
        self, groups: Sequence[Group], taken: Mapping[str, Group] | None = None
    ) -> list[str | None]:
        """A name for each group of one level, no two alike; None where there is no such title.

        A group whose title an earlier one has, or one of ``taken``, is asked for again, with that
        one's keywords.
        """
        owners = {name.casefold(): group for name, group in (taken or {}).items()}
        names: list[str | None] = []
        for group in groups:
            title = self._title(prompt_of(group))
            if title and (rival := owners.get(title.casefold())):
                title = self._title(prompt_of(group, rival=(title, rival)))
                if title and title.casefold() in owners:
                    title = None
            if title:
                owners[title.casefold()] = group
            names.append(title)
        return names

    def _title(self, question: str) -> str | None:
        (answer,) = self._chat.ask(
            [self._chat.cut(question, _PROMPT_TOKENS)], most_tokens=_NAME_TOKENS
        )
        return None if answer is None else title_of(answer)


def name_levels(
    model: str, levels: Sequence[Sequence[Group]], *, taken: Mapping[str, Group] | None = None
) -> list[list[str | None]]:
    """A name for each group of each level, by ``model`` on one worker (with a GPU if any).

    ``taken`` are names that none may get, with the groups that have them.
    """
    need_ray()
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    ask = ray.remote(num_cpus=1, num_gpus=gpus)(_name)
    return ray.get(ask.remote(model, [list(groups) for groups in levels], dict(taken or {})))


def _name(
    model: str, levels: Sequence[Sequence[Group]], taken: Mapping[str, Group]
) -> list[list[str | None]]:
    namer = GroupNamer(model)
    return [namer.name(groups, taken) for groups in levels]


def prompt_of(group: Group, *, rival: tuple[str, Group] | None = None) -> str:
    """The question that a model is asked about a group.

    ``rival`` is another group with its title, which this one must not have.
    """
    instruction = _INSTRUCTION
    if rival is not None:
        name, other = rival
        instruction += " " + _RIVAL.format(name=name, keywords=", ".join(other.keywords))
    excerpts = "\n".join(f"- {text}" for text in group.texts)
    return f"{instruction}\n\nKeywords: {', '.join(group.keywords)}\n\nExcerpts:\n{excerpts}"


def title_of(answer: str) -> str | None:
    """The title in a model's answer: its first line without preamble, quotes and full stop."""
    lines = clean_answer(spoken_part(answer) or "").splitlines()
    first = next((line.strip() for line in lines if line.strip()), "")
    if not first or REFUSAL.match(first):
        return None
    title = re.sub(r"^\W*(title|name)\W*:\s*", "", first, flags=re.IGNORECASE)
    title = clean_answer(title.strip("*#-_ ")).rstrip(".").strip()
    if not any(character.isalpha() for character in title):
        return None
    if len(title) <= _LONGEST_NAME:
        return title
    return title[:_LONGEST_NAME].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"
