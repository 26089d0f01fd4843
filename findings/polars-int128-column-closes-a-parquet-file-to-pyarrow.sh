#!/usr/bin/env bash
# polars 2.1.0: a column of Int128 is written to Parquet as bytes of fixed size with a type of integer that
# has 128 bits. pyarrow 26.0.1 then reads no column of that file, not even its schema or row counts;
# DuckDB 2.0.1 reads it, and gives the numbers as bytes, the last digit first, without a word.
# Polars makes such columns by itself: read_ndjson does of integers beyond 64 bits.
#
# Guess that failed: the other columns are readable, and a number is a number or an error.
# Seen: pyarrow raises for columns=["id"] and for read_metadata; DuckDB has 258 as bytes 2, 1, 0, ...
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    polars==2.1.0 duckdb==2.0.1 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq

path = f"{sys.argv[1]}/a.parquet"
numbers = polars.Series([258], dtype=polars.Int128)
polars.DataFrame({"id": [1], "number": numbers}).write_parquet(path)


def raises(read):
    try:
        read()
    except pa.ArrowNotImplementedError:
        return True
    return False


seen = {
    "pyarrow, another column": raises(lambda: pq.read_table(path, columns=["id"])),
    "pyarrow, metadata": raises(lambda: pq.read_metadata(path).schema),
    "duckdb": list(duckdb.sql(f"select number from '{path}'").fetchall()[0][0][:3]),
    "polars": polars.read_parquet(path)["number"].to_list(),
}
print(polars.__version__, seen)
wanted = {"pyarrow, another column": True, "pyarrow, metadata": True, "duckdb": [2, 1, 0]}
wanted |= {"polars": [258]}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
