"""From a command line to one call of a job's function: parse, connect to Ray, record, report.

A job's options are the fields of its frozen configuration dataclass. ``--config FILE`` takes the
same keys from YAML, or from the ``run.json`` of an earlier run; flags given beside it win.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from typing import Any, NoReturn, TypeVar, cast

import pydantic
import tyro
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.runtime.errors import InputError, find_told_error
from pipelines.runtime.files import read_bytes
from pipelines.runtime.listing import refuse_own_output
from pipelines.runtime.logs import configure_logging, job_logging, mark_lines, show_controls
from pipelines.runtime.run_record import (
    RunRecord,
    describe_input,
    read_run,
    require_complete,
)

log = logging.getLogger(__name__)

# user:secret@ or key@ before the host or bucket, and options that name a secret
_IN_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]*@", re.IGNORECASE)
_IN_OPTIONS = re.compile(
    r"[?&][\w.-]*(secret|password|passwd|token|access_?key|account_?key|credential|signature|sas)"
    r"[\w.-]*=",
    re.IGNORECASE,
)

_FREE_TEXT = ("prompt", "query", "text")


def refuse_credentials(settings: Mapping[str, Any]) -> None:
    """Raise :class:`InputError`, which does not repeat it, where a setting's address has a secret.

    What is a setting ends in ``run.json``, on the screen, and in Ray's list of jobs.
    """
    for name, value in settings.items():
        if name in _FREE_TEXT:
            continue
        for text in _texts(value):
            if _IN_ADDRESS.search(text) or ("://" in text and _IN_OPTIONS.search(text)):
                raise InputError(
                    f"--{name.replace('_', '-')} holds credentials in its address, where logs and "
                    "run.json would show them: leave them out and pass them as the service's own "
                    "tools do (environment, configuration file, instance role)"
                )


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


REFUSED = 3
# How OpenMP's threads wait for each other within a process: some 100 microseconds awake, which is
# longer than the gap between two products, then asleep. GNU's default of milliseconds slows
# everything else on shared cores down.
THREADS_WAIT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}

Config = TypeVar("Config")


class Stopped(BaseException):
    """Someone ended the job (``ray job stop``, a node that drains)."""

    def __init__(self, *_: object) -> None:
        super().__init__("stopped; the same command goes on from here")


@dataclass
class JobResult:
    """What a job hands back: figures for ``run.json`` and a short table for people.

    ``refusals`` say why what was made is not to be used: they go to stderr, and the job's exit code
    is then :data:`REFUSED`.
    """

    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, str] = field(default_factory=dict)
    refusals: Sequence[str] = ()


def run_job(
    job: str,
    config_class: type[Config],
    function: Callable[[Config, RunRecord], Any],
    *,
    inputs: Sequence[str] = (),
    keep_complete: bool = False,
    connects: bool = False,
) -> NoReturn:
    """Run one job from ``sys.argv`` and exit: 0 done, 2 bad input, 1 anything else.

    Args:
        job: the job's name in ``run.json``.
        config_class: frozen dataclass with at least ``output: str``.
        function: does the work; returns an object with ``counts``, ``metrics``, ``summary``.
        inputs: names of settings that hold another job's output folder, which must be complete.
        keep_complete: leave the record of a complete output folder as it is.
        connects: ``function`` calls :func:`connect_ray` itself, once its inputs are there.

    With a setting ``dry_run`` that is true, nothing is recorded.

    An exception that carries an ``exit_code`` is a message to the user: its one line goes to
    stderr without a traceback.
    """
    with _exit_codes():
        config, settings = _begin(job, config_class)
        made_from = {}
        for name in inputs:
            folder = settings[name]
            if read_run(folder) is not None:
                made_from[name] = describe_input(require_complete(folder))
        record = RunRecord.of(job, config, keep_complete=keep_complete, inputs=made_from)
        with contextlib.nullcontext() if settings.get("dry_run") else record:
            if not record.settled:
                mark_lines(job, record.run_id)
                if not connects:
                    connect_ray()
            result = function(config, record)
            record.counts.update(result.counts)
            record.metrics.update(result.metrics)
        print_summary(job, result.summary)
    sys.exit(0)


def run_unrecorded_job(
    job: str,
    config_class: type[Config],
    function: Callable[[Config, Callable[[], None]], JobResult],
) -> NoReturn:
    """Like :func:`run_job` for a job that has no output folder but keeps its own records.

    The function is also given what joins or starts a Ray cluster, to be called where it needs one.
    Exits with :data:`REFUSED` where the result has refusals.
    """
    with _exit_codes():
        config, _ = _begin(job, config_class)
        result = function(config, connect_ray)
        print_summary(job, result.summary)
    for refusal in result.refusals:
        print(f"refused: {' '.join(refusal.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(REFUSED if result.refusals else 0)


def _begin(job: str, config_class: type[Config]) -> tuple[Config, dict[str, Any]]:
    """The configuration that ``sys.argv`` asks for, which is printed, and its settings."""
    config = parse(config_class, sys.argv[1:])
    settings = asdict(config)  # type: ignore[call-overload]
    refuse_credentials(settings)
    refuse_own_output(settings)
    print_config(job, settings)
    return config, settings


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Log as asked for, and end the process with the code that an exception calls for."""
    try:
        configure_logging()
        yield
    except BaseException as error:  # noqa: BLE001 - the outermost frame: every way out has a code
        sys.exit(report_error(error))


