#!/usr/bin/env bash
# milvus-lite 3.2.2 (pymilvus 3.0.2): an upsert of a known id that leaves fields out sets the fields of
# the schema to null but keeps those that the schema does not name (dynamic fields) from the row that
# was there. The row is a mixture of both documents: a new text with the language, the source or the
# cluster of the old one.
#
# Guess that failed: the new row replaces the old one whole.
# Seen (row n 3, extra "old"; upsert without either): n None, extra "old"
#   insert of the same id: n None, extra absent
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


def row_after(write, name):
    schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
    schema.add_field("n", DataType.INT64, nullable=True)
    index = client.prepare_index_params()
    index.add_index("v", index_type="FLAT", metric_type="L2")
    client.create_collection(name, schema=schema, index_params=index)
    client.insert(name, [{"id": 1, "v": [1.0, 1.0], "n": 3, "extra": "old"}])
    write(name, [{"id": 1, "v": [2.0, 2.0]}])
    row = client.get(name, [1])[0]
    return [list(map(float, row["v"])), row["n"], row.get("extra", "absent")]


seen = {"upsert": row_after(client.upsert, "a"), "insert": row_after(client.insert, "b")}
print(importlib.metadata.version("milvus-lite"), seen)
wanted = {"upsert": [[2.0, 2.0], None, "old"], "insert": [[2.0, 2.0], None, "absent"]}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
