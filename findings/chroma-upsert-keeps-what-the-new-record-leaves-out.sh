#!/usr/bin/env bash
# chromadb 1.5.9: upsert of a known id merges. Metadata keys and the document that the new record does
# not give stay from the old record, so after a new run without a cluster or a language the old one is
# still there, and filters still find it. Only delete and add (or a key of value None) takes it away.
#
# Guess that failed: upsert replaces the record, as add does for a new id.
# Seen (old {"cluster": 7, "lang": "de"}, document "old"; upsert of {"lang": "en"} without document):
#   metadata {"cluster": 7, "lang": "en"}, document "old", found by where cluster == 7
#   after delete and add: {"lang": "en"}, no document, not found
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    chromadb==1.5.9
"$folder/venv/bin/python" - <<'PY'
import sys

import chromadb

client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
records = client.create_collection("records", embedding_function=None)
old = {"cluster": 7, "lang": "de"}
records.add(ids=["a"], embeddings=[[1.0, 0.0]], metadatas=[old], documents=["old"])


def state():
    record = records.get(ids=["a"])
    metadata = dict(sorted(record["metadatas"][0].items()))
    return metadata, record["documents"][0], records.get(where={"cluster": 7})["ids"]


records.upsert(ids=["a"], embeddings=[[0.0, 1.0]], metadatas=[{"lang": "en"}])
seen = {"upsert": state()}
records.delete(ids=["a"])
records.add(ids=["a"], embeddings=[[0.0, 1.0]], metadatas=[{"lang": "en"}])
seen["delete, add"] = state()
print(chromadb.__version__, seen)
wanted = {
    "upsert": ({"cluster": 7, "lang": "en"}, "old", ["a"]),
    "delete, add": ({"lang": "en"}, None, []),
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
