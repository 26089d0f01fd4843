#!/usr/bin/env bash
# pylance 14.0.2: Dataset.update sets one column after the other, in an order that changes from call to
# call, and each expression sees what the ones before it wrote. update({"a": "b", "b": "a"}) never
# swaps: both columns end as one of the two, by chance. {"old": "cluster", "cluster": "cluster + 1"}
# keeps the right old cluster in some calls and the new one in others.
#
# Guess that failed: all expressions see the row as it was, as in SQL's UPDATE.
# Seen (a 1, b 2; 40 calls): {(1, 1), (2, 2)}, never (2, 1); a alone to b: (2, 2)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pylance==14.0.2 numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import lance
import pyarrow as pa


def updated(name, changes):
    data = lance.write_dataset(pa.table({"a": [1], "b": [2]}), f"{sys.argv[1]}/{name}")
    data.update(changes)
    row = data.to_table().to_pylist()[0]
    return row["a"], row["b"]


swapped = {updated(f"swap{i}", {"a": "b", "b": "a"}) for i in range(40)}
alone = updated("alone", {"a": "b"})
print(lance.__version__, swapped, alone)
usual = swapped <= {(1, 1), (2, 2)} and alone == (2, 2)
sys.exit(0 if usual else "the behaviour changed: {(1, 1), (2, 2)} and (2, 2) were seen before")
PY
