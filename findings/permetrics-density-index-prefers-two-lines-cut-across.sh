#!/usr/bin/env bash
# permetrics 2.1.0: its density-based clustering validation index (DBCVI, "valid for arbitrarily shaped
# clusters" and after Moulavi et al., its source says) takes the core distance of a point from the far
# points of its cluster, where the published index takes it from the near ones: it averages the powers of
# the distances, not of their inverses. In a long cluster every point so is far from dense, even from its
# next neighbour, and the index of long clusters that are well apart is negative, while that of their
# halves, cut across, which are compact but touch each other, is positive. Round blobs come out about right.
#
# Guess that failed: the one index of the package that finds elongated clusters better than their halves
# Seen, two rows of 60 points, 10 long and 2 apart, in four orders: the rows -0.17 to -0.43, the halves
#   -0.1 to 0.33, higher in each order; with the inverse powers the rows 0.6 and the halves -0.41 to -0.57
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
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist


def published(points, labels):
    """DBCV of Moulavi et al. (2014), without noise."""
    near, clusters = cdist(points, points), [np.flatnonzero(labels == label) for label in np.unique(labels)]
    core = np.zeros(len(points))
    for rows in clusters:
        others = near[np.ix_(rows, rows)].copy()
        np.fill_diagonal(others, np.inf)
        dimensions = points.shape[1]
        core[rows] = (np.sum(others**-dimensions, axis=1) / (len(rows) - 1)) ** (-1 / dimensions)
    reach = np.maximum(near, np.maximum(core[:, None], core[None]))
    inner, sparse = [], []
    for rows in clusters:
        tree = minimum_spanning_tree(reach[np.ix_(rows, rows)]).toarray()
        tree += tree.T
        inside = np.sum(tree > 0, axis=0) > 1
        inner.append(rows[inside])
        sparse.append(tree[np.ix_(inside, inside)].max())
    total = 0.0
    for rows, mine, width in zip(clusters, inner, sparse, strict=True):
        gap = min(reach[np.ix_(mine, other)].min() for other in inner if other is not mine)
        total += len(rows) / len(points) * (gap - width) / max(gap, width)
    return total


along = np.tile(np.linspace(0, 10, 60), 2)
row = np.repeat([0, 1], 60)
points = np.c_[along, 2.0 * row] + np.random.default_rng(1).normal(0, 0.02, (120, 2))
half = (along > 5).astype(int)


def scores(labels):
    """Of the package and of the published formula, in four orders of the same rows."""
    pairs = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(120)
        index = ClusteringMetric(X=points[order], y_pred=labels[order]).DBCVI()
        pairs.append((float(index), float(published(points[order], labels[order]))))
    return np.array(pairs).T


rows, halves = scores(row), scores(half)
print(version("permetrics"), "rows", rows.round(2).tolist(), "halves", halves.round(2).tolist())
seen = {
    "rows below 0": bool((rows[0] < -0.1).all()),
    "halves above rows": bool((halves[0] > rows[0] + 0.2).all()),
    "published, rows above halves by 0.9": bool((rows[1] > halves[1] + 0.9).all()),
}
print(seen)
sys.exit(0 if all(seen.values()) else "the behaviour changed: all of these were seen before")
PY
