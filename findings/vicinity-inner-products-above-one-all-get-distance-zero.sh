#!/usr/bin/env bash
# vicinity 0.4.6: with metric="inner_product" (usearch, its only backend for it) every hit whose inner
# product with the query is 1 or more comes back at distance 0: the backend's distance is one minus the
# product, and vicinity raises what is below 0 to 0. For vectors that are not of unit length, for which
# one chooses this metric, the best hits so all have the same distance; who merges the hits of several
# indexes by it, or takes a margin or a threshold from it, gets any order. usearch by itself gives the
# distances. query_threshold does the same.
#
# Guess that failed: the distances of the backend, since those of this metric are below 0 by right
# Seen, inner products 25, 12 and 3 with the query: vicinity 0, 0, 0; usearch -24, -11, -2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    vicinity==0.4.6 usearch==2.26.6 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from usearch.index import Index
from vicinity import Backend, Vicinity

vectors = np.array([[1, 0], [3, 4], [0, 3]], dtype=np.float32)
query = vectors[1]

index = Vicinity.from_vectors_and_items(
    vectors, ["short", "query", "middle"], backend_type=Backend.USEARCH, metric="inner_product"
)
plain = Index(ndim=2, metric="ip", dtype="f32")
plain.add(np.arange(3), vectors)
seen = {
    "query": [(item, round(float(distance), 1)) for item, distance in index.query(query, k=3)[0]],
    "threshold": [round(float(distance), 1) for _, distance in index.query_threshold(query, threshold=0.5)[0]],
    "usearch": [round(float(distance), 1) for distance in plain.search(query, 3).distances],
}
print(version("vicinity"), seen)
wanted = {
    "query": [("query", 0.0), ("middle", 0.0), ("short", 0.0)],
    "threshold": [0.0, 0.0, 0.0],
    "usearch": [-24.0, -11.0, -2.0],
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
