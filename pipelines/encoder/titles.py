"""Names for groups of documents, written by an instruct LLM from keywords and excerpts.

Greedy decoding, one question a group: a group's name does not depend on what stands beside it,
unless another of its level has that name already.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from pipelines.encoder.answers import REFUSAL, clean_answer, spoken_part
from pipelines.encoder.endpoint import ChatEndpoint
from pipelines.runtime.errors import InputError
from pipelines.runtime.machines import need_ray

log = logging.getLogger(__name__)

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
_LABEL = re.compile(
    r"^\W*(the |a )?(title|name)\b(\W*|( (of|for) [^:\"]{0,40})?( (is|could be))?\s*):\s*"
    r"|^(the |a )?(title|name) (of|for) [^:\"]{0,40} (is|could be)\s*(?=\")",
    re.IGNORECASE,
)


class Group(Protocol):
    """What is shown of one group."""

    @property
    def keywords(self) -> list[str]:
        """Words that set it apart."""

    @property
    def texts(self) -> list[str]:
        """Beginnings of its documents."""


class Chat(Protocol):
    """What is asked: an LLM of this machine, or one behind an address."""

    def answer(self, questions: Sequence[str]) -> list[str | None]:
        """An answer to each question, which does not depend on the others; None for none."""


@dataclass(frozen=True)
class TitleWriter:
    """An instruct LLM that names groups: on one worker, with a GPU if any, or at an endpoint."""

    model: str
    """As ``--model`` takes it, or as the endpoint calls it."""
    url: str | None = None
    """The endpoint; asked from this process, so that its key goes to no worker."""

    def check(self) -> None:
        """Raise :class:`InputError` where it cannot be asked; an endpoint answers a question."""
        if self.url is None:
            _on_worker(_require_instructed, self.model)
        else:
            ChatEndpoint(self.url, self.model)

    def name(
        self, levels: Sequence[Sequence[Group]], *, taken: Mapping[str, Group] | None = None
    ) -> list[list[str | None]]:
        """A name for each group of each level; None for those that got none.

        ``taken`` are names that none may get, with the groups that have them. An endpoint that
        fails is logged and is no error: what asks for names has its clusters already.
        """
        shown = [list(groups) for groups in levels]
        if self.url is None:
            return _on_worker(_name_by_model, self.model, shown, dict(taken or {}))
        try:
            chat = ChatEndpoint(self.url, self.model)
        except InputError as error:
            log.warning("no names: %s", error)
            return [[None] * len(groups) for groups in shown]
        return [name_groups(chat, groups, taken) for groups in shown]


def _on_worker(function: Callable[..., Any], *args: Any) -> Any:
    need_ray()
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    return ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(function).remote(*args))


def _require_instructed(model: str) -> None:
    from pipelines.encoder.chat import require_instructed  # torch: on the worker alone

    require_instructed(model)


def _name_by_model(
    model: str, levels: Sequence[Sequence[Group]], taken: Mapping[str, Group]
) -> list[list[str | None]]:
    chat = LocalChat(model)
    return [name_groups(chat, groups, taken) for groups in levels]


class LocalChat:
    """A loaded instruct LLM that answers one question at a time, greedily."""

    def __init__(self, model: str) -> None:
        """Raises :class:`InputError` for a model that follows no instructions."""
        from pipelines.encoder.chat import ChatModel  # torch: on the worker alone

        self._model = ChatModel(model)

    def answer(self, questions: Sequence[str]) -> list[str | None]:
        """An answer to each question; None where there is nothing but reasoning."""
        cut = [self._model.cut(question, _PROMPT_TOKENS) for question in questions]
        return [self._model.ask([text], most_tokens=_NAME_TOKENS)[0] for text in cut]


def name_groups(
    chat: Chat, groups: Sequence[Group], taken: Mapping[str, Group] | None = None
) -> list[str | None]:
    """A name for each group of one level, no two alike; None where there is no such title.

    A group whose title an earlier one has, or one of ``taken``, is asked for again, with that
    one's keywords.
    """
    owners = {name.casefold(): group for name, group in (taken or {}).items()}
    names: list[str | None] = []
    titles = _titles(chat, [prompt_of(group) for group in groups])
    for group, title in zip(groups, titles, strict=True):
        if title and (rival := owners.get(title.casefold())):
            (title,) = _titles(chat, [prompt_of(group, rival=(title, rival))])
            if title and title.casefold() in owners:
                title = None
        if title:
            owners[title.casefold()] = group
        names.append(title)
    return names


def _titles(chat: Chat, questions: Sequence[str]) -> list[str | None]:
    return [None if text is None else title_of(text) for text in chat.answer(questions)]


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
    """The title in a model's answer: its first line without preamble, quotes and full stop.

    None where that is no title but a sentence (beyond 60 characters), its beginning, a heading or
    a refusal.
    """
    lines = clean_answer(spoken_part(answer) or "").splitlines()
    first = next((line.strip() for line in lines if line.strip()), "")
    if REFUSAL.match(first):
        return None
    title = clean_answer(_LABEL.sub("", first).strip("*#-_ ").rstrip(". ")).rstrip(". ")
    whole = len(title) <= _LONGEST_NAME and not title.endswith(":") and title.count('"') % 2 == 0
    return title if whole and any(character.isalpha() for character in title) else None
