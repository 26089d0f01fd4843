"""Names for groups: an LLM's answers become titles, or nothing."""

from types import SimpleNamespace

import pytest

from pipelines.encoder.titles import GroupNamer, prompt_of, title_of
from pipelines.runtime.errors import InputError


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ("Space shuttle launches", "Space shuttle launches"),
        ('"Used cars."\nBecause they talk about cars.', "Used cars"),
        ("Title: **Court rulings**", "Court rulings"),
        ("Sure, here is a title: Hockey games", "Hockey games"),
        ("体育新闻", "体育新闻"),
        ("I'm sorry, I cannot do that.", None),
        ("42!", None),
        ("", None),
        ("word " * 40, "word word word word word word word word word word word word…"),
    ],
)
def test_the_title_in_an_answer(answer, title):
    assert title_of(answer) == title


def test_the_question_holds_keywords_and_excerpts():
    group = SimpleNamespace(keywords=["orbit", "moon"], texts=["The probe landed."])
    question = prompt_of(group)
    assert "orbit, moon" in question and "- The probe landed." in question


def test_a_model_without_chat_template_is_refused(tiny_model_folder):
    with pytest.raises(InputError, match="no chat template"):
        GroupNamer(str(tiny_model_folder))


def test_a_group_gets_the_same_name_in_any_company(tmp_path):
    from tiny_models import tiny_model

    folder = tiny_model(tmp_path / "chat", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    )
    namer = GroupNamer(str(folder))
    groups = [SimpleNamespace(keywords=[word], texts=[word * 9]) for word in ("red", "blue", "sky")]
    together = namer.name(groups)
    assert [namer.name([group])[0] for group in groups] == together
