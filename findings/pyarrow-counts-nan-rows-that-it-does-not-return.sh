#!/usr/bin/env bash
# pyarrow 26.0.1: for one and the same filter, Dataset.count_rows counts a row whose value is NaN and
# Dataset.to_table leaves it out: count_rows answers from the Parquet row group's minimum and maximum,
# which leave NaN out. And where all other values are equal, is_nan() itself finds nothing by
# to_table, by count_rows and by read_table(filters=). In memory the same expressions are right.
#
# Guess that failed: the same rows counted and returned, and is_nan finds NaN.
# Seen, rows as (in memory, returned of the file, counted of the file):
#   5, 6, NaN: x >= 5 (2, 2, 3); is_nan (1, 1, 1)
#   5, 5, NaN: x == 5 (2, 2, 3); is_nan (1, 0, 0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

path = f"{sys.argv[1]}/x.parquet"
x = pc.field("x")


def rows(values, condition):
    table = pa.table({"x": values})
    pq.write_table(table, path)
    dataset = ds.dataset(path)
    returned = dataset.to_table(filter=condition).num_rows
    assert returned == pq.read_table(path, filters=condition).num_rows
    return table.filter(condition).num_rows, returned, dataset.count_rows(filter=condition)


NAN = float("nan")
seen = {
    "two values, at least 5": rows([5.0, 6.0, NAN], x >= 5),
    "two values, is_nan": rows([5.0, 6.0, NAN], pc.is_nan(x)),
    "one value, is 5": rows([5.0, 5.0, NAN], x == 5),
    "one value, is_nan": rows([5.0, 5.0, NAN], pc.is_nan(x)),
}
print(pa.__version__, seen)
wanted = dict(zip(seen, [(2, 2, 3), (1, 1, 1), (2, 2, 3), (1, 0, 0)], strict=True))
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
