#!/usr/bin/env bash
# gensim 4.4.0: matutils.jaccard of two bags of words divides by the sum of all weights of both, and so
# counts what they share twice: no distance is below 0.5, a document has 0.5 to itself, and two that share
# half of their words have 0.75. Of two dense vectors it compares the sets of their values, whatever place
# these have: documents without a common word that count each word once have distance 0. The docs call
# both kinds a distribution vector, and the result a Jaccard distance in [0, 1] with 0 for the closest.
#
# Guess that failed: one minus the sum of the smaller weights over the sum of the greater ones, 0 for equals
# Seen: bags 0.5 (equal), 0.75 (half shared; 2/3 by definition), 1 (disjoint); the same as dense vectors
#   0, 0 and 0; as lists of ids alone 0, 2/3 and 1, as expected
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    gensim==4.4.0 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from gensim.matutils import corpus2dense, jaccard

one, half, other = ([(first, 1), (first + 1, 1)] for first in (0, 1, 2))
pairs = {"equal": (one, one), "half": (one, half), "disjoint": (one, other)}


def dense(bag):
    return corpus2dense([bag], num_terms=4).ravel()


def rule(left, right):
    left, right = dense(left), dense(right)
    return 1 - np.minimum(left, right).sum() / np.maximum(left, right).sum()


def ids(bag):
    return [word for word, _ in bag]


seen = {
    name: [
        round(float(value), 3)
        for value in (
            jaccard(left, right),
            jaccard(dense(left), dense(right)),
            jaccard(ids(left), ids(right)),
            rule(left, right),
        )
    ]
    for name, (left, right) in pairs.items()
}
print(version("gensim"), "bags, dense, ids, by definition:", seen)
wanted = {"equal": [0.5, 0.0, 0.0, 0.0], "half": [0.75, 0.0, 0.667, 0.667], "disjoint": [1.0, 0.0, 1.0, 1.0]}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
