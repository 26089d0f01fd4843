#!/usr/bin/env bash
# sparse-dot-topn 1.2.0: sp_matmul_topn without a threshold returns no product that is negative, where the
# values are floats: a row whose best products are below 0 gets fewer than top_n entries, or none at all,
# and so looks as if it had no neighbour. The README says that "threshold" is off by default so that
# matrices with negative values work. Integers do work, and so does sp_matmul; for floats a threshold
# below every product brings the entries back. zip_sp_matmul_topn, which joins the results of blocks,
# takes no threshold and loses them again, although every block has them.
#
# Guess that failed: the top_n greatest products of each row, whatever their sign, as of a dense matrix
# Seen, 6 unit vectors against each other, top 4, one of them at obtuse angles to the other five: rows of
#   4, 4, 1, 4, 3 and 4 entries; 4 in each with threshold=-2 and for the vectors as integers; 4, 4, 1, 4, 3
#   and 4 again by zip of two blocks with threshold=-2; two floats whose products are all negative: none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    sparse-dot-topn==1.2.0 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from scipy.sparse import csr_matrix
from sparse_dot_topn import sp_matmul, sp_matmul_topn, zip_sp_matmul_topn

vectors = np.random.default_rng(0).normal(size=(6, 3))
vectors -= vectors.mean(axis=1, keepdims=True)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
rows, columns = csr_matrix(vectors), csr_matrix(vectors.T)
whole = np.rint(vectors * 1000).astype(np.int64)
blocks = [
    sp_matmul_topn(rows, csr_matrix(vectors[part].T), 4, threshold=-2.0)
    for part in (slice(0, 3), slice(3, 6))
]
one, two = csr_matrix([[-1.0], [-2.0]]), csr_matrix([[1.0, 2.0, 3.0]])


def entries(matrix):
    return np.diff(matrix.indptr).tolist()


seen = {
    "by default": entries(sp_matmul_topn(rows, columns, 4)),
    "threshold": entries(sp_matmul_topn(rows, columns, 4, threshold=-2.0)),
    "integers": entries(sp_matmul_topn(csr_matrix(whole), csr_matrix(whole.T), 4)),
    "blocks": (np.array(entries(blocks[0])) + entries(blocks[1])).tolist(),
    "blocks joined": entries(zip_sp_matmul_topn(4, blocks)),
    "all negative": entries(sp_matmul_topn(one, two, 2)),
    "all negative, every one": entries(sp_matmul(one, two)),
}
print(version("sparse-dot-topn"), seen)
print((vectors @ vectors.T).round(2))
wanted = {
    "by default": [4, 4, 1, 4, 3, 4],
    "threshold": [4] * 6,
    "integers": [4] * 6,
    "blocks": [6] * 6,
    "blocks joined": [4, 4, 1, 4, 3, 4],
    "all negative": [0, 0],
    "all negative, every one": [3, 3],
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
