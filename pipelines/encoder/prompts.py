"""Prompt templates: what is written around a text before a decoder reads it.

A decoder's last token has seen everything before it, so words after the text decide what that
token is about to say: the text's topic in one word, its cluster, its class. The wordings follow
Jiang et al. 2023 (arXiv:2307.16645, one word), Zhang et al. 2024 (arXiv:2404.03921, step by step
and knowledge) and arXiv:2507.22729 (clustering); ``topic`` is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.runtime.errors import InputError

PLACEHOLDER = "{text}"

PROMPTS = {
    "none": "{text}",
    "one-word": 'This sentence: "{text}" means in one word:"',
    "topic": 'Document: "{text}" This document is about the general topic of',
    "cluster": 'This sentence: "{text}" belongs to the following cluster:',
    "cluster-the-text": "Cluster the text: {text}",
    "summary": 'This sentence: "{text}" can be summarized as',
    "chain-of-thought": (
        'After thinking step by step, this sentence: "{text}" means in one word:"'
    ),
    "knowledge": (
        "The essence of a sentence is often captured by its main subjects and actions, while "
        "descriptive terms provide additional but less central details. With this in mind, this "
        'sentence: "{text}" means in one word:"'
    ),
    "classification": 'This sentence: "{text}" can be classified as:',
    "question": 'Which cluster would you assign the sentence: "{text}" to?',
    "emotion": (
        'Classify the emotion expressed in the given Twitter "{text}" into one of the six '
        "emotions: anger, fear, joy, love, sadness, and surprise"
    ),
}


@dataclass(frozen=True)
class PromptTemplate:
    """The words before and after a text; both may be empty."""

    prefix: str
    suffix: str

    @classmethod
    def parse(cls, prompt: str) -> PromptTemplate:
        """A template from one of the names in :data:`PROMPTS`, or from text with ``{text}``.

        ``{text}`` must occur once; every other brace stands for itself. Raises
        :class:`InputError` for anything else.
        """
        template = PROMPTS.get(prompt, prompt)
        if template.count(PLACEHOLDER) != 1:
            raise InputError(
                f"prompt {prompt!r} is no name ({', '.join(PROMPTS)}) and does not hold "
                f"{PLACEHOLDER} exactly once: give a name, or a template such as "
                f"'Topic of {PLACEHOLDER}:'"
            )
        prefix, _, suffix = template.partition(PLACEHOLDER)
        return cls(prefix, suffix)

    def wrap(self, text: str) -> str:
        """The prompt with ``text`` in its place."""
        return f"{self.prefix}{text}{self.suffix}"

    def __str__(self) -> str:
        return self.wrap(PLACEHOLDER)
