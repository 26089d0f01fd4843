import json
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from pipelines.runtime.command import JobResult, load_config, parse, report_error, run_job
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import deciding_settings, may_change


@dataclass(frozen=True)
class Options:
    """Options of a job."""

    corpus: str
    """Path of the corpus."""
    output: str = "out"
    pooling: Literal["last", "mean"] = "last"
    keep_columns: tuple[str, ...] = ()
    layer: int = -1
    seed: int = 0
    num_workers: int = may_change(1)


def run(monkeypatch, arguments, function, inputs=()):
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    monkeypatch.setattr("pipelines.runtime.command.connect_ray", lambda: None)
    with pytest.raises(SystemExit) as stop:
        run_job("job", Options, function, inputs=inputs)
    return stop.value.code


def test_flags_become_a_configuration():
    options = parse(Options, ["--corpus", "c", "--keep-columns", "a", "b", "--layer", "-2"])
    assert options == Options(corpus="c", keep_columns=("a", "b"), layer=-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing from .*--corpus"),
        (["--corpus", "c", "--poling", "mean"], "Unrecognized options: --poling"),
        (["--corpus", "c", "--layer", "top"], "Error parsing --layer"),
        (["--corpus", "c", "--config"], "--config needs a file"),
        (["--config", "nowhere.yaml"], r"no such configuration file: nowhere\.yaml"),
    ],
)
def test_bad_flags_give_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(Options, arguments)
    assert "\n" not in str(caught.value)


def test_yaml_gives_defaults_and_flags_win(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("corpus: c\nkeep-columns: [a]\nlayer: -3\n")
    options = parse(Options, ["--config", str(path), "--layer", "-1"])
    assert options == Options(corpus="c", keep_columns=("a",), layer=-1)


def test_run_record_of_an_earlier_run_repeats_it(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"job": "job", "config": {"corpus": "c", "pooling": "mean"}}))
    assert parse(Options, [f"--config={path}"]) == Options(corpus="c", pooling="mean")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("corpus: c\nspeed: 9", "unknown settings speed"),
        ("corpus: c\nlayer: top", "setting layer: .* found 'top'"),
        ("corpus: c\npooling: max", "setting pooling"),
        ("layer: -1", "setting corpus: .*required"),
        ("- a", "holds no settings"),
        ("a: [", "is not YAML"),
        ("corpus: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_bad_configuration_files_are_refused(tmp_path, content, message):
    path = tmp_path / "options.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_config(Options, str(path))


def test_a_job_that_works_exits_0_and_is_recorded(tmp_path, monkeypatch, capsys):
    def work(config, record):
        return JobResult({"documents": 2}, {"speed": 1.0}, {"documents": "2"})

    folder = tmp_path / "out"
    assert run(monkeypatch, ["--corpus", "c", "--output", str(folder)], work) == 0
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["status"] == "complete"
    assert recorded["counts"] == {"documents": 2}
    assert recorded["config"]["corpus"] == "c"
    printed = capsys.readouterr().out
    assert "corpus: c" in printed
    assert "documents" in printed


def test_a_user_mistake_exits_2_with_one_line(tmp_path, monkeypatch, capsys):
    def work(config, record):
        raise InputError("no column\n'text'")

    code = run(monkeypatch, ["--corpus", "c", "--output", f"{tmp_path}-o"], work)
    assert code == 2
    assert capsys.readouterr().err.splitlines() == ["error: no column 'text'"]


def test_a_defect_exits_1_with_a_traceback(tmp_path, monkeypatch, capsys):
    def work(config, record):
        raise ZeroDivisionError("defect")

    assert run(monkeypatch, ["--corpus", "c", "--output", f"{tmp_path}-o"], work) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_unfinished_input_folder_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"job": "embed", "status": "running"}))
    arguments = ["--corpus", str(tmp_path), "--output", f"{tmp_path}-o"]
    assert run(monkeypatch, arguments, lambda c, r: JobResult(), inputs=("corpus",)) == 2
    assert "status 'running'" in capsys.readouterr().err


def test_told_errors_are_found_below_what_ray_wraps(capsys):
    class WrappedError(Exception):
        cause = InputError("bad row")

    assert report_error(WrappedError("task failed")) == 2
    assert capsys.readouterr().err == "error: bad row\n"


def test_a_failed_run_goes_on_with_other_workers_and_with_nothing_else_that_is_other(
    monkeypatch, tmp_path, capsys
):
    arguments = ["--corpus", "c", "--output", str(tmp_path / "out")]

    def fail(options, record):
        (tmp_path / "out" / "part").write_text("half")
        raise InputError("no more")

    def end(options, record):
        return JobResult()

    assert run(monkeypatch, arguments, fail) == 2
    assert run(monkeypatch, [*arguments, "--layer", "3"], end) == 2
    assert "its layer is" in capsys.readouterr().err
    assert run(monkeypatch, [*arguments, "--num-workers", "4"], end) == 0


def test_settings_that_may_change_decide_nothing():
    options = Options(corpus="c")
    assert set(vars(options)) - set(deciding_settings(options)) == {"num_workers"}
