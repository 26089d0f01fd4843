"""Texts to texts of the same meaning, written by a model: paraphrases and back-translations.

No Ray here. What a model writes is checked before it becomes a training pair: a small model
refuses, repeats, answers in another language or says nothing, and each of these is counted.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.encoder.precision import resolve_device
from pipelines.encoder.titles import REFUSAL, load_model

# ruff: noqa: RUF001


_SMALL_WORDS = {
    "English": "the of and to is that it was for are with his they this have from by not but what "
    "were when your which their will would there been who if do she you we he",
    "Spanish": "el los las del que una por con para es se lo como más pero sus este esta son fue "
    "muy todo cuando hay desde nos también hasta ser y",
    "French": "le les des une est pas pour que qui dans sur avec ce il elle sont nous vous au aux "
    "mais ou plus cette être fait ont leur et du",
    "German": "der die das und ist nicht ein eine zu den von mit sich des auf für im dem auch als "
    "wie wird bei sind oder nach ich wir aber hat",
    "Italian": "il gli della che non una per con sono è alla nel dei più anche come questo ha del "
    "le degli delle si ma era nella",
    "Portuguese": "os uma que não para com por mais dos como mas foi ele das tem seu sua ou ser "
    "quando muito há nos já está também pelo e é em da do na no ao",
    "Dutch": "het een van en dat die niet zijn op te met voor aan er maar om hem dan ook naar bij "
    "ze dit uit worden was wordt ik wij",
    "Swedish": "och att det som en är av för på med den till inte har om ett men var så från vi "
    "kan när nu eller han hon sig",
    "Polish": "nie się że jest na do jak ale po co tak za od przez być tym już tylko był jego oraz "
    "może dla są które w z",
    "Turkish": "ve bir bu için ile da de çok daha olan gibi olarak ama ne var en kadar sonra her "
    "değil ise ben sen",
    "Indonesian": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena "
    "ada mereka oleh adalah bisa atau",
    "Russian": "и в не на что он с как это по но они мы из у за то все так его её было был от же "
    "для я вы",
    "Ukrainian": "і в не на що він з як це по але вони ми із у за то все так його її було був від "
    "для я ви та є",
    "Bulgarian": "и в не на че той с как това по но те ние от за са е да се ще беше който като при",
}  # fmt: skip
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _SMALL_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)

_LEAST_SHARE = 0.12
_LEAST_LEAD = 1.5
_FEWEST_WORDS = 6


def guess_language(text: str) -> str | None:
    """The language's English name, or None where the text is too short or nothing stands out."""
    words = re.findall(r"[^\W\d_]+", text[:4000].lower())
    if len(words) < _FEWEST_WORDS:
        return None
    votes = Counter(language for word in words for language in _LANGUAGES_OF.get(word, ()))
    (first, most), (_, second) = [*votes.most_common(2), ("", 0), ("", 0)][:2]
    enough = most >= _LEAST_SHARE * len(words) and most >= _LEAST_LEAD * second
    return first if enough else None


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


@dataclass(frozen=True)
class RewriterSettings:
    """Which models write, and how much."""

    method: str
    """paraphrase or backtranslate."""
    model: str
    """Instruct LLM that paraphrases, or seq2seq model that translates."""
    back_model: str | None
    """Seq2seq model that translates back."""
    most_tokens: int
    """Tokens of a text that are read, and that are written at most."""
    batch_texts: int
    """Texts generated together."""
    seed: int
    """Decides instructions and sampling."""


class Rewriter:
    """Loaded models that rewrite texts."""

    def __init__(self, settings: RewriterSettings) -> None:
        self.settings = settings
        self.device = resolve_device("auto")
        names = [settings.model, *([settings.back_model] if settings.back_model else [])]
        self._models = [load_model(name, settings.method) for name in names]

    def rewrite(self, texts: Sequence[str], salt: str) -> list[str]:
        """One new text a text, unchecked. The same texts and ``salt`` give the same answers."""
        seed = hashlib.sha256(f"{self.settings.seed} {salt}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:7], "little"))
        results: list[str] = []
        for start in range(0, len(texts), self.settings.batch_texts):
            batch = list(texts[start : start + self.settings.batch_texts])
            if self.settings.method == "paraphrase":
                results += self._answer(batch, start)
            else:
                for model, tokenizer in self._models:
                    batch = self._translate(batch, model, tokenizer)
                results += batch
        return results

    @torch.inference_mode()
    def _answer(self, texts: list[str], offset: int) -> list[str]:
        model, tokenizer = self._models[0]
        kinds = list(INSTRUCTIONS.values())
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{kinds[(offset + place) % len(kinds)]} "
                  f"{_SAME_LANGUAGE}\n\n{self._cut(text, tokenizer)}"}],
                tokenize=False, add_generation_prompt=True,
            )
            for place, text in enumerate(texts)
        ]  # fmt: skip
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(self.device)
        written = model.generate(
            **inputs, max_new_tokens=self.settings.most_tokens, do_sample=True, temperature=0.7,
            top_p=0.9, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers = written[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(answers, skip_special_tokens=True)

    @torch.inference_mode()
    def _translate(self, texts: list[str], model: Any, tokenizer: Any) -> list[str]:
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True,
            max_length=self.settings.most_tokens,
        ).to(self.device)  # fmt: skip
        written = model.generate(**inputs, max_new_tokens=self.settings.most_tokens, num_beams=1)
        return tokenizer.batch_decode(written, skip_special_tokens=True)

    def _cut(self, text: str, tokenizer: Any) -> str:
        ids = tokenizer(text[: 16 * self.settings.most_tokens], add_special_tokens=False)
        return tokenizer.decode(ids["input_ids"][: self.settings.most_tokens])


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
