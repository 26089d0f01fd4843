#!/usr/bin/env bash
# milvus-lite 3.2.2 (pymilvus 3.0.2): a row whose field is null is returned by `n not in [1]` and not
# by `n != 1` nor by `not (n == 1)`, so two filters that say the same give different rows. A list filter
# that is rewritten as a comparison, or the other way round, silently gains or loses the null rows.
#
# Guess that failed: null is neither in nor not in a list, as in SQL and as in its own `!=`.
# Seen (n is 1, null, 3): n != 1 [2]; not (n == 1) [2]; n not in [1] [1, 2]; n in [1] [0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    milvus-lite==3.2.2 pymilvus==3.0.2 "setuptools<81"
"$folder/venv/bin/python" - "$folder" <<'PY'
import importlib.metadata
import sys

from pymilvus import DataType, MilvusClient

client = MilvusClient(f"{sys.argv[1]}/m.db")
schema = client.create_schema(auto_id=False)
schema.add_field("id", DataType.INT64, is_primary=True)
schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
schema.add_field("n", DataType.INT64, nullable=True)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="L2")
client.create_collection("t", schema=schema, index_params=index)
client.insert("t", [{"id": i, "v": [i, 1.0], "n": n} for i, n in enumerate((1, None, 3))])


def ids(condition):
    return [row["id"] for row in client.query("t", condition, output_fields=["id"])]


seen = {c: ids(c) for c in ("n != 1", "not (n == 1)", "n not in [1]", "n in [1]", "n is null")}
print(importlib.metadata.version("milvus-lite"), seen)
wanted = dict(zip(seen, [[2], [2], [1, 2], [0], [1]], strict=True))
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
