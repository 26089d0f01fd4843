#!/usr/bin/env bash
# Linux, Python 3.11 subprocess and resource:
# ru_maxrss of a child that subprocess started is at least what its parent had held by then. The
# child is a new program, yet exec keeps the peak of the memory that it leaves, and that is the
# parent's. A benchmark that draws its data and then measures each contestant in a process of its own
# reports its own data. VmHWM in /proc/self/status begins anew.
#
# Guess that failed: a new program's peak memory is its own.
# Seen (parent holds 400 MiB, child does nothing): ru_maxrss 425 MiB, VmHWM 8 MiB;
#   from a shell in between, which held little: ru_maxrss 8 MiB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.0
cat > "$folder/child.py" <<'PY'
import resource

peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with open("/proc/self/status") as status:
    own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
print(peak, own)
PY
"$folder/venv/bin/python" - "$folder/child.py" <<'PY'
import subprocess
import sys

import numpy as np

held = np.ones(400 << 17)


def peaks(command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


straight = peaks([sys.executable, sys.argv[1]])
shell = peaks(["bash", "-c", f"'{sys.executable}' '{sys.argv[1]}'; true"])
print("ru_maxrss and VmHWM in MiB:", straight, "through a shell:", shell)
if not (straight[0] >= 400 and straight[1] < 100 and shell[0] < 100):
    sys.exit("the behaviour changed")
PY
