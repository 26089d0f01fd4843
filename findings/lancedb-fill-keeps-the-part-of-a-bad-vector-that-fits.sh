#!/usr/bin/env bash
# lancedb 0.40.0: on_bad_vectors="fill" does not fill a vector of the wrong length: one that is too long
# is cut to the column's width and one that is too short is continued with the fill value, so a vector
# of another encoder enters the table as if it were of this one. "drop" and "null" know it for bad.
#
# Guess that failed: every number of a bad vector becomes the fill value.
# Seen (width 2, fill value 0): (3, 4, 5) -> (3, 4), (3) -> (3, 0); "null" gives None, "drop" no row
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


def stored(name, vector, **bad):
    table = database.create_table(name, [{"id": 1, "vector": [1.0, 2.0]}])
    table.add([{"id": 2, "vector": vector}], **bad)
    return [row["vector"] for row in table.to_arrow().to_pylist() if row["id"] == 2]


seen = {
    "long, fill": stored("a", [3.0, 4.0, 5.0], on_bad_vectors="fill", fill_value=0.0),
    "short, fill": stored("b", [3.0], on_bad_vectors="fill", fill_value=0.0),
    "long, null": stored("c", [3.0, 4.0, 5.0], on_bad_vectors="null"),
    "long, drop": stored("d", [3.0, 4.0, 5.0], on_bad_vectors="drop"),
}
print(lancedb.__version__, seen)
wanted = dict(zip(seen, [[[3.0, 4.0]], [[3.0, 0.0]], [None], []], strict=True))
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
