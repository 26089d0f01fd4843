#!/usr/bin/env bash
# lancedb 0.40.0: add to an integer column takes 2.7 and stores 2, and takes the string "2" as 2.
# merge_insert into the same table refuses 2.7 ("was truncated"), and pylance, on which LanceDB stands,
# refuses the type. An id or a count that came as float so becomes another row's id.
#
# Guess that failed: an error, as by merge_insert.
# Seen: add of 2.7 stores 2, of "2" stores 2; merge_insert of 2.7 raises; pylance's append raises
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    lancedb==0.40.0 pylance==14.0.2 numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import lance
import lancedb
import pyarrow as pa

database = lancedb.connect(sys.argv[1])


def ids_after(name, value, how):
    table = database.create_table(name, pa.table({"id": [1]}))
    new = pa.table({"id": [value]})
    try:
        if how == "add":
            table.add(new)
        elif how == "merge_insert":
            table.merge_insert("id").when_not_matched_insert_all().execute(new)
        else:
            lance.write_dataset(new, f"{sys.argv[1]}/{name}.lance", mode="append")
    except Exception:
        return "refused"
    return sorted(table.to_arrow()["id"].to_pylist())


seen = {
    "add 2.7": ids_after("a", 2.7, "add"),
    "add '2'": ids_after("b", "2", "add"),
    "merge_insert 2.7": ids_after("c", 2.7, "merge_insert"),
    "merge_insert 2": ids_after("d", 2, "merge_insert"),
    "pylance 2.7": ids_after("e", 2.7, "pylance"),
}
print(lancedb.__version__, seen)
wanted = dict(zip(seen, [[1, 2], [1, 2], "refused", [1, 2], "refused"], strict=True))
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
