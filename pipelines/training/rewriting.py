"""Texts to texts of the same meaning, written by a model: paraphrases and back-translations.

No Ray here. What a model writes is checked before it becomes a training pair: a small model
refuses, repeats, answers in another language or says nothing, and each of these is counted.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from pipelines.encoder.answers import REFUSAL
from pipelines.encoder.chat import ChatModel, load_writer
from pipelines.training.config import PairsConfig

_LEAST_CERTAINTY = 0.9
_JUDGED_CHARACTERS = 4000


def guess_language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, or None where it is not certain.

    The detector has an answer for everything, an empty text among them; with less than this
    certainty it is none. Of 2,000 posts of 20 Newsgroups cut to 6, 12, 20 and 60 words none was
    then taken for another language than English.
    """
    code, certainty = _detector().classify(text[:_JUDGED_CHARACTERS])
    return code if certainty >= _LEAST_CERTAINTY else None


@functools.cache
def _detector() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def is_other_language(text: str, answer: str) -> bool:
    """Whether both have a language and it is not the same."""
    before, after = guess_language(text), guess_language(answer)
    return before is not None and after is not None and before != after


INSTRUCTIONS = {
    "reword": "Say the following text in other words. Keep its meaning.",
    "shorten": "Say what the following text says in about half as many words.",
    "simplify": "Rewrite the following text in plain words that a child understands.",
    "formal": "Rewrite the following text in a formal style.",
    "casual": "Rewrite the following text as you would tell it to a friend.",
}
_SAME_LANGUAGE = "Answer in the language of the text, with the rewritten text only."

_SHORTEST_SHARE = 0.1
_COPIED_SHARE = 0.9


class Rewriter:
    """Loaded models that rewrite texts."""

    def __init__(self, config: PairsConfig) -> None:
        """Raises :class:`InputError` for models that do not do what the method needs."""
        self.config = config
        if config.method == "paraphrase":
            self._chat = ChatModel(config.model)
        else:
            names = (config.model, config.back_model or config.model)
            kind = transformers.AutoModelForSeq2SeqLM
            self._translators = [load_writer(name, kind) for name in names]

    def rewrite(self, texts: Sequence[str], salt: str) -> list[str | None]:
        """One new text a text, unchecked, None for reasoning without an answer.

        The same texts and ``salt`` give the same answers.
        """
        seed = hashlib.sha256(f"{self.config.seed} {salt}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:7], "little"))
        results: list[str | None] = []
        for start in range(0, len(texts), self.config.batch_texts):
            batch = list(texts[start : start + self.config.batch_texts])
            if self.config.method == "paraphrase":
                results += self._paraphrase(batch, start)
            else:
                for model, tokenizer in self._translators:
                    batch = self._translate(batch, model, tokenizer)
                results += batch
        return results

    def _paraphrase(self, texts: list[str], offset: int) -> list[str | None]:
        kinds = list(INSTRUCTIONS.values())
        most = self.config.most_tokens
        questions = [
            f"{kinds[(offset + place) % len(kinds)]} {_SAME_LANGUAGE}\n\n"
            f"{self._chat.cut(text, most)}"
            for place, text in enumerate(texts)
        ]
        return self._chat.ask(questions, most_tokens=most, temperature=0.7, top_p=0.9)

    @torch.inference_mode()
    def _translate(self, texts: list[str], model: Any, tokenizer: Any) -> list[str]:
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True,
            max_length=self.config.most_tokens,
        ).to(model.device)  # fmt: skip
        written = model.generate(**inputs, max_new_tokens=self.config.most_tokens, num_beams=1)
        return tokenizer.batch_decode(written, skip_special_tokens=True)


ALL_REASONING = "reasoning without an answer"


def fault_of(text: str, answer: str) -> str | None:
    """Why ``answer`` is no rewriting of ``text``, or None: the reasons are few and countable."""
    if not any(character.isalnum() for character in answer):
        return "empty answer"
    if REFUSAL.match(answer):
        return "refusal"
    if main_script(answer) != main_script(text):
        return "another script"
    if is_other_language(text, answer):
        return "another language"
    if len(answer) < _SHORTEST_SHARE * min(len(text), 400):
        return "too short"
    before, after = (re.findall(r"\w+", side.lower()) for side in (text, answer))
    if after == before or _shared_run(before, after) >= _COPIED_SHARE:
        return "copy"
    return None


def main_script(text: str) -> str:
    """The script of most letters of a text, such as LATIN, or an empty string."""
    scripts = Counter(
        unicodedata.name(character, "").split(" ")[0]
        for character in text[:2000]
        if character.isalpha()
    )
    merged = Counter({k: v for k, v in scripts.items() if k not in ("HIRAGANA", "KATAKANA")})
    merged["CJK"] += scripts["HIRAGANA"] + scripts["KATAKANA"]
    return merged.most_common(1)[0][0] if scripts else ""


def _shared_run(before: Sequence[str], after: Sequence[str]) -> float:
    """Share of an answer's three-word runs that stand in the text word for word."""
    runs = [tuple(after[i : i + 3]) for i in range(len(after) - 2)]
    known = {tuple(before[i : i + 3]) for i in range(len(before) - 2)}
    return sum(run in known for run in runs) / len(runs) if runs else 0.0
