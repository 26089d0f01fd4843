#!/usr/bin/env bash
# ngt 2.8.0.post1 (ngtpy): an index of "Inner Product" keeps the length of the longest vector of its
# first batch. Vectors that are added later and are longer than that are taken in without an error
# and not found: the search puts them behind others although their inner product is the greatest, and so
# does linear_search, which computes all. In one batch with the others, or before them, they are found. A
# nightly batch with one vector longer than all of the first is so lost to search.
#
# Guess that failed: the exact search at least ranks by the inner product, whatever came when
# Seen, 200 vectors and 5 that are 5 to 50 times as long, one of which is the best for each of three
#   queries: it is the first hit of 3 where all came in one batch; where the long ones came later, of 0,
#   and of 0 among the first five, by search and by linear_search
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ngt==2.8.0.post1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from importlib.metadata import version

import ngtpy
import numpy as np

random = np.random.default_rng(5)
vectors = random.normal(size=(200, 8)).astype(np.float32)
long = vectors[:5] * np.array([[5], [8], [10], [20], [50]], dtype=np.float32)
queries = [vectors[0], vectors[3], random.normal(size=8).astype(np.float32)]
best = [int(np.argmax(np.concatenate([vectors, long]) @ query)) for query in queries]


def found(name, *batches):
    """Of how many queries the best row is the first, and among the first five, and so by linear_search."""
    path = f"{sys.argv[1]}/{name}"
    ngtpy.create(path, 8, distance_type="Inner Product")
    index = ngtpy.Index(path)
    for batch in batches:
        index.batch_insert(batch)
    counts = []
    for search in (lambda query: index.search(query, 5, epsilon=0.5), lambda query: index.linear_search(query, 5)):
        hits = [[row for row, _ in search(query)] for query in queries]
        counts.append(sum(hit[0] == row for hit, row in zip(hits, best, strict=True)))
        counts.append(sum(row in hit for hit, row in zip(hits, best, strict=True)))
    return counts


seen = {
    "one batch": found("one", np.concatenate([vectors, long])),
    "later": found("later", vectors, long),
}
print(version("ngt"), best, seen)
wanted = {"one batch": [3, 3, 3, 3], "later": [0, 0, 0, 0]}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
