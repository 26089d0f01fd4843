"""``run.json``: how an output folder was made, and whether it is whole.

Written first with status ``running``, last with ``complete`` (or ``failed``). A folder whose
status is not ``complete`` is not a result, and :func:`require_complete` refuses it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    exists,
    first_line,
    join,
    json_bytes,
    list_files,
    read_bytes,
    write_bytes,
)

FILE_NAME = "run.json"
_RECORDED_PACKAGES = ("shoal", "ray", "torch", "transformers", "peft", "faiss-cpu", "pyarrow")
_SOURCE = ("pipelines", "cluster", "jobs")

log = logging.getLogger(__name__)


def may_change(default: Any) -> Any:
    """A field of a configuration that decides no result, so that a run may go on with another."""
    return field(default=default, metadata={"may_change": True})


def names_that_may_change(config_class: Any) -> frozenset[str]:
    """The fields of a configuration that are declared with :func:`may_change`."""
    return frozenset(f.name for f in fields(config_class) if f.metadata.get("may_change"))


def deciding_settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration without those that decide no result."""
    free = names_that_may_change(type(config))
    return {name: value for name, value in asdict(config).items() if name not in free}


def settings_of(config: Any, options: Any) -> dict[str, Any]:
    """The settings of a configuration that ``options``, one of the classes it is made of, has."""
    return {f.name: getattr(config, f.name) for f in fields(options)}


@dataclass
class RunRecord:
    """One run of one job, kept as ``run.json`` in its output folder.

    Use as a context manager: entering writes ``running``, leaving writes ``complete``, or
    ``failed`` with the error's first line. ``config`` is what would repeat the run.

    ``may_change`` names settings that decide no result, so that a run may go on with others.
    With ``take_over`` the record of whatever run was there before is replaced.
    With ``keep_complete`` a complete folder is not touched: the job finds it in ``previous`` and
    can only confirm it or refuse.
    """

    folder: str
    job: str
    config: Mapping[str, Any]
    seed: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    previous: Mapping[str, Any] | None = None
    may_change: Collection[str] = ()
    keep_complete: bool = False
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """By setting: which runs made what this one reads."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Names this run in its logs; a run that goes on with an earlier one has its own."""
    take_over: bool = False
    settled: bool = field(default=False, init=False)
    """Whether the record is complete already and leaving will not change it."""

    @classmethod
    def of(cls, job: str, config: Any, **settings: Any) -> Self:
        """The record of a run of ``job`` in ``config.output``, with ``config`` as its settings."""
        free = names_that_may_change(type(config))
        seed = getattr(config, "seed", 0)
        return cls(config.output, job, asdict(config), seed=seed, may_change=free, **settings)

    def __enter__(self) -> Self:
        if not self.take_over:
            self.previous = check_output_folder(
                self.folder, self.job, self.config, may_change=self.may_change
            )
        self._started = time.monotonic()
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        complete = self.previous is not None and self.previous.get("status") == "complete"
        self.settled = self.keep_complete and complete
        if not self.settled:
            self._write("running")
        return self

    def complete(self, counts: Mapping[str, int], metrics: Mapping[str, Any]) -> None:
        """Write ``complete`` now, with these counts and metrics too, instead of on leaving."""
        self.counts.update(counts)
        self.metrics.update(metrics)
        self._write("complete")
        self.settled = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.settled:
            return
        if error is None:
            self._write("complete")
        else:
            self._write("failed", error=first_line(error))

    def content(self, status: str, **extra: Any) -> bytes:
        """The record as it is now, as the content of ``run.json``."""
        content = {
            "job": self.job,
            "status": status,
            "config": dict(self.config),
            "run_id": self.run_id,
            "versions": package_versions(),
            "source_sha256": source_digest(),
            "seed": self.seed,
            "inputs": dict(self.inputs),
            "started_at": self._started_at,
            "seconds": round(time.monotonic() - self._started, 3),
            "counts": self.counts,
            "metrics": self.metrics,
            **extra,
        }
        return json_bytes(content, default=str)

    def _write(self, status: str, **extra: Any) -> None:
        write_bytes(join(self.folder, FILE_NAME), self.content(status, **extra))


def read_run(folder: str) -> dict[str, Any] | None:
    """The content of ``folder/run.json``, or None where there is none."""
    path = join(folder, FILE_NAME)
    if not exists(path):
        return None
    try:
        return json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a run record ({error}); move the folder away") from error


def require_complete(folder: str) -> dict[str, Any]:
    """The run record of a finished output folder; an :class:`InputError` for anything less."""
    run = read_run(folder)
    if run is None:
        raise InputError(f"{folder} holds no {FILE_NAME}: it is not the output of a job")
    if run.get("status") != "complete":
        raise InputError(
            f"{folder} has status {run.get('status')!r}, not 'complete': run its job "
            f"{run.get('job')!r} again to finish it"
        )
    return run


def require_unchanged(
    folder: str,
    previous: Mapping[str, Any],
    name: str,
    digest: str | None,
    *,
    what: str = "input",
) -> None:
    """Raise :class:`InputError` unless an earlier run read what is there now.

    ``name`` is the metric under which the run kept the digest of what it read; ``what`` calls
    that in the error.
    """
    kept = previous.get("metrics", {}).get(name)
    if kept == digest:
        return
    since = "it has changed since" if kept else "that run kept no digest to compare it by"
    raise InputError(
        f"{folder} holds the result of {previous.get('job')!r} from its {what} as it was at "
        f"{previous.get('started_at')}; {since}: choose another --output, or delete that folder"
    )


def describe_input(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run keeps of another whose output it reads, to tell later whether it is still that."""
    described = {name: run.get(name) for name in ("job", "run_id", "started_at", "source_sha256")}
    fingerprint = run.get("metrics", {}).get("encoder_fingerprint")
    return {**described, "encoder_fingerprint": fingerprint} if fingerprint else described


def check_output_folder(
    folder: str, job: str, config: Mapping[str, Any], *, may_change: Collection[str] = ()
) -> Mapping[str, Any] | None:
    """The earlier run that ``folder`` holds, if this one may go on from it.

    Raises :class:`InputError` where the folder holds something else: another job, another
    configuration, or files that no job recorded. A failed run that left nothing but its record
    is no hindrance.
    """
    run = read_run(folder)
    if run is None:
        files = list_files(folder)
        if files:
            raise InputError(
                f"output folder {folder} is not empty (it holds {files[0]!r}) and is no earlier "
                "run of this job: choose another --output"
            )
        return None
    if run.get("job") != job:
        raise InputError(
            f"output folder {folder} holds a run of {run.get('job')!r}, not of {job!r}: "
            "choose another --output"
        )
    earlier = run.get("config", {})
    changed = [
        name
        for name in changed_fields(earlier, config)
        # a setting that an earlier release did not have, and that is off, is no difference
        if name not in may_change and (name in earlier or config[name])
    ]
    if not changed:
        return run
    if run.get("status") == "failed" and list_files(folder) == [FILE_NAME]:
        return None
    name = changed[0]
    raise InputError(
        f"output folder {folder} holds another run: its {name} is "
        f"{run.get('config', {}).get(name)!r}, this one's is {_plain(config).get(name)!r}: "
        "choose another --output, or delete that folder"
    )


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which two configurations differ, as JSON sees them."""
    before, after = _plain(old), _plain(new)
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@functools.cache
def source_digest() -> str:
    """SHA-256 over the Python files that run here: a submitted checkout has no commit to name."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for name in _SOURCE for p in (root / name).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config), default=str))
