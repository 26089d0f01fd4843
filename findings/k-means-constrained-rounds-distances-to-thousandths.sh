#!/usr/bin/env bash
# k-means-constrained 0.9.1: points are assigned by squared distances times 1,000, rounded and kept in 32
# bits. Multiplying all points by a number, which changes no cluster, so changes the result: where
# squared distances are of the order of a thousandth or less, points go anywhere; beyond 2.1 million
# (vectors 1,500 apart, as hidden states of language models can be) they no longer fit. The labels keep
# the sizes asked for, and nothing else tells: only the second case shows NumPy's warning of a cast.
#
# Guess that failed: the whole-number costs that its solver wants are scaled to the range of the data
# Seen, 60 points in 4 dimensions, sum of squared distances from the clusters' means in the points' own
#   unit: unit 1 and 100: 125.5; 1/10,000: 215.0; 1,000,000: 223.5; labels by chance: 227.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    k-means-constrained==0.9.1 ortools==9.15.6755 scikit-learn==1.9.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings
from importlib.metadata import version

import numpy as np
from k_means_constrained import KMeansConstrained

points = np.random.default_rng(0).normal(size=(60, 4))


def spread(labels):
    """Sum of squared distances from the means of the clusters, in the unit of the points above."""
    parts = [points[labels == label] for label in range(4)]
    return round(float(sum(((part - part.mean(axis=0)) ** 2).sum() for part in parts)), 1)


def fitted(unit):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = KMeansConstrained(4, size_min=12, size_max=18, random_state=0).fit(points * unit)
    return spread(model.labels_), any("invalid value" in str(one.message) for one in caught)


seen = {unit: fitted(unit) for unit in (1, 100, 1e-4, 1e6)}
chance = np.random.default_rng(1)
random_labels = [spread(chance.permutation(np.arange(60) % 4)) for _ in range(100)]
print(version("k-means-constrained"), seen, "by chance", round(float(np.mean(random_labels)), 1))
wanted = {1: (125.5, False), 100: (125.5, False), 1e-4: (215.0, False), 1e6: (223.5, True)}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
