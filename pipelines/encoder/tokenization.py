"""Texts become token ids: prompt prefix, body cut to its limit, prompt suffix.

A text, however long, cannot push out the suffix, on which the last token's meaning rests: the
suffix is tokenized apart, and what is cut is always the body's end. Prefix and body are read as
one string, as the model was trained; only where a suffix touches a quoted text (``"{text}"``) they
are apart too, so that the quotes of all texts are the same tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.encoder.description import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_PROMPT,
    EncoderConfig,
    EncoderDescription,
)
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.remembered import remember
from pipelines.encoder.sentencepiece import FILE_NAME, read_sentencepiece
from pipelines.encoder.sources import fetch_model
from pipelines.encoder.tokenizer_file import keep_rules, require_vocabulary
from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

# Merges of the last characters may differ between a text and its beginning. They reach back a
# token or two; beyond this many tokens a cut beginning reads like the whole text. A WordPiece takes
# a word that is too long for one unknown token, and its beginning for as many as it has characters.
_UNSETTLED_TOKENS = 16
_GUESSED_CHARACTERS_PER_TOKEN = 8
# A normaliser may compose several characters into one (Hangul syllables: three).
_COMPOSED_CHARACTERS = 4
# Of a text whose characters need not be tokens: runs of spaces, marks that are dropped, words that
# are too long to be known.
_READ_CHARACTERS = 1 << 20
_RUN_CHARACTERS = 4096
# Ordinary texts, which tell whether version 1 read a prompt in the same way.
_PROBES = ("a", "The word")
# What was not read as it should be before a version of this tokenization.
_LOST = {
    2: "the space between its prompt and a text was lost",
    3: "texts were split by other rules than those of its tokenizer.json",
}


@dataclass(frozen=True)
class PromptedTokenizer:
    """Token ids of prompted texts, as one model wants them.

    ``head`` and ``tail`` are what surrounds bodies: the tokenizer's own opening token and the
    prompt's prefix; the prompt's suffix, the tokenizer's own closing token and, where asked for,
    the end-of-sequence token. Bodies are read together with ``lead``, the end of the prefix, whose
    tokens come after the first ``apart`` ones of the head.
    """

    tokenizer: Any
    head: tuple[int, ...]
    tail: tuple[int, ...]
    lead: str
    apart: int
    max_tokens: int
    longest_token_characters: int
    skips: bool = False
    """Some characters, or what follows them in a row, make no token."""
    lower_case: bool = False
    unsettled: int = _UNSETTLED_TOKENS
    """Tokens at the end of a cut text that those of the whole text may not have."""
    joined: bool = False
    """The prompt's last words must be read together with a text."""
    version: int = 1
    """2 where version 1 of this tokenization gave other tokens to an ordinary text, 3 where both
    read texts by other rules than the tokenizer's file has."""
    prompt_tokens: int = 0
    """Tokens of the bare prefix with the tokenizer's opening ones; 0 where there is no prefix."""

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        template: PromptTemplate,
        *,
        max_tokens: int,
        append_eos: bool = False,
        lower_case: bool = False,
        trust_remote_code: bool = False,
    ) -> PromptedTokenizer:
        """The tokenizer in a model's folder with a prompt; bodies are cut to ``max_tokens``.

        Raises :class:`InputError` where the tokenizer cannot be read, and where it has no
        end-of-sequence token to append.
        """
        tokenizer, rules_are_other = read_tokenizer(folder, trust_remote_code)
        opening, closing = special_tokens_around(tokenizer)
        if append_eos:
            if tokenizer.eos_token_id is None:
                raise InputError("append_eos: this model's tokenizer has no end-of-sequence token")
            if closing[-1:] != [tokenizer.eos_token_id]:
                closing = [*closing, tokenizer.eos_token_id]
        prefix, suffix = template.prefix, template.suffix
        if lower_case:
            prefix, suffix = prefix.lower(), suffix.lower()
        controls = [prefix.rfind(t) + len(t) for t in tokenizer.all_special_tokens if t in prefix]
        start = max([0, *controls])
        if suffix and not prefix[-1:].isspace():
            start = len(prefix)
        fixed = encode(tokenizer, prefix[:start])
        lead = prefix[start:]
        words = encode(tokenizer, lead.rstrip(" "))
        joined = any(
            read_apart(tokenizer, prefix, text) != [*fixed, *encode(tokenizer, lead + text)]
            for text in _PROBES
        )
        longest = max(map(len, tokenizer.get_vocab()))
        return cls(
            tokenizer=tokenizer,
            head=(*opening, *fixed, *words),
            tail=(*encode(tokenizer, suffix), *closing),
            lead=lead,
            apart=len(opening) + len(fixed),
            max_tokens=max_tokens,
            longest_token_characters=longest,
            skips=skips_characters(tokenizer, longest),
            lower_case=lower_case,
            unsettled=max(_UNSETTLED_TOKENS, longest_word(tokenizer)),
            joined=joined,
            version=3 if rules_are_other else 1 + joined,
            prompt_tokens=len(opening) + len(encode(tokenizer, prefix)) if prefix else 0,
        )

    @classmethod
    def load(cls, encoder: EncoderConfig | EncoderDescription) -> PromptedTokenizer:
        """The tokenizer of an encoder; fetches its model's files, loads no weights.

        Raises :class:`InputError` for a description whose tokens are not made any more.
        """
        if isinstance(encoder, EncoderDescription):
            encoder.require_model()
            commit, lower_case, version = encoder.commit, encoder.lower_case, encoder.tokenization
        else:
            commit, lower_case, version = encoder.revision, False, None
        made = cls.from_folder(
            fetch_model(encoder.model, commit).folder,
            PromptTemplate.parse(encoder.prompt or DEFAULT_PROMPT),
            max_tokens=encoder.max_tokens or DEFAULT_MAX_TOKENS,
            append_eos=encoder.append_eos,
            lower_case=lower_case,
            trust_remote_code=encoder.trust_remote_code,
        )
        if version is not None and made.version > version:
            raise InputError(
                f"this encoder was described when {_LOST[made.version]}: "
                "such vectors are not made any more; describe it anew and embed again"
            )
        return made

    def limited(self, max_tokens: int) -> PromptedTokenizer:
        """The same with another limit of a body's tokens."""
        return replace(self, max_tokens=max_tokens)

    @property
    def prefix_tokens(self) -> int:
        """Tokens of every text before its body."""
        return len(self.head)

    @property
    def suffix_tokens(self) -> int:
        """Tokens of every text after its body."""
        return len(self.tail)

    @property
    def most_tokens(self) -> int:
        """Tokens that a text can have at most, prompt and special tokens included."""
        return self.prefix_tokens + self.max_tokens + self.suffix_tokens

    @property
    def clip_characters(self) -> int:
        """Characters beyond which no text has an influence on its tokens.

        Where characters make no token, as spaces of a WordPiece do, it is about a million.
        """
        tokens = self.max_tokens + self.unsettled
        characters = tokens * self.longest_token_characters * _COMPOSED_CHARACTERS
        return max(characters, _READ_CHARACTERS) if self.skips else characters

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
        opening, limit = list(self.head[: self.apart]), len(self.head) - self.apart
        limit += self.max_tokens
        bodies = [list(self.head[self.apart :]) for _ in texts]
        pending = [index for index, text in enumerate(texts) if text]
        characters = self.max_tokens * _GUESSED_CHARACTERS_PER_TOKEN
        while pending:
            beginnings = [self.lead + self._readable(texts[i][:characters]) for i in pending]
            unsettled = []
            for index, ids in zip(pending, self._encode(beginnings), strict=True):
                whole = len(texts[index]) <= characters
                if whole or len(ids) >= limit + self.unsettled:
                    bodies[index] = ids[:limit]
                else:
                    unsettled.append(index)
            pending = unsettled
            characters *= 4
        return [[*opening, *body, *self.tail] for body in bodies]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text's body, of any length, without prompt and special tokens."""
        ids = self._encode([self.lead + self._readable(text) for text in texts])
        return [len(some) - (len(self.head) - self.apart) for some in ids]

    def offsets(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Where the body's tokens are in each text, int64 (t, 2): start and stop in characters.

        Raises :class:`InputError` for a tokenizer that cannot tell.
        """
        if not self.tokenizer.is_fast:
            raise InputError(
                "passages need a tokenizer that tells where its tokens are: save this model's as "
                "tokenizer.json"
            )
        if not texts:
            return []
        found = self._tokenize(
            [self.lead + self._readable(text) for text in texts], return_offsets_mapping=True
        )["offset_mapping"]
        words = len(self.lead.rstrip(" "))
        places = (np.array(some, np.int64).reshape(-1, 2) for some in found)
        places = (np.maximum(some[some[:, 1] > words] - len(self.lead), 0) for some in places)
        return [self._in_original(text, some) for text, some in zip(texts, places, strict=True)]

    def _in_original(self, text: str, places: np.ndarray) -> np.ndarray:
        """Places in what is read of a text as places in the text."""
        if not self.lower_case or len(text.lower()) == len(text):
            return places
        origin = np.repeat(np.arange(len(text)), [len(mark.lower()) for mark in text])
        first = origin[np.minimum(places[:, 0], len(origin) - 1)]
        last = origin[np.clip(places[:, 1] - 1, 0, len(origin) - 1)] + 1
        return np.stack([first, np.maximum(first, last)], axis=1)

    def _readable(self, text: str) -> str:
        text = valid_unicode(text)
        return text.lower() if self.lower_case else text

    def _encode(self, texts: list[str]) -> list[list[int]]:
        backend = plain_backend(self.tokenizer)
        if backend is None:
            return self._tokenize(texts)["input_ids"] if texts else []
        return [text.ids for text in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _tokenize(self, texts: list[str], **wanted: bool) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **wanted,
        )


def plain_backend(tokenizer: Any) -> Any | None:
    """What reads texts in a fast tokenizer, set to give all their tokens and no control tokens.

    Short texts take half of the time without transformers' wrapper, whose loop over texts keeps
    Python's lock from other threads. None where the wrapper's class does more than to call it.
    """
    from transformers import PreTrainedTokenizerFast as Stock

    kind = type(tokenizer)
    is_stock = issubclass(kind, Stock) and kind.__call__ is Stock.__call__
    if not is_stock or kind._encode_plus is not Stock._encode_plus:
        return None
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    return backend


def text_limits(encoder: EncoderDescription) -> tuple[int, int]:
    """Characters of a text that can decide its tokens, and tokens that are around every text.

    What :attr:`PromptedTokenizer.clip_characters` and the prompt's lengths are, without a
    tokenizer where they are remembered.
    """

    def limits() -> list[int]:
        made = PromptedTokenizer.load(encoder)
        return [made.clip_characters, made.prefix_tokens + made.suffix_tokens]

    code_runs = encoder.trust_remote_code
    found = limits() if code_runs else remember("limits", encoder.to_json(), limits)
    return found[0], found[1]


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder; :class:`InputError` where it cannot be read."""
    return read_tokenizer(folder, trust_remote_code)[0]


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> tuple[Any, bool]:
    """The tokenizer in a model's folder, by the rules of its file.

    Returns:
        The tokenizer, and whether transformers alone would read some texts by other rules.

    Raises:
        InputError: it cannot be read, or not without guessing.
    """
    import transformers  # slow, and a job's --help does not need it

    if (folder / FILE_NAME).is_file() and not (folder / "tokenizer.json").is_file():
        return read_sentencepiece(folder), False
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise InputError(
            f"the tokenizer in {folder} cannot be read "
            f"({(str(error) or type(error).__name__).strip().splitlines()[0][:200]}): save it as "
            "tokenizer.json, which a fast tokenizer's save_pretrained writes"
        ) from error
    other = keep_rules(tokenizer, folder)
    require_vocabulary(tokenizer, folder)
    if other:
        log.info(
            "%s: texts are split by the rules of tokenizer.json; %s, which its settings name, has "
            "others", folder, type(tokenizer).__name__,
        )  # fmt: skip
    return tokenizer, other


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of a prompt, whose control tokens are control tokens."""
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def skips_characters(tokenizer: Any, longest_token: int) -> bool:
    """Whether a tokenizer makes fewer tokens of a run of one character than its pieces allow."""
    runs = [mark * _RUN_CHARACTERS for mark in (" ", "\n", "x", "\u200b", "\ue000")]
    found = tokenizer(runs, add_special_tokens=False, verbose=False)["input_ids"]
    return any(len(ids) * longest_token < _RUN_CHARACTERS for ids in found)


def longest_word(tokenizer: Any) -> int:
    """Characters of the longest word that a WordPiece takes apart; 0 for other tokenizers."""
    model = tokenizer.backend_tokenizer.model if tokenizer.is_fast else tokenizer
    return int(getattr(model, "max_input_chars_per_word", 0))


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer itself puts before and after a text."""
    probe = "a"
    bare = tokenizer.encode(probe, add_special_tokens=False)
    full = tokenizer.encode(probe, add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InputError("this model's tokenizer changes a text when it adds its special tokens")


def read_apart(tokenizer: Any, prefix: str, text: str) -> list[int]:
    """Prefix and text as version 1 of this tokenization read them.

    It took a tokenizer that ends " a" as it ends "a", as byte-level ones do, for one that puts a
    space before every text by itself, and left the prompt's own space out.
    """
    words, lead = prefix.rstrip(" "), apart_lead(tokenizer, prefix)
    return [*encode(tokenizer, words), *encode(tokenizer, lead + text)]


def apart_lead(tokenizer: Any, prefix: str) -> str:
    """What a text that is read apart from a prefix must begin with, so that a space is between."""
    lead = prefix[len(prefix.rstrip(" ")) :]
    bare, spaced = encode(tokenizer, "a"), encode(tokenizer, " a")
    return lead[1:] if spaced[-len(bare) :] == bare else lead


def valid_unicode(text: str) -> str:
    """``text`` with each lone surrogate replaced by U+FFFD and each pair joined."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
