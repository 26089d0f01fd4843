#!/usr/bin/env bash
# lancedb 0.40.0: a table whose first "vector" values are Python integers of 0 to 255 (a one-hot or a
# placeholder vector) gets the type uint8, and vectors added later are cut to it without an error:
# (0.6, -0.8) is stored as (0, 0). Searches go on, by Hamming distance. A first vector (300, 0) or
# (-1, 0) makes float32.
#
# Guess that failed: float32 as for every other list of numbers, or an error for the later vector.
# Seen: first (1, 0): uint8, then (0.6, -0.8) -> (0, 0); first (1.0, 0.0): float, then as given
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    lancedb==0.40.0 numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import lancedb

database = lancedb.connect(sys.argv[1])


def table_of(name, first):
    table = database.create_table(name, [{"id": 1, "vector": first}])
    table.add([{"id": 2, "vector": [0.6, -0.8]}])
    rows = {row["id"]: row["vector"] for row in table.to_arrow().to_pylist()}
    return str(table.schema.field("vector").type.value_type), [round(x, 3) for x in rows[2]]


seen = {str(f): table_of(f"t{i}", f) for i, f in enumerate(([1, 0], [1.0, 0.0], [300, 0], [-1, 0]))}
print(lancedb.__version__, seen)
whole = ("float", [0.6, -0.8])
wanted = dict(zip(seen, [("uint8", [0, 0]), whole, whole, whole], strict=True))
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
