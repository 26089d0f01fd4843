"""The most memory that a process has held, as Linux keeps it in ``/proc``.

Not by ``getrusage``: there a process begins at what its parent had held when it started it, and
nothing makes it forget.
"""

import atexit
import runpy
import sys
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """The most memory that this process has held since it began or since :func:`forget_peak`."""
    return 1024 * int(_STATUS.read_text().split("VmHWM:")[1].split()[0])


def forget_peak() -> None:
    """Let the peak be what the process holds now."""
    _FORGET.write_text("5")


if __name__ == "__main__":  # run another script and say at its end what it held, on stderr
    sys.argv = sys.argv[1:]
    atexit.register(lambda: print(peak_bytes(), file=sys.stderr))
    if sys.argv:
        runpy.run_path(sys.argv[0], run_name="__main__")
