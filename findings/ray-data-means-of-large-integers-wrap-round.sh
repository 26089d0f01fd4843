#!/usr/bin/env bash
# ray 2.60.0: Dataset.mean adds up a column of integers in 64 bits before it divides, and the sum wraps
# round unseen: six of today's times in nanoseconds since 1970 have a negative mean, and that of eight
# hashes near 2 to the 62nd is 12345. The mean of a group does not wrap in silence but is an error, and
# so is std, as soon as the sum is more than 2 to the 53rd, also where it fits and Dataset.mean is right.
# A column of float64 is right in all of them.
#
# Guess that failed: a mean is a float, so it is taken in floats, as by pyarrow, on which Ray builds
# Seen, six rows in two blocks, 1,796,000,000 s in nanoseconds and zero to five more: Ray's mean
#   -1.278e18; pyarrow's, and Ray's of the same numbers as float64, 1.796e18; mean by group: ArrowInvalid
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "ray[data]==2.60.0" pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
RAY_AUTH_MODE=disabled "$folder/venv/bin/python" - <<'PY'
import logging
import sys

import pyarrow as pa
import pyarrow.compute as pc
import ray

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
logging.getLogger("ray.data").setLevel("CRITICAL")


def dataset(numbers):
    table = pa.table({"group": ["a"] * len(numbers), "x": numbers})
    return ray.data.from_arrow(table).repartition(2).materialize()


def short(number):
    return f"{number:.3e}"


times = pa.array([1_796_000_000 * 10**9 + more for more in range(6)])
seen = {
    "pyarrow": short(pc.mean(times).as_py()),
    "integers": short(dataset(times).mean("x")),
    "float64": short(dataset(times.cast(pa.float64(), safe=False)).mean("x")),
    "hashes": dataset(pa.array([2**62 + 12345] * 8)).mean("x"),
    "two integers": short(dataset(times[:2]).mean("x")),
}
try:
    seen["two integers by group"] = short(dataset(times[:2]).groupby("group").mean("x").take(1)[0]["mean(x)"])
except Exception as error:
    seen["two integers by group"] = "ArrowInvalid" if "ArrowInvalid" in str(error) else repr(error)

print(ray.__version__, seen)
wanted = {
    "pyarrow": "1.796e+18",
    "integers": "-1.278e+18",
    "float64": "1.796e+18",
    "hashes": 12345.0,
    "two integers": "1.796e+18",
    "two integers by group": "ArrowInvalid",
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
