#!/usr/bin/env bash
# ray 2.60.0: a process that has defined one actor class, or only imported ray.data or ray.train, which
# define some, has seeded the generator that Ray draws its ids from. Children forked from it (fork and
# forkserver of multiprocessing, a preloading web server) all go on from that one state: whatever they
# name at random gets the same ids, in every child, each a driver of its own on one cluster. With
# nothing but `import ray` before the fork, the children differ. Spawned processes always differ.
#
# Guess that failed: ids called random differ between processes, as uuid4 does after a fork
# Seen, three children that each draw one object id: 3 different ones after import ray, 1 and the same
# after import ray.data, 1 and the same after the definition of an actor class
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat > "$folder/draw.py" <<'PY'
import os
import sys

import ray

if sys.argv[1] == "ray.data":
    import ray.data
if sys.argv[1] == "actor class":

    @ray.remote
    class Counter:
        pass


drawn = set()
for _ in range(3):
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.write(writes, ray.ObjectID.from_random().hex().encode())
        os._exit(0)
    drawn.add(os.read(reads, 100))
    os.wait()
print(len(drawn))
PY
seen=""
for before in "only ray" ray.data "actor class"; do
    count=$("$folder/venv/bin/python" "$folder/draw.py" "$before")
    echo "$before: $count different ids of 3 children"
    seen="$seen$count"
done
[ "$seen" = 311 ] || { echo "the behaviour changed: 3, 1 and 1 were seen before"; exit 1; }
