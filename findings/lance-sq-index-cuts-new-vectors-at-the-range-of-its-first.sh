#!/usr/bin/env bash
# pylance 14.0.2: an IVF_SQ index keeps the least and greatest number of the vectors that it was made
# from. Vectors that are appended later and taken in by optimize_indices are cut off at that range
# before they are rounded, and so is the query: three new vectors 10 apart from each other come back at
# distance 0, in the order of their ids. No warning, and no row counts as unindexed. Before the update
# they are found exactly, as unindexed rows are; with refine_factor, or once the index is made anew,
# they are found rightly too.
#
# Guess that failed: an update widens the range, or such rows are left to the exact search.
# Seen, query (30, 0), ids with squared distances:
#   before 1002: 0, 1001: 100, 1000: 400; updated 1000: 0, 1001: 0, 1002: 0; anew as before
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pylance==14.0.2 pyarrow==26.0.1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/vectors.lance" <<'PY'
import sys

import lance
import numpy as np
import pyarrow as pa

path = sys.argv[1]


def rows(vectors, first):
    numbers = pa.array(np.asarray(vectors, dtype=np.float32).ravel())
    column = pa.FixedSizeListArray.from_arrays(numbers, 2)
    return pa.table({"id": np.arange(first, first + len(column)), "vector": column})


def nearest():
    query = {"column": "vector", "q": np.array([30, 0], dtype=np.float32), "k": 3}
    found = lance.dataset(path).to_table(nearest=query)
    return dict(zip(found["id"].to_pylist(), found["_distance"].to_pylist(), strict=True))


lance.write_dataset(rows(np.random.default_rng(0).random((1000, 2)), 0), path)
lance.dataset(path).create_index("vector", "IVF_SQ", num_partitions=1, metric="l2")
lance.write_dataset(rows([[10, 0], [20, 0], [30, 0]], 1000), path, mode="append")
seen = {"before": nearest()}
lance.dataset(path).optimize.optimize_indices()
seen["updated"] = nearest()
lance.dataset(path).create_index(
    "vector", "IVF_SQ", num_partitions=1, metric="l2", replace=True
)
seen["anew"] = nearest()
print(lance.__version__, seen)
right = {1002: 0, 1001: 100, 1000: 400}
wanted = {"before": right, "updated": {1000: 0, 1001: 0, 1002: 0}, "anew": right}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
