"""Texts become token ids: prompt prefix, body cut to its limit, prompt suffix.

The three are tokenized apart and joined as ids. A text, however long, can therefore not push out
the suffix, on which the last token's meaning rests, and what is cut is always the body's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.encoder.description import (
    DEFAULT_PROMPT,
    EncoderConfig,
    EncoderDescription,
)
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.sources import fetch_model
from pipelines.runtime.errors import InputError

# Merges of the last characters may differ between a text and its beginning. They reach back a
# token or two; beyond this many tokens a cut beginning reads like the whole text.
_UNSETTLED_TOKENS = 16
_GUESSED_CHARACTERS_PER_TOKEN = 8
# A normaliser may compose several characters into one (Hangul syllables: three).
_COMPOSED_CHARACTERS = 4


@dataclass(frozen=True)
class PromptedTokenizer:
    """Token ids of prompted texts, as one model wants them.

    ``head`` and ``tail`` are what surrounds every body: the tokenizer's own opening token and the
    prompt's prefix; the prompt's suffix, the tokenizer's own closing token and, where asked for,
    the end-of-sequence token. ``lead`` is the space between prefix and text, if there is one: as
    in ordinary writing it belongs to the text's first word.
    """

    tokenizer: Any
    head: tuple[int, ...]
    tail: tuple[int, ...]
    lead: str
    max_tokens: int
    longest_token_characters: int

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        template: PromptTemplate,
        *,
        max_tokens: int,
        append_eos: bool = False,
        trust_remote_code: bool = False,
    ) -> PromptedTokenizer:
        """The tokenizer in a model's folder with a prompt; bodies are cut to ``max_tokens``.

        Raises :class:`InputError` where the tokenizer has no end-of-sequence token to append.
        """
        import transformers  # slow, and a job's --help does not need it

        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        opening, closing = special_tokens_around(tokenizer)
        if append_eos:
            if tokenizer.eos_token_id is None:
                raise InputError("append_eos: this model's tokenizer has no end-of-sequence token")
            if closing[-1:] != [tokenizer.eos_token_id]:
                closing = [*closing, tokenizer.eos_token_id]
        words = template.prefix.rstrip(" ")
        lead = template.prefix[len(words) :]
        if lead and puts_a_space_before(tokenizer):
            lead = lead[1:]
        prefix, suffix = (
            tokenizer.encode(part, add_special_tokens=False) if part else []
            for part in (words, template.suffix)
        )
        return cls(
            tokenizer=tokenizer,
            head=(*opening, *prefix),
            tail=(*suffix, *closing),
            lead=lead,
            max_tokens=max_tokens,
            longest_token_characters=max(map(len, tokenizer.get_vocab())),
        )

    @classmethod
    def load(cls, encoder: EncoderConfig | EncoderDescription) -> PromptedTokenizer:
        """The tokenizer of an encoder; fetches its model's files, loads no weights."""
        revision = encoder.revision if isinstance(encoder, EncoderConfig) else encoder.commit
        return cls.from_folder(
            fetch_model(encoder.model, revision).folder,
            PromptTemplate.parse(encoder.prompt or DEFAULT_PROMPT),
            max_tokens=encoder.max_tokens,
            append_eos=encoder.append_eos,
            trust_remote_code=encoder.trust_remote_code,
        )

    @property
    def prefix_tokens(self) -> int:
        """Tokens of every text before its body."""
        return len(self.head)

    @property
    def suffix_tokens(self) -> int:
        """Tokens of every text after its body."""
        return len(self.tail)

    @property
    def clip_characters(self) -> int:
        """Characters beyond which no text can have an influence on its tokens."""
        tokens = self.max_tokens + _UNSETTLED_TOKENS
        return tokens * self.longest_token_characters * _COMPOSED_CHARACTERS

    def clip(self, text: str) -> str:
        """The beginning of ``text`` that decides its tokens; costs no tokenization.

        ``tokenize([clip(text)])`` equals ``tokenize([text])``, and clipping twice changes
        nothing.
        """
        return text[: self.clip_characters]

    def check_text(self, text: str) -> str | None:
        """Why ``text`` can have no vector, or None. The one reason is that it has no token."""
        if text.strip() or self.head or self.tail or self.tokenize([text])[0]:
            return None
        return "no tokens: the text is empty and the prompt adds none"

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text: head, the body's first ``max_tokens``, tail.

        Characters outside Unicode (lone surrogates, from broken decoding) count as U+FFFD.
        Control tokens spelled out in a text are read as plain characters: a document cannot end
        itself or open a chat turn. A text costs no more than about ``max_tokens`` tokens, however
        long it is.
        """
        texts = [self.clip(text) for text in texts]
        bodies: list[list[int]] = [[] for _ in texts]
        pending = [index for index, text in enumerate(texts) if text]
        characters = self.max_tokens * _GUESSED_CHARACTERS_PER_TOKEN
        while pending:
            beginnings = [self.lead + valid_unicode(texts[index][:characters]) for index in pending]
            unsettled = []
            for index, ids in zip(pending, self._encode(beginnings), strict=True):
                whole = len(texts[index]) <= characters
                if whole or len(ids) >= self.max_tokens + _UNSETTLED_TOKENS:
                    bodies[index] = ids[: self.max_tokens]
                else:
                    unsettled.append(index)
            pending = unsettled
            characters *= 4
        return [[*self.head, *body, *self.tail] for body in bodies]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer itself puts before and after a text."""
    probe = "a"
    bare = tokenizer.encode(probe, add_special_tokens=False)
    full = tokenizer.encode(probe, add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InputError("this model's tokenizer changes a text when it adds its special tokens")


def puts_a_space_before(tokenizer: Any) -> bool:
    """Whether a tokenizer, as many SentencePiece ones, reads a text as if a space preceded it."""
    bare, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
    return bare == spaced or spaced[-len(bare) :] == bare


def valid_unicode(text: str) -> str:
    """``text`` with each lone surrogate replaced by U+FFFD and each pair joined."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
