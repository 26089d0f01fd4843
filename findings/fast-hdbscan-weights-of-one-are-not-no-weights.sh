#!/usr/bin/env bash
# fast-hdbscan 0.3.4: fit(x, sample_weight=ones) gives other clusters than fit(x), and which ones
# depends on the unit of the data: with weights it compares distances with squared distances (the core
# distances are not squared, all others are), so that 0.3 apart and 0.3 squared count as the same thing.
# Vectors shorter than 1 get core distances that are too large and merge into few clusters. There is no
# warning; with min_samples=1 the difference is small.
#
# Guess that failed: weights of one change nothing, and multiplying all vectors by ten neither
# Seen, four blobs, clusters found by unit (x 0.1, 1, 10, 100): without weights 4, 4, 4, 4;
#   with weights of one 2, 2, 4, 6. Five clusters of unit vectors: 5 without, 4 with
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    fast-hdbscan==0.3.4 scikit-learn==1.9.1 numba==0.68.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from fast_hdbscan import HDBSCAN
from sklearn.datasets import make_blobs


def clusters(vectors, weights=None):
    labels = HDBSCAN(min_cluster_size=10).fit(vectors, sample_weight=weights).labels_
    return int(labels.max()) + 1


ones = np.ones(300, dtype=np.float32)
blobs, _ = make_blobs(300, centers=4, cluster_std=[0.5, 0.7, 1, 0.6], random_state=1)
units = (0.1, 1, 10, 100)
random = np.random.default_rng(0)
directions = np.repeat(random.normal(size=(5, 16)), 60, axis=0) + random.normal(size=(300, 16)) * 0.45
directions /= np.linalg.norm(directions, axis=1, keepdims=True)

seen = {
    "no weights": [clusters(blobs * unit) for unit in units],
    "ones": [clusters(blobs * unit, ones) for unit in units],
    "unit vectors": (clusters(directions), clusters(directions, ones)),
}
print(version("fast-hdbscan"), seen)
wanted = {"no weights": [4, 4, 4, 4], "ones": [2, 2, 4, 6], "unit vectors": (5, 4)}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
