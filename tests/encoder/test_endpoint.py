"""LLMs behind an address: how they are asked, what fails and how, and that the key stays secret."""

import logging
import traceback
from types import SimpleNamespace

import pytest
from chat_server import chat_server, completion, question_of
from ports import free_port

from pipelines.encoder import endpoint
from pipelines.encoder.endpoint import ChatEndpoint, EndpointError
from pipelines.encoder.titles import TitleWriter, name_groups

KEY = "sk-wJalrXUtnFEMI7MDENG"
OK = (200, {}, "Blue.")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    """A key in the environment, and no waiting."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0)


def group(*keywords):
    return SimpleNamespace(keywords=[*keywords], texts=["A text."])


def ask(url, *questions):
    return ChatEndpoint(url, "some-llm").answer(questions)


def test_what_is_sent_and_what_comes_back():
    with chat_server(lambda body: f"About {question_of(body)[:3]}") as server:
        assert ask(f"{server.url}/", "one", "two", "six") == ["About one", "About two", "About six"]
        assert ask(f"{server.url}/chat/completions", "ten") == ["About ten"]
    assert set(server.paths) == {"/v1/chat/completions"}
    asked = next(body for body in server.requests if question_of(body) == "two")
    assert asked["model"] == "some-llm"
    assert asked["temperature"] == 0 and asked["max_tokens"] == 64
    assert asked["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


def test_without_a_key_none_is_sent_whatever_netrc_says(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with chat_server(lambda _: OK) as server:
        ChatEndpoint(server.url, "m")
    assert "Authorization" not in server.headers[0]


STRICT = {"model", "messages", "temperature", "max_tokens"}
OPENAI = {"model", "messages", "max_completion_tokens", "reasoning_effort"}


def knows(fields):
    """An endpoint that refuses every other field."""

    def answer(body):
        unknown = set(body) - fields
        message = f"Unrecognized request argument supplied: {unknown}"
        return (400, {}, {"error": {"message": message}}) if unknown else OK

    return answer


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (STRICT | {"chat_template_kwargs"}, {"temperature", "max_tokens", "chat_template_kwargs"}),
        (STRICT, {"temperature", "max_tokens"}),
        (OPENAI, {"max_completion_tokens", "reasoning_effort"}),
    ],
)
def test_fields_that_an_endpoint_does_not_know_are_left_out(fields, kept):
    with chat_server(knows(fields)) as server:
        assert ask(server.url, "What?") == ["Blue."]
    assert set(server.requests[-1]) == {"model", "messages"} | kept


def test_a_model_that_thinks_all_the_same_gets_room_and_its_thought_is_cut():
    def answer(body):
        if body.get("max_tokens", 0) < 2_000:
            return "<think>They ask for a word, and"
        return "<think>They ask for a word.</think>\n\nBlue"

    with chat_server(answer) as server:
        assert ask(server.url, "What?") == ["\n\nBlue"]
        assert server.requests[-1]["max_tokens"] == 2_048
    apart = {"reasoning_content": "They ask for a word, and"}
    reasons = pytest.raises(EndpointError, match=r"'m' at .* writes nothing but its reasoning")
    with chat_server(lambda _: (200, {}, completion(None, **apart))) as server, reasons:
        ChatEndpoint(server.url, "m")


def test_an_answer_that_is_all_reasoning_is_none():
    answers = {"first": "<think>hm", "second": "Goals"}
    with chat_server(lambda body: answers.get(question_of(body), "Blue")) as server:
        assert ask(server.url, "first", "second") == [None, "Goals"]


def test_a_busy_endpoint_is_asked_again_after_what_it_says(monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    turns = iter(
        [(429, {"Retry-After": "7"}, {}), (503, {"Retry-After": "3600"}, {}), (502, {}, {})]
    )
    with chat_server(lambda _: next(turns, OK)) as server:
        assert ask(server.url, "What?") == ["Blue."]
        assert len(server.requests) == 3 + 2
    assert [seconds for seconds in waited if seconds] == [7, 60]


def failing(status, message, headers=()):
    return lambda _: (status, dict(headers), {"error": {"message": message}})


@pytest.mark.parametrize(
    ("answer", "requests", "says"),
    [
        (failing(401, f"Incorrect API key {KEY[:9]}"), 1, "a key, and .* that it does not take"),
        (failing(403, "no"), 1, "HTTP 403: it wants a key, and OPENAI_API_KEY holds one"),
        (failing(404, f"no model for {KEY}"), 1, r"\(no model for …\): check --name-url.* 'some-"),
        (failing(307, "", {"Location": "http://127.0.0.2/"}), 1, "redirects are not followed"),
        (failing(503, "loading"), 6, r"HTTP 503 \(loading\), 6 times: try again later"),
        (failing(400, "bad\nmessages"), 5, r"HTTP 400 \(bad messages\): it does not take"),
        (failing(418, "teapot"), 1, r"HTTP 418 \(teapot\)"),
        (lambda _: (200, {}, b"<html>Log in</html>"), 5, "something else .*Log in"),
        (lambda _: (200, {}, {"error": {"message": "late"}}), 5, r"something else .*\(late\)"),
        (lambda _: (200, {}, {"choices": []}), 5, "something else than a chat completion"),
        (lambda _: (200, {}, completion(["a"])), 5, "something else than a chat completion"),
        (lambda _: (200, {}, b"[" * 100_000), 5, "something else than a chat completion"),
    ],
)  # fmt: skip
def test_an_endpoint_that_does_not_serve_is_one_line_without_the_key(answer, requests, says):
    with chat_server(answer) as server:
        with pytest.raises(EndpointError, match=says) as found:
            ChatEndpoint(server.url, "some-llm")
        assert len(server.requests) == requests
    told = "".join(traceback.format_exception(found.value))
    assert "\n" not in str(found.value)
    assert not any(KEY[: length + 1] in told for length in range(8, len(KEY)))


def test_the_key_goes_to_no_other_host():
    with chat_server(lambda _: OK) as other:
        moved = failing(308, "", {"Location": other.url.replace("127.0.0.1", "localhost")})
        with chat_server(moved) as server, pytest.raises(EndpointError, match="redirects"):
            ChatEndpoint(server.url, "m")
    assert other.requests == []


def test_an_address_where_nobody_listens_is_one_line():
    with pytest.raises(EndpointError, match=r"was not reached \(ConnectionError\): check"):
        ChatEndpoint(f"http://127.0.0.1:{free_port()}/v1", "m")


def test_a_key_that_cannot_be_sent_is_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-half\nsk-other")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds characters") as found:
        ChatEndpoint("http://127.0.0.1:1/v1", "m")
    assert "half" not in "".join(traceback.format_exception(found.value))


def test_a_key_on_an_open_line_is_told(caplog, monkeypatch):
    monkeypatch.setattr(ChatEndpoint, "_find_fields", lambda self: {})
    ChatEndpoint("http://127.0.0.1:1/v1", "m")
    ChatEndpoint("https://llm.example/v1", "m")
    assert caplog.text == ""
    ChatEndpoint("http://llm.example/v1", "m")
    assert "OPENAI_API_KEY goes to llm.example unencrypted" in caplog.text
    assert KEY not in caplog.text


def test_one_question_that_fails_is_none_and_the_others_are_asked(caplog):
    def answer(body):
        refused = failing(400, "content filter")(body)
        return (
            refused
            if question_of(body) == "bad"
            else "Half a \ud83d"
            if "h" in question_of(body)
            else OK
        )

    with chat_server(answer) as server:
        assert ask(server.url, "bad", "half", "what") == [None, "Half a ?", "Half a ?"]
    assert "1 questions failed, the last: " in caplog.text and "content filter" in caplog.text


def test_an_endpoint_that_fails_meanwhile_is_not_asked_on(caplog, monkeypatch):
    def answer(body):
        return failing(500, "out of memory")(body) if question_of(body) == "7" else OK

    with chat_server(answer) as server:
        answers = ask(server.url, *map(str, range(100)))
    assert answers[:4] == ["Blue."] * 4 and answers[7] is None and answers[-50:] == [None] * 50
    assert "out of memory" in caplog.text
    with caplog.at_level(logging.WARNING):
        writer = TitleWriter("m", f"http://127.0.0.1:{free_port()}/v1")
        assert writer.name([[group("a")], [group("b"), group("c")]]) == [[None], [None, None]]
    assert "no names: http://127.0.0.1" in caplog.text and KEY not in caplog.text


def test_groups_are_named_as_by_a_model_of_this_machine():
    def answer(body):
        question = question_of(body)
        if "Another group, about orbit, " in question and "Keywords: lunar" in question:
            return "Moon landings"
        words = {"orbit": "Space flight", "lunar": "space flight.", "goal": "Title: **Hockey**"}
        return next((name for word, name in words.items() if f": {word}" in question), "Blue")

    with chat_server(answer) as server:
        writer = TitleWriter("m", server.url)
        writer.check()
        groups = [group("orbit"), group("lunar"), group("goal")]
        assert writer.name([groups, groups[:1]]) == [
            ["Space flight", "Moon landings", "Hockey"], ["Space flight"]
        ]  # fmt: skip
        taken = {"HOCKEY": groups[0]}
        assert name_groups(ChatEndpoint(server.url, "m"), groups[2:], taken) == [None]
