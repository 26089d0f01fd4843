#!/usr/bin/env bash
# datafusion 55.0.0: a float column of a Parquet file that holds one value and NaN is read as that
# one value throughout, by a plain `select x`: minimum and maximum are equal (they leave NaN out by the
# format's rules) and nothing is null, so DataFusion takes the column for a constant and puts the
# constant where the NaN was. A similarity, a weight or a vector's last number that should be marked
# as broken becomes an ordinary one, and sums, filters and copies go on with it.
#
# Guess that failed: NaN is read as NaN.
# Seen (0.25, NaN, 0.25): pyarrow 0.25, nan, 0.25; DataFusion 0.25, 0.25, 0.25;
#   with a null or a second number in the column, or from memory, NaN stays
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    datafusion==55.0.0 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import datafusion
import pyarrow as pa
import pyarrow.parquet as pq

NAN = float("nan")
path = f"{sys.argv[1]}/x.parquet"


def read(values, memory=False):
    table = pa.table({"x": pa.array(values, pa.float64())})
    pq.write_table(table, path)
    assert str(pq.read_table(path)["x"].to_pylist()) == str(values)
    context = datafusion.SessionContext()
    if memory:
        context.register_record_batches("t", [table.to_batches()])
    else:
        context.register_parquet("t", path)
    return str(context.sql("select x from t").to_pydict()["x"])


seen = [
    read([0.25, NAN, 0.25]),
    read([0.25, NAN, 0.5]),
    read([0.25, NAN, None]),
    read([0.25, NAN, 0.25], memory=True),
]
print(datafusion.__version__, seen)
wanted = ["[0.25, 0.25, 0.25]", "[0.25, nan, 0.5]", "[0.25, nan, None]", "[0.25, nan, 0.25]"]
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
