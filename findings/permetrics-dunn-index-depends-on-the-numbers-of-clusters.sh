#!/usr/bin/env bash
# permetrics 2.1.0: the Dunn index of one and the same clustering is another when its clusters get other
# numbers or names. By default ("use_modified") the distance of two clusters is that of the center of the
# one with the lower label to the nearest point of the other, and never the other way round; so of two
# runs of one algorithm that find the same clusters the one can look better. The docs say of the modified
# version only that it is faster. With use_modified=False the numbers do not matter, and the other indices
# (Davies-Bouldin, silhouette, Calinski-Harabasz, Xie-Beni) do not know them either.
#
# Guess that failed: a faster way to a distance that is still the same from both sides
# Seen, a tight cluster beside a wide one: 0.625 where the tight one is 0, 1.125 where it is 1 (by names the
#   alphabet decides: "tight" and "wide", "tight" and "broad"); use_modified=False: 0.625 for both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    permetrics==2.1.0 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
from permetrics import ClusteringMetric

points = np.array([[0.0, 0], [0, 1], [0, -1], [5, 0], [9, 0], [13, 0]])
tight_first, wide_first = [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]
names = (["tight"] * 3 + ["wide"] * 3, ["tight"] * 3 + ["broad"] * 3)


def both(index, labels=(tight_first, wide_first), **options):
    values = (getattr(ClusteringMetric(X=points, y_pred=np.array(y)), index)(**options) for y in labels)
    return tuple(round(float(value), 3) for value in values)


seen = {
    "dunn": both("DI"),
    "dunn, names": both("DI", names),
    "dunn, not modified": both("DI", use_modified=False),
    "silhouette": both("SI"),
    "davies-bouldin": both("DBI"),
}
print(version("permetrics"), seen)
wanted = {
    "dunn": (0.625, 1.125),
    "dunn, names": (0.625, 1.125),
    "dunn, not modified": (0.625, 0.625),
    "silhouette": (0.583, 0.583),
    "davies-bouldin": (0.37, 0.37),
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
