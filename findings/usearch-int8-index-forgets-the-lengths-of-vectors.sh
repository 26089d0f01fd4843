#!/usr/bin/env bash
# usearch 2.26.6: an index of dtype "i8" scales every float vector to unit length by itself before it
# rounds, whatever the metric. By squared Euclidean distance (3, 4), (0.6, 0.8) and (30, 40) are at
# distance 0 of each other, so the nearest neighbour is arbitrary; by inner product they all score the
# same, and the score is of the rounded integers (-15976), not of the vectors. No warning.
#
# Guess that failed: numbers beyond -1 and 1 are cut off there, shorter vectors stay shorter.
# Seen, query (3, 4): i8 distances 0, 0, 0; f32 distances 0, 16, 2025
#   inner product, i8: all -15976; f32: -24, -4, -249
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    usearch==2.26.6 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import usearch
from usearch.index import Index

vectors = np.array([[3, 4], [0.6, 0.8], [30, 40]], dtype=np.float32)


def distances(metric, dtype):
    index = Index(ndim=2, metric=metric, dtype=dtype)
    index.add(np.arange(3), vectors)
    found = index.search(vectors[0], 3)
    by_key = dict(zip(found.keys.tolist(), found.distances.tolist(), strict=True))
    return [round(by_key[key]) for key in range(3)]


seen = {f"{m} {d}": distances(m, d) for m in ("l2sq", "ip") for d in ("i8", "f32")}
print(usearch.__version__, seen)
wanted = {
    "l2sq i8": [0, 0, 0],
    "l2sq f32": [0, 16, 2025],
    "ip i8": [-15976, -15976, -15976],
    "ip f32": [-24, -4, -249],
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
