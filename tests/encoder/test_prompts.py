import pytest

from pipelines.encoder.prompts import PROMPTS, PromptTemplate
from pipelines.runtime.errors import InputError


@pytest.mark.parametrize("name", PROMPTS)
def test_every_named_prompt_holds_the_text_once(name):
    assert str(PromptTemplate.parse(name)).count("{text}") == 1


def test_the_one_word_prompt_asks_after_the_text():
    assert PromptTemplate.parse("one-word").wrap("A") == 'This sentence: "A" means in one word:"'


def test_a_template_may_hold_other_braces():
    template = PromptTemplate.parse("{lang}: {text} {}")
    assert (template.prefix, template.suffix) == ("{lang}: ", " {}")
    assert template.wrap("{text}") == "{lang}: {text} {}"


@pytest.mark.parametrize("prompt", ["one-wrod", "", "{text} and {text}", "{Text}"])
def test_a_template_without_one_place_for_the_text_is_refused(prompt):
    with pytest.raises(InputError, match="exactly once"):
        PromptTemplate.parse(prompt)
