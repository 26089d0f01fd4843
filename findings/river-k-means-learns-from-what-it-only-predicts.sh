#!/usr/bin/env bash
# river 0.26.1: cluster.KMeans.predict_one changes the model. Every feature of the point asked about that
# the model has not met gets a random coordinate in each of the centers, for good. Points that lack the
# feature, as all those learned until then, are compared with 0 against those coordinates from then on, and
# so can fall into another cluster: with words as features one query full of new words moves the documents
# between clusters, although nothing was learned. A second query of the same words changes nothing more.
#
# Guess that failed: predict_one only reads, as in scikit-learn, and features not met count for nothing
# Seen, 60 points in 2 features, 3 clusters, one predict_one of a point with 20 other features: 2
#   coordinates of each center before and 22 after; 25 of the 60 points then have another cluster, and one
#   cluster has none left
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    river==0.26.1 pandas==3.1.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import random
import sys
from importlib.metadata import version

from river import cluster

chance = random.Random(0)
points = [{0: chance.gauss(middle, 0.3), 1: chance.gauss(middle, 0.3)} for middle in (-2, 0, 2) * 20]
model = cluster.KMeans(n_clusters=3, halflife=0.1, seed=10)
for point in points:
    model.learn_one(point)


def sizes():
    return sorted(len(center) for center in model.centers.values())


before, labels = sizes(), [model.predict_one(point) for point in points]
model.predict_one({feature: 1.0 for feature in range(100, 120)})
after, moved = sizes(), [model.predict_one(point) for point in points]
model.predict_one({feature: 1.0 for feature in range(100, 120)})
seen = {
    "clusters": (len(set(labels)), len(set(moved))),
    "before": before,
    "after": after,
    "moved": sum(one != other for one, other in zip(labels, moved, strict=True)),
    "again": [model.predict_one(point) for point in points] == moved,
}
print(version("river"), seen)
wanted = {"clusters": (3, 2), "before": [2, 2, 2], "after": [22, 22, 22], "moved": 25, "again": True}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
