#!/usr/bin/env bash
# pyiceberg 0.12.0: where a table has the key 0.0, an upsert of a row with the key -0.0 does one of two
# things. Alone it does nothing: no row is updated and none inserted, and what was to be written is
# lost without a word. Beside a row that is new or changed it is inserted, and the table then has both
# zeros, though a scan for either finds the two of them.
#
# Guess that failed: the row is updated, or inserted, whatever comes with it.
# Seen, (updated, inserted): alone (0, 0); beside a changed and a new row (1, 2); scan for -0.0: 2 rows
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "pyiceberg[sql-sqlite]==0.12.0" pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import pyarrow as pa
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.expressions import EqualTo

catalog = SqlCatalog(
    "c", uri=f"sqlite:///{sys.argv[1]}/catalog.db", warehouse=f"file://{sys.argv[1]}"
)
catalog.create_namespace("n")
there = pa.table({"key": [0.0, 1.5], "text": ["old", "old"]})


def upsert(name, keys):
    table = catalog.create_table(f"n.{name}", schema=there.schema)
    table.append(there)
    done = table.upsert(pa.table({"key": keys, "text": ["new"] * len(keys)}), join_cols=["key"])
    texts = table.scan(row_filter=EqualTo("key", -0.0)).to_arrow()["text"].to_pylist()
    return (done.rows_updated, done.rows_inserted), sorted(texts)


seen = {"alone": upsert("alone", [-0.0]), "beside others": upsert("beside", [-0.0, 1.5, 2.5])}
print(seen)
wanted = {"alone": ((0, 0), ["old"]), "beside others": ((1, 2), ["new", "old"])}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
