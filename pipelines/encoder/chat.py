"""Instruct LLMs that are asked, and what they answer once their reasoning is cut off.

Used for names of groups and for paraphrases. A model that thinks before it answers is told not to
where its chat template can say so; of what it writes, only what follows the thought is an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers

from pipelines.encoder.answers import opens_thought, spoken_part
from pipelines.encoder.checkpoint import (
    load_checked,
    quiet_loading,
    refuse_unread,
    without_adapter,
)
from pipelines.encoder.precision import resolve_device, resolve_dtype
from pipelines.encoder.quantized import made_plain, plain_options, quantization
from pipelines.encoder.sources import fetch_model, load_settings
from pipelines.encoder.tokenization import load_tokenizer
from pipelines.runtime.errors import InputError

# Templates know either name (Qwen, GLM and SmolLM the first, Granite and DeepSeek the second).
_NO_THINKING = {"enable_thinking": False, "thinking": False}


class ChatModel:
    """A loaded instruct LLM."""

    def __init__(self, name: str) -> None:
        """Raises :class:`InputError` for a model that follows no instructions."""
        self._name = name
        self._model, self._tokenizer = load_writer(name, transformers.AutoModelForCausalLM)
        _require_template(name, self._tokenizer)

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text, of ``tokens`` tokens at most."""
        ids = self._tokenizer(text[: 16 * tokens], add_special_tokens=False)["input_ids"]
        return self._tokenizer.decode(ids[:tokens])

    @torch.inference_mode()
    def ask(
        self, questions: Sequence[str], *, most_tokens: int, **sampling: Any
    ) -> list[str | None]:
        """An answer to each question, None where the model wrote nothing but its reasoning.

        Args:
            questions: answered together, each without the others.
            most_tokens: of an answer, its reasoning included.
            sampling: ``temperature``, ``top_p``; greedy without.
        """
        prompts = [self._prompt(question) for question in questions]
        inputs = self._tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self._model.device)
        options = {"temperature": None, "top_p": None, "top_k": None} | sampling
        written = self._model.generate(
            **inputs,
            max_new_tokens=most_tokens,
            do_sample=bool(sampling),
            pad_token_id=self._tokenizer.pad_token_id,
            **options,
        )
        raw = self._tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :])
        return [self._answer(prompt, answer) for prompt, answer in zip(prompts, raw, strict=True)]

    def _prompt(self, question: str) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                tokenize=False,
                add_generation_prompt=True,
                **_NO_THINKING,
            )
        except jinja2.TemplateError as error:
            raise InputError(
                f"the chat template of {self._name} refuses a plain question: {error}; "
                "use another model"
            ) from error

    def _answer(self, prompt: str, raw: str) -> str | None:
        """What a model wrote after its reasoning, which the prompt may have opened already."""
        answer = spoken_part(f"<think>{raw}" if opens_thought(prompt) else raw)
        if answer is None:
            return None
        for token in self._tokenizer.all_special_tokens:
            answer = answer.replace(token, "")
        return answer


def require_instructed(name: str) -> None:
    """Raise :class:`InputError` for a model that follows no instructions; no weights are loaded."""
    _require_template(name, _find_writer(name, transformers.AutoModelForCausalLM)[1])


def _require_template(name: str, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise InputError(
            f"{name} has no chat template: needed is a model that follows instructions, such as "
            "one whose name ends in -Instruct"
        )


def load_writer(name: str, kind: Any) -> tuple[Any, Any]:
    """A model that writes, in evaluation mode, and its tokenizer.

    Args:
        name: as :func:`pipelines.encoder.sources.fetch_model` takes it.
        kind: ``AutoModelForCausalLM`` or ``AutoModelForSeq2SeqLM`` of transformers.

    Raises:
        InputError: a model of another kind, and one that cannot be loaded whole.
    """
    folder, tokenizer = _find_writer(name, kind)
    device = resolve_device("auto")
    dtype, method = getattr(torch, resolve_dtype("auto", str(device))), quantization(folder)
    options = {"dtype": dtype, **plain_options(method)}
    with quiet_loading(), without_adapter(folder) as plain:
        model, missing, unread = load_checked(kind, plain, folder, options, False)
    if missing:
        raise InputError(
            f"the weights in {folder} lack {min(missing)}, without which {name} writes at random: "
            "fetch the model again"
        )
    if kind is transformers.AutoModelForCausalLM:
        refuse_unread(model.base_model, unread, folder)
    model = made_plain(model, method, dtype)
    return model.eval().to(device), tokenizer


def _find_writer(name: str, kind: Any) -> tuple[Path, Any]:
    """The folder of a model of that kind, and its tokenizer, which pads on the left."""
    folder = fetch_model(name).folder
    writes = kind is transformers.AutoModelForCausalLM
    known = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if writes
        else transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    )
    settings = load_settings(folder)
    if type(settings) not in known or settings.is_encoder_decoder == writes:
        wanted = "a decoder-only LLM" if writes else "a seq2seq translation model"
        raise InputError(f"{name} is not {wanted}, which is needed here")
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return folder, tokenizer
