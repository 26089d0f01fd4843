import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from pipelines.runtime.command import Answer, run_query, run_verbs


@dataclass(frozen=True)
class Question:
    """Ask."""

    name: str
    """Whom to ask for."""
    json: bool = False
    """Print JSON."""


def answer(question: Question) -> Answer:
    found = {"name": question.name, "at": datetime(2026, 1, 2, tzinfo=UTC)}
    wrong = ["a bad\nname"] if question.name == "bad" else []
    return Answer(found, "found", ("who",), [[question.name]], ["a note"], wrong)


def run(monkeypatch, capsys, *arguments, function=run_query):
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        function("job", Question if function is run_query else {"ask": Question}, answer)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_people_see_the_configuration_and_a_table(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "--name", "[red]Ada[/red]")
    assert code == 0
    assert "name: [red]Ada[/red]" in out
    assert "│ [red]Ada[/red] │" in out
    assert "a note\n" in err


def test_machines_see_json_and_nothing_else(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "--name", "Ada", "--json")
    assert code == 0
    assert json.loads(out) == {"name": "Ada", "at": "2026-01-02T00:00:00+00:00"}
    assert "name: Ada" in err


def test_a_problem_is_one_line_and_exit_code_1(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "--name", "bad")
    assert code == 1
    assert "problem: a bad name\n" in err


def test_characters_that_move_a_cursor_do_not_reach_the_terminal(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "--name", "a\x1b[2Jb")
    assert "│ a [2Jb │" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((), "needs a verb before its flags: ask"), (("tell",), "no verb 'tell'; its verbs are ask")],
)
def test_a_verb_comes_first(monkeypatch, capsys, arguments, told):
    code, _, err = run(monkeypatch, capsys, *arguments, function=run_verbs)
    assert code == 2
    assert told in err


def test_help_shows_the_flags_of_every_verb(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--help", function=run_verbs)
    assert code == 0
    assert "job.py ask" in out
    assert "--name" in out


def test_a_process_that_would_be_aborted_at_its_end_leaves_with_its_code():
    script = """
import atexit, os, sys
import lance
from pipelines.runtime.command import leaving_at_once
atexit.register(os.abort)
with leaving_at_once():
    print("all of it")
    sys.exit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (3, "all of it\n")
