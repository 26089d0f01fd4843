#!/usr/bin/env bash
# clusim 0.4: southwood_index of two equal clusterings is 1, the greatest value that its docs name
# ("between 0 and 1.0"), but it is the ratio of pairs that both join to pairs that only one joins, which
# has no upper end: clusterings that differ a little get more than 1, the more the nearer they are, until
# they are equal and fall to 1. Who takes the clustering of the greatest index takes one with an error and
# leaves the right one. Its other pair-counting indices (Jaccard, Rand, Fowlkes-Mallows) are greatest at 1.
#
# Guess that failed: some form of the ratio that stays in [0, 1] and is greatest for equal clusterings
# Seen, four clusters of 10 against themselves with 0, 1, 2 and 5 elements in the next cluster: Southwood
#   1, 9, 4.56 and 2.07; Jaccard 1, 0.9, 0.82 and 0.67
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    clusim==0.4 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

from clusim.clustering import Clustering
from clusim.sim import jaccard_index, southwood_index

right = [element // 10 for element in range(40)]


def index(measure, wrong):
    found = [(cluster + 1) % 4 if element < wrong else cluster for element, cluster in enumerate(right)]
    pair = [Clustering().from_membership_list(labels) for labels in (right, found)]
    return round(float(measure(*pair)), 2)


seen = {
    measure.__name__: [index(measure, wrong) for wrong in (0, 1, 2, 5)]
    for measure in (southwood_index, jaccard_index)
}
print(version("clusim"), seen)
wanted = {"southwood_index": [1.0, 9.0, 4.56, 2.07], "jaccard_index": [1.0, 0.9, 0.82, 0.67]}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
