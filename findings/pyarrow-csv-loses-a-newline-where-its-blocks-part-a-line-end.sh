#!/usr/bin/env bash
# pyarrow 26.0.1: of a quoted "\r\n" that two blocks of CSV part, the newline is lost, so that a text of
# Windows comes back otherwise, once in about a MiB of its line ends; other block sizes lose others.
#
# Guess that failed: newlines_in_values makes the block size a matter of speed alone.
# Seen, "12345678\r\n90" in blocks of 14, 15 and 16 bytes: whole, "12345678\r90", whole; Python's csv: whole
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PY'
import csv
import io
import sys

import pyarrow as pa
import pyarrow.csv

text = 'a,b\r\n"12345678\r\n90",x\r\n'
parsing = pa.csv.ParseOptions(newlines_in_values=True)
seen = {
    size: pa.csv.read_csv(
        pa.py_buffer(text.encode()), pa.csv.ReadOptions(block_size=size), parsing
    )["a"][0].as_py()
    for size in (14, 15, 16)
}
seen["csv"] = list(csv.reader(io.StringIO(text, newline="")))[1][0]
print(pa.__version__, seen)
whole = "12345678\r\n90"
wanted = {14: whole, 15: "12345678\r90", 16: whole, "csv": whole}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
