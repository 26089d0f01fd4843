#!/usr/bin/env bash
# duckdb 2.0.1: COPY of a column FLOAT[n] (vectors) in which one row is null writes n entries for that
# null where the Parquet format has one. pyarrow then reads neither that column nor the table ("Length
# spanned by list offsets (5) larger than values array (length 4)"); DuckDB and Polars read it. A
# variable list, FLOAT[], and an array column without a null are written right.
#
# Guess that failed: a null vector is a null list like any other.
# Seen (rows [1, 2], null, [5, 6]): FLOAT[2] pyarrow refuses, Polars reads, footer's entries 6;
#   FLOAT[] both read, entries 5; FLOAT[2] without a null both read
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    duckdb==2.0.1 polars==2.1.0 numpy==2.4.6 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq


def read(kind, *rows):
    path = f"{sys.argv[1]}/v.parquet"
    values = ", ".join(f"({row or 'null'}::{kind})" for row in rows)
    duckdb.sql(f"copy (from (values {values}) t(v)) to '{path}'")
    assert polars.read_parquet(path)["v"].to_list() == [row and list(map(float, row)) for row in rows]
    entries = pq.read_metadata(path).row_group(0).column(0).num_values
    try:
        return entries, pq.read_table(path)["v"].to_pylist() == list(rows)
    except pa.ArrowInvalid:
        return entries, "refused"


seen = {
    "array, a null": read("float[2]", [1, 2], None, [5, 6]),
    "list, a null": read("float[]", [1, 2], None, [5, 6]),
    "array": read("float[2]", [1, 2], [5, 6]),
}
print(duckdb.__version__, pa.__version__, seen)
wanted = {"array, a null": (6, "refused"), "list, a null": (5, True), "array": (4, True)}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
