#!/usr/bin/env bash
# ray 2.60.0: in an expression of Ray Data, operators on a column of integers do not do what the same
# signs do in Python, NumPy, pandas and Polars. col("n") / 2 cuts the fraction off (7 / 2 is 3, and the
# column stays of integers); // and % are made from that, so that -7 // 2 is -3.0 and -7 % 2 is -1.0, both
# of them floats: documents that are dealt out by col("hash") % 8 get numbers from -7 to 7. With a
# literal of 2.0, or a column of floats, all three are Python's, so the type of a file's column decides.
#
# Guess that failed: the methods of an Expr, __truediv__, __floordiv__ and __mod__, mean what they mean
# Seen, n of 7, -7, 5: n / 2: 3, -3, 2; n / 2.0: 3.5, -3.5, 2.5; n // 2: 3, -3, 2; n // 2.0: 3, -4, 2;
#   n % 2: 1, -1, 1; n % 2.0: 1, 1, 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
RAY_AUTH_MODE=disabled "$folder/venv/bin/python" - <<'PY'
import sys

import pyarrow as pa
import ray
from ray.data.expressions import col

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
numbers = ray.data.from_arrow(pa.table({"n": [7, -7, 5]}))
expressions = {
    "n / 2": col("n") / 2,
    "n / 2.0": col("n") / 2.0,
    "n // 2": col("n") // 2,
    "n // 2.0": col("n") // 2.0,
    "n % 2": col("n") % 2,
    "n % 2.0": col("n") % 2.0,
}
seen = {}
for name, expression in expressions.items():
    seen[name] = [row["x"] for row in numbers.with_column("x", expression).take_all()]
print(ray.__version__, seen)
wanted = {
    "n / 2": [3, -3, 2],
    "n / 2.0": [3.5, -3.5, 2.5],
    "n // 2": [3, -3, 2],
    "n // 2.0": [3, -4, 2],
    "n % 2": [1, -1, 1],
    "n % 2.0": [1, 1, 1],
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
