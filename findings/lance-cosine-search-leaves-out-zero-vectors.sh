#!/usr/bin/env bash
# pylance 14.0.2: a search by cosine never returns a row whose vector is all zeros, however many
# rows are asked for, and a query of zeros finds nothing at all. No error, no warning, no null: the
# answer is shorter. By L2 and by dot product the same rows are found; FAISS, hnswlib and usearch
# return them by cosine too, at distance 1. The rows count as indexed all the same.
#
# Seen (10 rows, one of zeros, 10 asked for):
#   cosine 9 rows, l2 10 rows, dot 10 rows, cosine of a zero query 0 rows
#   with an IVF_FLAT index over 5000 rows, 500 of zeros: 4500 rows found, 5000 said to be indexed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pylance==14.0.2 numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import lance
import numpy as np
import pyarrow as pa

WIDTH = 8
random = np.random.default_rng(0)


def dataset(vectors, name):
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
    table = pa.table({"id": np.arange(len(vectors)), "vector": column})
    return lance.write_dataset(table, f"{sys.argv[1]}/{name}")


def rows(data, query, metric, k, **more):
    nearest = {"column": "vector", "q": query, "k": k, "metric": metric, **more}
    return data.to_table(columns=["id"], nearest=nearest).num_rows


few = random.normal(size=(10, WIDTH)).astype(np.float32)
few[3] = 0
data = dataset(few, "few")
seen = {metric: rows(data, few[0], metric, 10) for metric in ("cosine", "l2", "dot")}
seen["zero query"] = rows(data, few[3], "cosine", 10)

many = random.normal(size=(5000, WIDTH)).astype(np.float32)
many[:500] = 0
data = dataset(many, "many")
data.create_index("vector", "IVF_FLAT", metric="cosine", num_partitions=4, name="vectors")
seen["by index"] = rows(data, many[700], "cosine", 5000, nprobes=4)
seen["indexed"] = data.stats.index_stats("vectors")["num_indexed_rows"]

print(lance.__version__, seen)
wanted = {"cosine": 9, "l2": 10, "dot": 10, "zero query": 0, "by index": 4500, "indexed": 5000}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
