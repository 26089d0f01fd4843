#!/usr/bin/env bash
# ranx 0.3.21: fuse(method="condorcet") of runs that do not all hold the same documents gives another
# ranking in each Python process, on the same runs: it sorts a set of strings, whose order Python draws
# anew at each start, and its comparison counts a run that has neither of two documents for the second
# of them, so that what comes first depends on who is asked. A document that is below another wherever
# both are found can be ranked above it. PYTHONHASHSEED makes it repeatable, not right; rrf gives one
# ranking, and so does condorcet where every run holds every document.
#
# Guess that failed: ties fall otherwise at most, and a document that no run prefers stays below
# Seen, three runs of six documents that overlap by two, in four processes: four rankings (as
#   defnghijkbcaml of a to n), each with some of a to d turned round, which one run alone holds, in
#   that order; rrf: one ranking; condorcet where every run holds every document: one
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    ranx==0.3.21 numba==0.68.1 numpy==2.4.6
cat > "$folder/fuse.py" <<'PY'
from ranx import Run, fuse

# The documents a to n: a to f, e to j and i to n, so that a is never behind b, b never behind c, ...
names = "abcdefghijklmn"
overlap = [names[:6], names[4:10], names[8:]]
whole = [names, names[:2] + names[:1:-1], names]
for parts, method in ((overlap, "condorcet"), (overlap, "rrf"), (whole, "condorcet")):
    runs = [Run({"q": {name: 99.0 - place for place, name in enumerate(part)}}) for part in parts]
    print("".join(fuse(runs, norm=None, method=method)["q"]))
PY
"$folder/venv/bin/python" - "$folder" <<'PY'
import os
import subprocess
import sys
from importlib.metadata import version


def rankings(seed):
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, f"{sys.argv[1]}/fuse.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()[-3:]


def turned(order):
    """Whether one of a to d, which only the first run holds, stands above another that it is behind."""
    found = [name for name in order if name in "abcd"]
    return found != sorted(found)


condorcet, rrf, whole = zip(*map(rankings, range(4)), strict=True)
seen = {
    "condorcet": len(set(condorcet)),
    "turned": sum(map(turned, condorcet)),
    "rrf": len(set(rrf)),
    "every document in every run": len(set(whole)),
}
print(version("ranx"), seen, condorcet)
wanted = {"condorcet": 4, "turned": 4, "rrf": 1, "every document in every run": 1}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
