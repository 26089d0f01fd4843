"""Names for groups of documents, written by an instruct LLM from keywords and excerpts.

Greedy decoding, one group at a time: the same group gets the same name whatever stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import ray
import torch
import transformers

from pipelines.encoder.precision import resolve_device, resolve_dtype
from pipelines.encoder.sources import fetch_model
from pipelines.runtime.errors import InputError

_INSTRUCTION = (
    "Below are keywords and excerpts of documents that belong to one group. Write a title of two "
    "to five words that says what they have in common. Answer with the title only, in the language "
    "of the documents."
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
        self._model, self._tokenizer = load_model(model, "paraphrase")

    def name(self, groups: Sequence[Group]) -> list[str | None]:
        """A name for each group, or None where the answer is no title."""
        return [title_of(self._answer(prompt_of(group))) for group in groups]

    @torch.inference_mode()
    def _answer(self, question: str) -> str:
        tokenizer: Any = self._tokenizer
        ids = tokenizer(question, add_special_tokens=False)["input_ids"][:_PROMPT_TOKENS]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": tokenizer.decode(ids)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(self._model.device)
        written = self._model.generate(
            **inputs,
            max_new_tokens=_NAME_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        return tokenizer.decode(
            written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )


def name_groups(model: str, groups: Sequence[Group]) -> list[str | None]:
    """A name for each group, by ``model`` on one worker of the Ray cluster (with a GPU if any)."""
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    return ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(_name).remote(model, list(groups)))


def _name(model: str, groups: Sequence[Group]) -> list[str | None]:
    return GroupNamer(model).name(groups)


def prompt_of(group: Group) -> str:
    """The question that a model is asked about a group."""
    excerpts = "\n".join(f"- {text}" for text in group.texts)
    return f"{_INSTRUCTION}\n\nKeywords: {', '.join(group.keywords)}\n\nExcerpts:\n{excerpts}"


def title_of(answer: str) -> str | None:
    """The title in a model's answer: its first line without preamble, quotes and full stop."""
    lines = [line.strip() for line in clean_answer(answer).splitlines() if line.strip()]
    if not lines or REFUSAL.match(lines[0]):
        return None
    title = re.sub(r"^\W*(title|name)\W*:\s*", "", lines[0], flags=re.IGNORECASE)
    title = clean_answer(title.strip("*#-_ ")).rstrip(".").strip()
    if not any(character.isalpha() for character in title):
        return None
    if len(title) <= _LONGEST_NAME:
        return title
    return title[:_LONGEST_NAME].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"


REFUSAL = re.compile(
    r"^\W*(i('m| am)? (sorry|afraid|unable)|i (can(no|')t|won't)|as an? (ai|language model)"
    r"|unfortunately,? i|it is not (possible|appropriate))",
    re.IGNORECASE,
)


_PREAMBLE = re.compile(
    r"^\s*(sure|certainly|of course|here('s| is)|the rewritten text|rewritten( text)?)"
    r"[^:\n]{0,80}:\s*",
    re.IGNORECASE,
)


def load_model(name: str, method: str) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer: an instruct LLM, or for backtranslate seq2seq.

    Raises :class:`InputError` for a model of another kind.
    """
    folder = fetch_model(name).folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, padding_side="left", trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = resolve_device("auto")
    chat = method == "paraphrase"
    if chat and not tokenizer.chat_template:
        raise InputError(
            f"{name} has no chat template: needed is a model that follows instructions, such as "
            "one whose name ends in -Instruct"
        )
    kind = transformers.AutoModelForCausalLM if chat else transformers.AutoModelForSeq2SeqLM
    try:
        model = kind.from_pretrained(
            folder,
            dtype=getattr(torch, resolve_dtype("auto", str(device))),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except ValueError as error:
        wanted = "a decoder-only LLM" if chat else "a seq2seq translation model"
        raise InputError(f"{name} is not {wanted}, which is needed here") from error
    return model.eval().to(device), tokenizer


def clean_answer(answer: str) -> str:
    """An answer without the sentence that announces it and without quotes around it."""
    text = _PREAMBLE.sub("", answer).strip()
    if len(text) > 1 and text[0] in "\"'“«" and text[-1] in "\"'”»":
        text = text[1:-1].strip()
    return text
