"""Jobs that answer on stdout, as a table for people or as JSON, and have no output folder.

A job of this kind has one configuration, or a verb before its flags, each with its own. Where the
configuration has ``json`` set, stdout holds one JSON value and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table

from pipelines.command_line import configure_logging, parse, print_config, report_error
from pipelines.errors import InputError

PROBLEMS = 1
"""Exit code of an answer with problems."""


@dataclass(frozen=True)
class Answer:
    """What a job found."""

    data: Any
    """For machines: what JSON can hold."""
    title: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    """Lines for people, on stderr."""
    problems: Sequence[str] = field(default=())
    """What is wrong; they go to stderr, and the exit code is then 1."""


@dataclass(frozen=True)
class Verb:
    """One thing that a job can do."""

    config: type[Any]
    """Frozen dataclass of its flags; its docstring says what it does."""
    function: Callable[[Any], Answer]


def run_query(job: str, verb: Verb) -> NoReturn:
    """Run a job that answers one kind of question, from ``sys.argv``, and exit."""
    _run(job, lambda: (job, verb, sys.argv[1:]))


def run_verbs(job: str, verbs: Mapping[str, Verb]) -> NoReturn:
    """Run a job whose first argument is a verb, from ``sys.argv``, and exit."""

    def choose() -> tuple[str, Verb, list[str]]:
        arguments = sys.argv[1:]
        known = ", ".join(verbs)
        if not arguments:
            raise InputError(f"{job} needs a verb before its flags: {known} (--help says more)")
        if arguments[0] in ("-h", "--help"):
            _print_help(job, verbs)
            sys.exit(0)
        if arguments[0] not in verbs:
            raise InputError(f"{job} has no verb {arguments[0]!r}; its verbs are {known}")
        return f"{job} {arguments[0]}", verbs[arguments[0]], arguments[1:]

    _run(job, choose)


def _run(job: str, choose: Callable[[], tuple[str, Verb, list[str]]]) -> NoReturn:
    configure_logging()
    try:
        name, verb, arguments = choose()
        config = parse(verb.config, arguments)
        settings = asdict(config)
        as_json = bool(settings.get("json"))
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            print_config(name, settings)
            answer = verb.function(config)
        _print(answer, as_json)
    except BaseException as error:  # noqa: BLE001 - the outermost frame: every way out has a code
        sys.exit(report_error(error))
    for line in answer.problems:
        print(f"problem: {' '.join(line.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(PROBLEMS if answer.problems else 0)


def _print(answer: Answer, as_json: bool) -> None:
    for line in answer.notes:
        print(line, file=sys.stderr)  # noqa: T201
    if as_json:
        print(json.dumps(answer.data, ensure_ascii=False, default=_to_json))  # noqa: T201
        return
    table = Table(title=answer.title, title_justify="left", show_header=bool(answer.columns))
    for column in answer.columns or ("", ""):
        table.add_column(column, overflow="fold")
    for row in answer.rows:
        table.add_row(*(_plain(cell) for cell in row))
    Console(highlight=False, markup=False).print(table)


def _to_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, date) else str(value)


def _plain(cell: str) -> str:
    """A cell without the characters that would move a terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in cell)


def _print_help(job: str, verbs: Mapping[str, Verb]) -> None:
    print(f"usage: {job}.py VERB --store STORE [flags]\n")  # noqa: T201
    for name, verb in verbs.items():
        with contextlib.suppress(SystemExit):
            tyro.cli(verb.config, prog=f"{job}.py {name}", args=["--help"])
