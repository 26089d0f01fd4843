"""The right to write to a store: one holder at a time, renewed while it lives.

Each lease is a file ``lease/NNNNNNNN.json`` with the next number, which only one taker can create;
the highest number holds. Its holder rewrites it to renew it and, at the end, to give it back. A
lease that is not renewed for its ``ttl_seconds`` is over, and so is one whose holder is known to be
dead. The highest file is never removed: numbers only grow.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelines.runtime.files import (
    create_exclusively,
    join,
    json_bytes,
    list_numbered,
    numbered_file,
    read_bytes,
    remove_files,
    write_bytes,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told from any other that ever had its number.

    ``machine`` is the machine's boot and the process's namespace of numbers, ``started`` the
    process's start in ticks after boot. Both are empty where the system does not say.
    """

    host: str
    pid: int
    machine: str = ""
    started: str = ""

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """The identity of a process of this machine."""
        return cls(socket.gethostname(), pid, _machine(), _start_of(pid) or "")

    def is_dead(self) -> bool:
        """Whether it is certain that it no longer runs; False for processes of other machines."""
        if not self.machine or not self.started or self.machine != _machine():
            return False
        return _start_of(self.pid) != self.started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """When a process started; None for one that is gone or waits to be buried."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = after_name[0], after_name[19]
    return None if state in ("Z", "X") else started


_FOLDER = "lease"
_RENEWALS_A_TTL = 4


class LeaseHeldError(RuntimeError):
    """Another run holds the lease: come back later."""

    exit_code = 75


class LeaseLostError(RuntimeError):
    """The lease was taken over, or could not be renewed in time: stop writing."""

    exit_code = 75


@dataclass(frozen=True)
class LeaseState:
    """What a lease's file says. Times are seconds since 1970 by the holder's clock."""

    number: int
    job: str
    host: str
    pid: int
    machine: str
    started: str
    taken_at: float
    renewed_at: float
    ttl_seconds: float
    released: bool = False

    @property
    def holder(self) -> ProcessIdentity:
        """The process that took it."""
        return ProcessIdentity(self.host, self.pid, self.machine, self.started)

    def is_over(self, now: float) -> bool:
        """Whether another may take the next lease."""
        expired = now > self.renewed_at + self.ttl_seconds
        return self.released or expired or self.holder.is_dead()

    def describe(self, now: float) -> str:
        """Who holds it since when, for people."""
        since = datetime.fromtimestamp(self.taken_at, UTC).isoformat(timespec="seconds")
        return (
            f"{self.job!r} on {self.host} (process {self.pid}) since {since}, renewed "
            f"{max(0.0, now - self.renewed_at):.0f} s ago"
        )


class Lease:
    """The right to write to a store; leaving its context gives it back."""

    def __init__(self, store: str, state: LeaseState) -> None:
        self._store = store
        self._state = state
        self._renewed = time.monotonic()
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._thread.start()

    @property
    def state(self) -> LeaseState:
        """As last written."""
        return self._state

    def check(self) -> None:
        """Raise :class:`LeaseLostError` unless this is still the holder."""
        self._look()
        if self._lost:
            raise LeaseLostError(
                f"{self._store}: the lease of {self._state.job!r} is lost: {self._lost}. What was "
                "published stays; run the same command again"
            )

    def release(self) -> None:
        """Give the lease back; further writing is an error."""
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self._write(replace(self._state, released=True))
            self._lost = "it was given back"

    def _look(self) -> None:
        if self._lost:
            return
        newest = newest_lease(self._store)
        if newest is None or newest.number != self._state.number:
            taken_by = "its file is gone" if newest is None else newest.describe(time.time())
            self._lost = f"taken over by {taken_by}" if newest else taken_by
        elif time.monotonic() - self._renewed > self._state.ttl_seconds:
            self._lost = f"it could not be renewed for {self._state.ttl_seconds:.0f} s"

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._state.ttl_seconds / _RENEWALS_A_TTL):
            try:
                self._look()
                if self._lost:
                    return
                self._write(replace(self._state, renewed_at=time.time()))
                self._renewed = time.monotonic()
            except OSError as error:
                log.warning("cannot renew the lease of %s: %s", self._store, error)

    def _write(self, state: LeaseState) -> None:
        write_bytes(_path(self._store, state.number), json_bytes(asdict(state)))
        self._state = state

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def take_lease(store: str, job: str, ttl_seconds: float) -> Lease:
    """The lease of a store; :class:`LeaseHeldError` while another holder has it.

    Args:
        store: address of the store's folder.
        job: who takes it, for the message to others.
        ttl_seconds: how long it outlives its holder. Clocks of machines must agree much better.
    """
    while True:
        now = time.time()
        newest = newest_lease(store)
        if newest is not None and not newest.is_over(now):
            left = newest.renewed_at + newest.ttl_seconds - now
            raise LeaseHeldError(
                f"{store} is being written by {newest.describe(now)}. Wait for it to end; if it "
                f"is dead, its lease ends by itself in {left:.0f} s"
            )
        number = 1 if newest is None else newest.number + 1
        process = asdict(ProcessIdentity.of(os.getpid()))
        state = LeaseState(
            number, job, **process, taken_at=now, renewed_at=now, ttl_seconds=ttl_seconds
        )
        # Another may have created, ended and superseded this number meanwhile: look once more.
        if create_exclusively(_path(store, number), json_bytes(asdict(state))):
            after = newest_lease(store)
            if after is not None and after.number == number:
                _remove_older(store, number)
                if newest is not None and not newest.released:
                    log.warning("took over the lease of %s", newest.describe(now))
                return Lease(store, state)


def newest_lease(store: str) -> LeaseState | None:
    """The lease with the highest number, held or over; None where there was never one."""
    while True:
        paths = list(list_numbered(join(store, _FOLDER)).values())
        if not paths:
            return None
        try:
            return LeaseState(**json.loads(read_bytes(paths[-1])))
        except FileNotFoundError:
            continue  # superseded and removed between listing and reading


def _remove_older(store: str, number: int) -> None:
    paths = list_numbered(join(store, _FOLDER))
    try:
        remove_files([path for other, path in paths.items() if other < number])
    except FileNotFoundError:
        log.info("older leases of %s were removed by another", store)


def _path(store: str, number: int) -> str:
    return numbered_file(join(store, _FOLDER), number)
