#!/usr/bin/env bash
# faiss-cpu 1.15.1: IndexFlatIP gives rows of equal score in falling order of their ids, IndexFlatL2 in
# rising order. It keeps the k lowest ids and turns them round, so the first hit changes with k: among
# copies of the query the best of one is row 0, the best of five row 4, the best of twenty row 19. Who
# keeps "the first" of several copies keeps another one by inner product than by L2, and by another k.
#
# Guess that failed: rising ids by both, and the same first hit for every k.
# Seen (50 equal unit vectors), first three ids for k = 1, 5, 20:
#   L2 [0], [0, 1, 2], [0, 1, 2]; inner product [0], [4, 3, 2], [19, 18, 17]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    faiss-cpu==1.15.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import faiss
import numpy as np

copies = np.zeros((50, 8), dtype=np.float32)
copies[:, 0] = 1


def first_ids(index):
    index.add(copies)
    return [index.search(copies[:1], k)[1][0][:3].tolist() for k in (1, 5, 20)]


seen = {"L2": first_ids(faiss.IndexFlatL2(8)), "inner product": first_ids(faiss.IndexFlatIP(8))}
print(faiss.__version__, seen)
wanted = {"L2": [[0], [0, 1, 2], [0, 1, 2]], "inner product": [[0], [4, 3, 2], [19, 18, 17]]}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
