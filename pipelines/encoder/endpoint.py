"""LLMs behind an address that speaks OpenAI's chat completions, asked over HTTP.

The key comes from ``OPENAI_API_KEY``. It goes to the given host alone: no redirect is followed, and
neither an error nor a log holds it. A proxy (``HTTPS_PROXY``) and a bundle of certificates
(``REQUESTS_CA_BUNDLE``) are taken from the environment.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.util.retry import Retry

from pipelines.encoder.answers import spoken_part
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import in_threads

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that every client of this protocol reads."""
BACKOFF_SECONDS = 1.0
"""Before the second repeat of a question; each further one waits twice as long."""
LONGEST_WAIT_SECONDS = 60
"""Of a ``Retry-After`` that is longer, so much is waited for."""
_TIMEOUTS_SECONDS = (10, 180)  # to connect, and between two parts of an answer
_REPEATS = 5
_BUSY = (408, 429, 500, 502, 503, 504, 529)
_AT_ONCE = 4  # a server on a few CPUs answers one after the other, within the time-out
_REFUSED = (400, 413, 422)  # this question, or a field of it
_EXCERPT_CHARACTERS = 200
_NO_SUCH_JSON = (ValueError, LookupError, TypeError, RecursionError)
_PATH = "/chat/completions"
_TEST_QUESTION = "Answer with one word: which colour has the sky on a clear day?"

_SHORT = {"temperature": 0, "max_tokens": 64}
_NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}
_WAYS: tuple[Mapping[str, Any], ...] = (
    {**_SHORT, **_NO_THINKING, "reasoning_effort": "none"},
    {**_SHORT, **_NO_THINKING},
    _SHORT,
    {"max_completion_tokens": 2_048, "reasoning_effort": "low"},
    {"temperature": 0, "max_tokens": 2_048},
)
"""Fields beside model and question: endpoints refuse those that they do not know.

The first that is taken and brings an answer is kept: thinking switched off as servers of open
models do it (vLLM, SGLang, llama.cpp, Ollama); nothing said of it; then room for it.
"""


class EndpointError(InputError):
    """An endpoint that gives no answer: one line, which holds neither key nor question."""


class _QuestionError(EndpointError):
    """No answer to one question: others may fare better."""


class ChatEndpoint:
    """An endpoint that has answered a first question."""

    def __init__(self, url: str, model: str) -> None:
        """``url`` as OpenAI's clients take it, with ``/v1``; ``model`` as the endpoint calls it.

        Raises :class:`EndpointError` where no answer comes.
        """
        base = url.rstrip("/").removesuffix(_PATH)
        self._address, self._model = base + _PATH, model
        self._key = _find_key()
        host = urlsplit(url).hostname or ""
        if self._key and url.startswith("http://") and not _is_here(host):
            log.warning("%s goes to %s unencrypted: its address is no https", KEY_VARIABLE, host)
        self._session = _open_session(self._key)
        self._fields = self._find_fields()

    def answer(self, questions: Sequence[str]) -> list[str | None]:
        """An answer to each question; None where there is none but reasoning, or the ask failed.

        Once the endpoint fails, which is logged, nothing more is asked.
        """
        failures: list[EndpointError] = []

        def ask(question: str) -> str | None:
            if any(not isinstance(error, _QuestionError) for error in failures):
                return None
            try:
                return self._ask(question, self._fields)
            except EndpointError as error:
                failures.append(error)
                return None

        answers = in_threads(ask, list(questions), at_once=_AT_ONCE)
        if failures:
            log.warning("%d questions failed, the last: %s", len(failures), failures[-1])
        return answers

    def _find_fields(self) -> Mapping[str, Any]:
        refusal: EndpointError | None = None
        for fields in _WAYS:
            try:
                if self._ask(_TEST_QUESTION, fields):
                    return fields
            except _QuestionError as error:
                refusal = error
        raise refusal or EndpointError(
            f"{self._model!r} at {self._address} writes nothing but its reasoning, or nothing at "
            "all: name a model that answers"
        )

    def _ask(self, question: str, fields: Mapping[str, Any]) -> str | None:
        """What is answered, None where that is nothing but reasoning."""
        asked: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
        }
        try:
            answer = self._session.post(
                self._address,
                json={**asked, **fields},
                timeout=_TIMEOUTS_SECONDS,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise EndpointError(
                f"{self._address} was not reached ({type(error).__name__}): check --name-url, and "
                "that its server runs"
            ) from None  # its text may hold a proxy's password
        if answer.status_code != requests.codes.ok:
            raise self._failure(answer)
        try:
            content = answer.json()["choices"][0]["message"].get("content")
        except (*_NO_SUCH_JSON, AttributeError):
            content = answer
        if not isinstance(content, str | None):
            raise _QuestionError(
                f"{self._address} answered something else than a chat completion"
                f"{self._excerpt(answer)}: check --name-url, which ends in /v1 for most servers"
            )
        # JSON may hold halves of characters, which no file takes
        spoken = spoken_part((content or "").encode(errors="replace").decode())
        return spoken if spoken and spoken.strip() else None

    def _failure(self, answer: requests.Response) -> EndpointError:
        """What an answer other than 200 means."""
        code, address = answer.status_code, self._address
        found = f"{address} answered HTTP {code}"
        if code in (401, 403):  # their text may repeat parts of the key
            held = "holds none" if self._key is None else "holds one that it does not take"
            return EndpointError(f"{found}: it wants a key, and {KEY_VARIABLE} {held}")
        found += self._excerpt(answer)
        if code == requests.codes.not_found:
            return EndpointError(
                f"{found}: check --name-url, which ends in /v1 for most servers, and that it has "
                f"a model {self._model!r}"
            )
        if answer.is_redirect:
            return EndpointError(f"{found}: redirects are not followed; name the last address")
        if code in _BUSY:
            return EndpointError(f"{found}, {_REPEATS + 1} times: try again later")
        kind = _QuestionError if code in _REFUSED else EndpointError
        return kind(f"{found}: it does not take what --name-model {self._model} is asked")

    def _excerpt(self, answer: requests.Response) -> str:
        """The beginning of what an endpoint wrote, without the key."""
        try:
            text = str(answer.json()["error"]["message"])
        except _NO_SUCH_JSON:
            text = answer.text
        if self._key:
            text = text.replace(self._key, "…")
        cut = " ".join(text.split())[:_EXCERPT_CHARACTERS]
        return f" ({cut})" if cut else ""


class _Bearer(AuthBase):
    """Sends the key, or nothing: without it ``requests`` would look into ``.netrc``."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _open_session(key: str | None) -> requests.Session:
    retries = Retry(
        _REPEATS,
        connect=2,
        read=1,
        status_forcelist=_BUSY,
        allowed_methods=None,
        backoff_factor=BACKOFF_SECONDS,
        raise_on_status=False,
        retry_after_max=LONGEST_WAIT_SECONDS,
    )
    session = requests.Session()
    session.auth = _Bearer(key)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    return session


def _find_key() -> str | None:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise EndpointError(f"{KEY_VARIABLE} holds characters that no key has: set it again")
    return key or None


def _is_here(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
