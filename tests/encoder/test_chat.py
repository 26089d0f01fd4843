"""Instruct LLMs that think before they answer: only the answer is taken."""

import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import scripted_model, tiny_adapter, tiny_model

from pipelines.encoder.answers import spoken_part
from pipelines.encoder.chat import ChatModel, load_writer
from pipelines.runtime.errors import InputError

SAYS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
KNOWS = SAYS + (
    "{% if enable_thinking is defined and not enable_thinking %}[plain]{% else %}[deep]{% endif %}"
)
STRICT = (
    "{% if enable_thinking is not defined or enable_thinking %}"
    "{{ raise_exception('set enable_thinking=False') }}{% endif %}" + SAYS + "[plain]"
)
THOUGHT = ["<think>", "They want", " a title.", "</think>"]
ANSWER = ["\n\n", "Court", " rulings"]
SCRIPTS = {
    "[plain]": ANSWER,
    "[deep]": [*THOUGHT, *ANSWER],
}


@pytest.mark.parametrize(
    ("answer", "spoken"),
    [
        ("Late goals", "Late goals"),
        ("They want a title.\n</think>\n\nLate goals", "\n\nLate goals"),
        ("<think>\n\n</think>Late goals", "Late goals"),
        ("[THINK]so[/THINK]Late goals", "Late goals"),
        ("<|channel|>analysis<|message|>so<|end|><|channel|>final<|message|>Late", "Late"),
        ("<think>They want a title, so", None),
        ("<think>so</think>\n", None),
        ("<think>a</think>b<think>c", "b"),
        ("", ""),
    ],
)
def test_only_what_follows_the_thought_is_spoken(answer, spoken):
    assert spoken_part(answer) == spoken


@pytest.mark.parametrize("template", [KNOWS, STRICT, SAYS + "[deep]", SAYS + "[plain]"])
def test_a_model_is_told_not_to_think_and_its_thoughts_are_cut(tmp_path, template):
    chat = ChatModel(str(scripted_model(tmp_path, SCRIPTS, template)))
    answers = chat.ask(["What is it?", "And that, which is longer?"], most_tokens=12)
    assert [answer.strip() for answer in answers] == ["Court rulings"] * 2


def test_an_answer_that_is_all_reasoning_is_none(tmp_path):
    chat = ChatModel(str(scripted_model(tmp_path, SCRIPTS, SAYS + "[deep]")))
    assert chat.ask(["What is it?"], most_tokens=3) == [None]


def test_a_thought_that_the_template_opens_is_cut_too(tmp_path):
    scripts = {"<think>": ["hm,", " what", "</think>", *ANSWER]}
    chat = ChatModel(str(scripted_model(tmp_path, scripts, SAYS + "[says]<think>")))
    assert chat.ask(["What is it?"], most_tokens=12) == ["\n\nCourt rulings"]
    assert chat.ask(["What is it?"], most_tokens=2) == [None]


def test_a_template_that_refuses_is_one_line(tmp_path):
    refuses = "{{ raise_exception('tools only') }}"
    chat = ChatModel(str(scripted_model(tmp_path, SCRIPTS, refuses)))
    with pytest.raises(InputError, match="refuses a plain question: tools only"):
        chat.ask(["What is it?"], most_tokens=3)


def test_a_merged_writer_beside_its_adapter_is_not_adapted_twice(tmp_path):
    folder = tiny_model(tmp_path)
    before, _ = load_writer(str(folder), transformers.AutoModelForCausalLM)
    tiny_adapter(folder, folder)
    after, _ = load_writer(str(folder), transformers.AutoModelForCausalLM)
    ids = torch.tensor([[4, 5, 6]], device=before.device)
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_a_model_that_would_write_at_random_is_refused(tmp_path):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=2)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack lm_head\.weight, without which .* at random"):
        load_writer(str(folder), transformers.AutoModelForCausalLM)
