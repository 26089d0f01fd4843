#!/usr/bin/env bash
# usearch 2.26.6: Index.add(None, vectors) numbers the new vectors from the number of those that the
# index holds, not from its greatest key. After a remove that number is a key in use. With multi=True,
# where a key may have several vectors, the new vector silently becomes a second one of another document:
# searches for it answer with that document's id, and removing the one removes both. Without multi it is
# an error, so that after one remove no vector can be added without keys, save where the last was removed.
#
# Guess that failed: numbering goes on after the greatest key given, or takes the freed one first
# Seen, keys 0, 1, 2, key 0 removed, two more added: multi gives 2 and 3, key 2 has two vectors, a search
#   for the new vector finds 2, and removing 2 takes two away; without multi "Duplicate keys not allowed"
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

vectors = np.eye(5, dtype=np.float32)
seen = {}

index = Index(ndim=5, metric="cos", dtype="f32", multi=True)
seen["first"] = index.add(None, vectors[:3]).tolist()
index.remove(0)
seen["later"] = index.add(None, vectors[3:]).tolist()
seen["vectors of key 2"] = index.count(2)
found = index.search(vectors[3], 1)
seen["search for the first new one"] = (found.keys.tolist(), found.distances.round(3).tolist())
seen["removed with key 2"] = bool(index.remove(2))
seen["left"] = len(index)

single = Index(ndim=5, metric="cos", dtype="f32")
single.add(None, vectors[:3])
single.remove(0)
try:
    seen["without multi"] = single.add(None, vectors[3:]).tolist()
except RuntimeError as error:
    seen["without multi"] = str(error)

print(usearch.__version__, seen)
wanted = {
    "first": [0, 1, 2],
    "later": [2, 3],
    "vectors of key 2": 2,
    "search for the first new one": ([2], [0.0]),
    "removed with key 2": True,
    "left": 2,
    "without multi": "Duplicate keys not allowed in high-level wrappers",
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
