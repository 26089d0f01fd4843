"""Names for groups: an LLM's answers become titles, or nothing."""

from types import SimpleNamespace

import pytest

from pipelines.encoder.titles import LocalChat, TitleWriter, name_groups, prompt_of, title_of
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
        ("The user wants a title.\n</think>\n\nLate goals", "Late goals"),
        ("<think>The user wants a title", None),
        (
            'The title of the document is: "The Truth About Atheism"\n\nThe',
            "The Truth About Atheism",
        ),
        ('The title of the document is "Used cars".', "Used cars"),
        ("A title for the group could be: Used cars", "Used cars"),
        (".NET programming", ".NET programming"),
        ("The Name of the Rose", "The Name of the Rose"),
        ("Title IX: sports law", "Title IX: sports law"),
        ("The above document contains keywords and excerpts of documents that", None),
        ("I am a helpful AI assistant named Smol", None),
        ('"Excerpt: Excerpt: Exc', None),
        ("Excerpt:\n- re winnipeg vs vancouver", None),
    ],
)
def test_the_title_in_an_answer(answer, title):
    assert title_of(answer) == title


def test_the_question_holds_keywords_and_excerpts():
    group = SimpleNamespace(keywords=["orbit", "moon"], texts=["The probe landed."])
    question = prompt_of(group)
    assert "orbit, moon" in question and "- The probe landed." in question


def test_a_model_without_chat_template_is_refused_before_its_weights_are_read(
    tiny_model_folder, monkeypatch
):
    with pytest.raises(InputError, match="no chat template"):
        LocalChat(str(tiny_model_folder))
    monkeypatch.setattr("pipelines.encoder.titles._on_worker", lambda ask, *given: ask(*given))
    monkeypatch.setattr("pipelines.encoder.chat.load_checked", None)
    with pytest.raises(InputError, match="no chat template"):
        TitleWriter(str(tiny_model_folder)).check()


def test_a_group_gets_the_same_name_in_any_company(tmp_path):
    from tiny_models import tiny_model

    folder = tiny_model(tmp_path / "chat", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    )
    chat = LocalChat(str(folder))
    groups = [SimpleNamespace(keywords=[word], texts=[word * 9]) for word in ("red", "blue", "sky")]
    together = name_groups(chat, groups)
    assert [name_groups(chat, [group])[0] for group in groups] == together


class ScriptedChat:
    """Answers by what a question holds, and keeps the questions."""

    def __init__(self, answers):
        self.answers = answers
        self.questions = []

    def answer(self, questions):
        self.questions += questions
        return [next(a for word, a in self.answers.items() if word in q) for q in questions]


def test_groups_of_one_level_have_distinct_names():
    answers = {
        'the title "Space flight" already': "Moon landings",
        'the title "Cars" already': "cars.",
        "orbit": "Space flight", "lunar": "Space flight", "engine": "Cars", "brakes": "Cars",
        "silence": None,
    }  # fmt: skip
    chat = ScriptedChat(answers)
    words = ["orbit", "lunar", "engine", "brakes", "silence"]
    groups = [SimpleNamespace(keywords=[word], texts=["A text."]) for word in words]
    assert name_groups(chat, groups) == ["Space flight", "Moon landings", "Cars", None, None]
    asked_again = chat.questions[5]
    assert "Another group, about orbit," in asked_again and "Keywords: lunar" in asked_again
    assert name_groups(chat, groups[:1]) == ["Space flight"]
    taken = {"SPACE FLIGHT": groups[4]}
    assert name_groups(chat, groups[1:2], taken) == ["Moon landings"]
    assert "Another group, about silence," in chat.questions[-1]
