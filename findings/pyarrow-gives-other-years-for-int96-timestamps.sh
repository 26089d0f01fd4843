#!/usr/bin/env bash
# pyarrow 26.0.1: timestamps that a Parquet file keeps as INT96, as Spark 4.3 still writes them, come in
# nanoseconds, and years that these have no room for come as others without a word: 9999-12-31, a usual
# "valid until", is 1816-03-29. pandas and fastparquet do the same, Polars and DuckDB give what was
# written; coerce_int96_timestamp_unit="us" does so in pyarrow. The other way round pyarrow refuses: a
# cast of such a value to nanoseconds is an error.
#
# Guess that failed: an error, as for the cast, or microseconds.
# Seen, years of (9999, 2026, 1): pyarrow, pandas and fastparquet (1816, 2026, 1755);
#   Polars, DuckDB and pyarrow in microseconds (9999, 2026, 1)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pyarrow==26.0.1 pandas==3.1.1 fastparquet==2026.9.0 polars==2.1.0 duckdb==2.0.1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import datetime
import sys

import duckdb
import fastparquet
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq

path = f"{sys.argv[1]}/a.parquet"
written = [datetime.datetime(year, 12, 31) for year in (9999, 2026, 1)]
table = pa.table({"until": pa.array(written, pa.timestamp("us"))})
pq.write_table(table, path, use_deprecated_int96_timestamps=True)


def years(values):
    return [value.year for value in values]


seen = {
    "pyarrow": years(pq.read_table(path)["until"].to_pylist()),
    "pandas": years(pandas.read_parquet(path)["until"]),
    "fastparquet": years(fastparquet.ParquetFile(path).to_pandas()["until"]),
    "microseconds": years(
        pq.read_table(path, coerce_int96_timestamp_unit="us")["until"].to_pylist()
    ),
    "polars": years(polars.read_parquet(path)["until"]),
    "duckdb": years(row[0] for row in duckdb.sql(f"select until from '{path}'").fetchall()),
}
try:
    table["until"].cast(pa.timestamp("ns"))
    seen["cast"] = "done"
except pa.ArrowInvalid:
    seen["cast"] = "refused"
print(pa.__version__, seen)
wanted = dict.fromkeys(("pyarrow", "pandas", "fastparquet"), [1816, 2026, 1755])
wanted |= dict.fromkeys(("microseconds", "polars", "duckdb"), [9999, 2026, 1])
wanted |= {"cast": "refused"}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
