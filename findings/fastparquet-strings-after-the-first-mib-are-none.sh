#!/usr/bin/env bash
# fastparquet 2026.9.0: of a column of strings that pyarrow or pandas wrote with their defaults, the
# values past the first MiB of distinct ones are None. The writer keeps a dictionary of up to a MiB a
# row group and stores the rest plainly, in the same column; fastparquet reads the first kind and gives
# None for the second, without a word. A column of ids, all of them distinct, so loses its later rows,
# also by pandas.read_parquet(engine="fastparquet"). Numbers come right. Lists of strings that have
# no dictionary at all, as Polars and DuckDB write short ones, are None throughout.
#
# Guess that failed: a column that is all dictionary, all plain or first one, then the other is the same
# Seen, 100,000 distinct ids of 16 characters by pyarrow: 46,688 None, all at the end; by Polars 0
#   lists of strings: by Polars and DuckDB every row None, by pyarrow none
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    fastparquet==2026.9.0 pandas==3.1.1 pyarrow==26.0.1 polars==2.1.0 duckdb==2.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import warnings

import duckdb
import fastparquet
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq

warnings.simplefilter("ignore")  # pandas 3 says that it will drop this engine
path = f"{sys.argv[1]}/a.parquet"


def nones(column="id"):
    """How many rows fastparquet gives as None, and how many of these are in one piece at the end."""
    missing = fastparquet.ParquetFile(path).to_pandas()[column].isna()
    count = int(missing.sum())
    return count, int(missing[len(missing) - count :].sum())


ids = [f"doc-{number:012d}" for number in range(100_000)]
seen = {}
pq.write_table(pa.table({"id": ids, "number": range(len(ids))}), path)
seen["pyarrow"] = nones()
seen["pyarrow, number"] = nones("number")
seen["by pandas"] = int(pandas.read_parquet(path, engine="fastparquet")["id"].isna().sum())
seen["read by pyarrow"] = pq.read_table(path)["id"].null_count
pandas.DataFrame({"id": ids}).to_parquet(path, engine="pyarrow")
seen["pandas"] = nones()
polars.DataFrame({"id": ids}).write_parquet(path)
seen["polars"] = nones()
pq.write_table(pa.table({"id": ids}), path, use_dictionary=False)
seen["pyarrow, no dictionary"] = nones()

lists = [["a"], ["b", "c"], []]
polars.DataFrame({"id": lists}).write_parquet(path)
seen["lists, polars"] = nones()
duckdb.sql(f"copy (select unnest({lists}) as id) to '{path}'")
seen["lists, duckdb"] = nones()
pq.write_table(pa.table({"id": lists}), path)
seen["lists, pyarrow"] = nones()

print(fastparquet.__version__, seen)
wanted = {
    "pyarrow": (46_688, 46_688),
    "pyarrow, number": (0, 0),
    "by pandas": 46_688,
    "read by pyarrow": 0,
    "pandas": (46_688, 46_688),
    "polars": (0, 0),
    "pyarrow, no dictionary": (0, 0),
    "lists, polars": (3, 3),
    "lists, duckdb": (3, 3),
    "lists, pyarrow": (0, 0),
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
