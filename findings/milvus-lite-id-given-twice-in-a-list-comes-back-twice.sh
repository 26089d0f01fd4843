#!/usr/bin/env bash
# milvus-lite 3.2.2 (pymilvus 3.0.2): `id in [0, 0, 2]` on the primary key returns row 0 twice, and the
# same list on another field returns it once. Ids gathered from several searches and looked up in one
# filter so give repeated rows: counts, sums and joins over them are too large, without an error.
#
# Guess that failed: a filter selects rows, each once.
# Seen: id in [0, 0, 2] [0, 0, 2]; n in [0, 0, 2] [0, 2]; id in [0, 2] [0, 2]
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
schema.add_field("n", DataType.INT64)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="L2")
client.create_collection("t", schema=schema, index_params=index)
client.insert("t", [{"id": i, "v": [i, 1.0], "n": i} for i in range(3)])


def ids(condition):
    return [row["id"] for row in client.query("t", condition, output_fields=["id"])]


seen = {c: ids(c) for c in ("id in [0, 0, 2]", "n in [0, 0, 2]", "id in [0, 2]")}
print(importlib.metadata.version("milvus-lite"), seen)
wanted = dict(zip(seen, [[0, 0, 2], [0, 2], [0, 2]], strict=True))
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
