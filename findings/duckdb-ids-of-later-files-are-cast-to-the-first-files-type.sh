#!/usr/bin/env bash
# duckdb 2.0.1: several Parquet files read as one take the types of the first, and values of the others
# are cast without a word: where the first has integer ids, the string id "007" of the second is 7 and
# "8.6" is 9, so they meet ids 7 and 9 of the first. Which it is depends on the order of the names. With
# union_by_name=true all are strings and stay as they are. pyarrow and Polars raise on these files.
#
# Guess that failed: an error for a column of two types.
# Seen, ids of (7, 9) and ("007", "8.6"): [7, 9, 7, 9]; other order ["007", "8.6", "7", "9"];
#   union_by_name ["7", "9", "007", "8.6"]; pyarrow and Polars raise
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
import pyarrow.dataset as ds
import pyarrow.parquet as pq

numbers, texts = f"{sys.argv[1]}/numbers.parquet", f"{sys.argv[1]}/texts.parquet"
pq.write_table(pa.table({"id": [7, 9]}), numbers)
pq.write_table(pa.table({"id": ["007", "8.6"]}), texts)


def ids(*files, by_name="false"):
    words = f"select id from read_parquet({list(files)}, union_by_name={by_name})"
    return [row[0] for row in duckdb.sql(words).fetchall()]


def refused(read):
    try:
        read([numbers, texts])
    except Exception:
        return True
    return False


seen = {
    "numbers first": ids(numbers, texts),
    "texts first": ids(texts, numbers),
    "by name": ids(numbers, texts, by_name="true"),
    "refused": [refused(polars.read_parquet), refused(lambda files: ds.dataset(files).to_table())],
}
print(duckdb.__version__, seen)
wanted = {
    "numbers first": [7, 9, 7, 9],
    "texts first": ["007", "8.6", "7", "9"],
    "by name": ["7", "9", "007", "8.6"],
    "refused": [True, True],
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