def report_error(error: BaseException) -> int:
    """Say on stderr what went wrong and return the exit code it calls for."""
    message = find_told_error(error)
    if message is not None:
        line = show_controls(" ".join(str(message).split()))
        print(f"error: {line}", file=sys.stderr)  # noqa: T201
        return int(message.exit_code)  # type: ignore[attr-defined]
    if isinstance(error, Stopped):
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 128 + signal.SIGTERM
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    traceback.print_exception(error)
    return 1


def parse(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """The configuration that the command line and, where given, ``--config FILE`` describe."""
    rest, default = take_config_file(config_class, list(arguments))
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return cast(Config, tyro.cli(config_class, args=rest, default=default))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(
            f"{_plain_message(stderr.getvalue())} (--help lists the options)"
        ) from stop


def take_config_file(
    config_class: type[Config], arguments: list[str]
) -> tuple[list[str], Config | None]:
    """Cut ``--config FILE`` out of the arguments; the configuration it holds as the default."""
    path = None
    rest = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            if path is None:
                raise InputError("--config needs a file: a run.json, or YAML of the same keys")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return rest, None if path is None else load_config(config_class, path)


def load_config(config_class: type[Config], path: str) -> Config:
    """A configuration from YAML, JSON, or the ``config`` of a ``run.json``.

    Raises :class:`InputError` for a missing file, a file of another form, and unknown keys.
    """
    try:
        content = yaml.safe_load(read_bytes(path))
    except FileNotFoundError as error:
        raise InputError(f"no such configuration file: {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML or JSON: {' '.join(str(error).split())}") from error
    if isinstance(content, Mapping) and isinstance(content.get("config"), Mapping):
        content = content["config"]
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no settings: it must map option names to values")
    settings = {str(key).replace("-", "_"): value for key, value in content.items()}
    known = {f.name: f for f in fields(config_class)}  # type: ignore[arg-type]
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise InputError(
            f"{path} has unknown settings {', '.join(unknown)}; known are {', '.join(known)}"
        )
    try:
        return pydantic.TypeAdapter(config_class).validate_python(settings)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        raise InputError(f"{path}: setting {name}: {first['msg']}{found}") from error


def connect_ray() -> None:
    """Join the Ray cluster of ``RAY_ADDRESS``; else one is started on this machine when needed.

    At once where it has accelerators, which Ray hands out, or where logs are JSON, which Ray
    writes.
    """
    import ray

    from pipelines.runtime.machines import MAX_RESOURCES, has_accelerator, start_when_needed
    from pipelines.runtime.units import configure_ray_data

    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in THREADS_WAIT.items():
            os.environ.setdefault(name, value)
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(
                log_to_driver=True, logging_level=logging.WARNING, logging_config=job_logging()
            )
        else:
            os.environ.pop(MAX_RESOURCES, None)  # one that is started here does not grow
            if has_accelerator() or job_logging() is not None:
                _start_ray()
            else:
                start_when_needed(_start_ray)
    signal.signal(signal.SIGTERM, _stop)  # Ray's own would leave run.json without a word
    configure_ray_data()


def _start_ray() -> None:
    """Start a Ray on this machine."""
    import ray

    from pipelines.runtime.machines import keep_sockets_short, logical_cpus

    keep_sockets_short()
    ray.init(
        "local",  # not whatever else runs on this machine
        num_cpus=logical_cpus(),
        include_dashboard=False,
        log_to_driver=True,
        # its one warning is about who may connect to a local Ray
        logging_level=logging.ERROR,
        logging_config=job_logging(),
    )
    signal.signal(signal.SIGTERM, _stop)


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the end is bounded by SIGKILL
    raise Stopped


def print_config(job: str, settings: Mapping[str, Any]) -> None:
    """Print the effective configuration, one setting a line."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(job, style="bold", markup=False)
    for name, value in settings.items():
        shown = value if isinstance(value, str) else json.dumps(value, default=str)
        console.print(f"  {name}: {shown}", markup=False)
    if settings.get("trust_remote_code"):
        console.print(
            f"trust_remote_code: Python code that comes with {settings.get('model')} is run, here "
            "and on every worker, with all rights of this job",
            style="bold",
            markup=False,
        )


def print_summary(job: str, summary: Mapping[str, str]) -> None:
    """Print the result as a two-column table."""
    table = Table(title=job, show_header=False, title_justify="left")
    for name, value in summary.items():
        table.add_row(Text(name), Text(value))
    Console().print(table)


def _plain_message(framed: str) -> str:
    """tyro's message as one line: its own words, without frame and advice.

    The frame is a box, or lines of dashes where the output cannot show one.
    """
    words: list[str] = []
    inside = False
    for line in framed.splitlines():
        text = line.strip(" │")
        is_frame = line.startswith("╭") or (text != "" and not text.strip("-─╰╯"))
        if is_frame and inside:
            break
        if is_frame:
            inside = True
        elif inside and text:
            words.append(text)
    return " ".join(words) or "bad options"


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
    problems: Sequence[str] = ()
    """What is wrong; they go to stderr, and the exit code is then 1."""


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """End a process that has loaded Lance with the code asked for, without Python's own end.

    Threads of Lance that come back to Python then are aborted, with the process and another code,
    though all is done: one in 50 on a busy machine (pylance 14.0.2, Python 3.11).
    """
    try:
        yield
    except SystemExit as stop:
        if "lance" not in sys.modules or not isinstance(stop.code, int):
            raise
        logging.shutdown()
        with contextlib.suppress(BrokenPipeError):  # whoever read has seen enough
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code)


def run_query(
    job: str, config_class: type[Config], function: Callable[[Config], Answer]
) -> NoReturn:
    """Run a job that answers one kind of question, from ``sys.argv``, and exit."""
    _run(lambda: (job, config_class, sys.argv[1:]), function)


def run_verbs(
    job: str, verbs: Mapping[str, type[Any]], function: Callable[[Any], Answer]
) -> NoReturn:
    """Run a job whose first argument is a verb, from ``sys.argv``, and exit.

    ``verbs`` has the flags of each, a frozen dataclass whose docstring says what it does.
    """

    def choose() -> tuple[str, type[Any], list[str]]:
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

    _run(choose, function)


def _run(
    choose: Callable[[], tuple[str, type[Any], list[str]]], function: Callable[[Any], Answer]
) -> NoReturn:
    with _exit_codes():
        name, config_class, arguments = choose()
        config = parse(config_class, arguments)
        settings = asdict(config)
        as_json = bool(settings.get("json"))
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            print_config(name, settings)
            answer = function(config)
        _print(answer, as_json)
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


def _print_help(job: str, verbs: Mapping[str, type[Any]]) -> None:
    print(f"usage: {job}.py VERB --store STORE [flags]\n")  # noqa: T201
    for name, config_class in verbs.items():
        with contextlib.suppress(SystemExit):
            tyro.cli(config_class, prog=f"{job}.py {name}", args=["--help"])
