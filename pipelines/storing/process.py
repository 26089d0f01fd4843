"""Which process of which machine: whether the holder of a lease can still be alive."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path


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
