#!/usr/bin/env bash
# qdrant-client 1.20.0, local mode: a query that joins prefetches by Fusion.DBSF takes every score for
# one that is better when larger. Over Euclidean or Manhattan distances, where the smallest is the best,
# it ranks the farthest points first, and a limit drops the nearest. With cosine, and by Fusion.RRF with
# any of these distances, the nearest point is first. No warning.
#
# Guess that failed: distances are turned round before their normal distribution is taken, as order
#   and score_threshold of a plain query turn round for them
# Seen, four points at distances 0.1, 0.5, 2 and 9: plain query and RRF 0, 1, 2, 3; DBSF of the same
#   prefetch 3, 2, 1, 0, with scores 0.745 to 0.387; cosine 0, 1, 2, 3 by all three
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    qdrant-client==1.20.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

from qdrant_client import QdrantClient, models

client = QdrantClient(":memory:")
query = [1.0, 0.0]
seen = {}
for distance in (models.Distance.EUCLID, models.Distance.MANHATTAN, models.Distance.COSINE):
    client.create_collection(distance.value, vectors_config=models.VectorParams(size=2, distance=distance))
    points = [models.PointStruct(id=number, vector=[1, y]) for number, y in enumerate((0.1, 0.5, 2, 9))]
    client.upsert(distance.value, points)
    prefetch = [models.Prefetch(query=query, limit=4)]
    asked = {
        "plain": {"query": query},
        "rrf": {"prefetch": prefetch, "query": models.FusionQuery(fusion=models.Fusion.RRF)},
        "dbsf": {"prefetch": prefetch, "query": models.FusionQuery(fusion=models.Fusion.DBSF)},
    }
    seen[distance.value] = {
        name: [point.id for point in client.query_points(distance.value, limit=4, **words).points]
        for name, words in asked.items()
    }

print(version("qdrant-client"), seen)
near, far = [0, 1, 2, 3], [3, 2, 1, 0]
wanted = {name: {"plain": near, "rrf": near, "dbsf": far} for name in ("Euclid", "Manhattan")}
wanted["Cosine"] = {"plain": near, "rrf": near, "dbsf": near}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
