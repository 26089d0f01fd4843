#!/usr/bin/env bash
# pacmap 0.9.1: distance="angular" does not compare the directions of the vectors that it is given. They
# are moved so that their mean is the origin first (with and without apply_pca, and on transform), and
# the angles are taken there. Vectors of one direction and different lengths, which angular distance
# cannot tell apart, so lie on both sides of the new origin and become each other's opposites. Embeddings
# whose lengths differ get neighbours across topics; scaled to unit length first they get the right ones,
# by "angular" and by "euclidean" alike. No warning.
#
# Guess that failed: the neighbours for this metric are those of greatest cosine similarity
# Seen, 10 topics as directions near a common one, 400 vectors of lengths 0.2 to 5 in 64 dimensions, share
#   of the neighbour pairs within a topic: ten nearest by cosine 1.0; pairs of pacmap 0.937, 0.923 and 0.905
#   as the common direction gets stronger; of the same vectors at unit length 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pacmap==0.9.1 faiss-cpu==1.15.1 scikit-learn==1.9.1 numba==0.68.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
import pacmap

TOPICS, EACH, DIMENSIONS = 10, 40, 64
topics = np.repeat(np.arange(TOPICS), EACH)


def within_topics(pairs):
    return round(float((topics[pairs[:, 0]] == topics[pairs[:, 1]]).mean()), 3)


def by_cosine(unit):
    products = unit @ unit.T
    np.fill_diagonal(products, -2)
    nearest = np.argsort(-products, axis=1)[:, :10]
    return within_topics(np.column_stack([np.repeat(np.arange(len(unit)), 10), nearest.ravel()]))


def by_pacmap(vectors):
    model = pacmap.PaCMAP(n_neighbors=10, distance="angular", random_state=0, num_iters=(1, 1, 1))
    model.fit(vectors.copy())
    return within_topics(model.pair_neighbors)


seen = {}
for common_length in (1, 2, 4):
    random = np.random.default_rng(0)
    common = np.full(DIMENSIONS, common_length / DIMENSIONS**0.5)
    centers = common + 0.5 * random.normal(size=(TOPICS, DIMENSIONS)) / DIMENSIONS**0.5
    vectors = centers[topics] + 0.05 * random.normal(size=(len(topics), DIMENSIONS)) / DIMENSIONS**0.5
    lengths = random.uniform(0.2, 5, size=(len(topics), 1))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    seen[common_length] = [by_cosine(unit), by_pacmap((unit * lengths).astype(np.float32)), by_pacmap(unit)]

print(version("pacmap"), seen)
same = all(cosine == at_unit == 1.0 and 0.85 < moved < 0.97 for cosine, moved, at_unit in seen.values())
sys.exit(0 if same else "the behaviour changed: 0.937, 0.923 and 0.905 were seen between 1.0 and 1.0")
PY
