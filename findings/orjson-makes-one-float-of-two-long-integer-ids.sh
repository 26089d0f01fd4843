#!/usr/bin/env bash
# orjson 3.13.0: an integer of JSON beyond 64 bits becomes a float, so that two ids that differ in their
# last digits are one. DuckDB 2.0.1 and pyarrow 26.0.1 do the same to a column of JSON lines; json and
# msgspec give Python's integers, Polars 2.1.0 an Int128, and pandas 3.1.1 refuses.
#
# Guess that failed: an error, as orjson has for such an integer when it writes.
# Seen, distinct ids of 18446744073709551616 and ...617: orjson, DuckDB, pyarrow 1; json, msgspec,
#   Polars 2; orjson.dumps and pandas raise
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    orjson==3.13.0 msgspec==0.23.0 polars==2.1.0 duckdb==2.0.1 pyarrow==26.0.1 pandas==3.1.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

import duckdb
import msgspec
import orjson
import pandas
import polars
import pyarrow.json

ids = [2**64, 2**64 + 1]
lines = [f'{{"id": {number}}}' for number in ids]
path = Path(sys.argv[1], "a.jsonl")
path.write_text("".join(line + "\n" for line in lines))


def distinct(read):
    try:
        return len(set(read()))
    except (ValueError, TypeError):
        return "refused"


seen = {
    "orjson": distinct(lambda: [orjson.loads(line)["id"] for line in lines]),
    "duckdb": distinct(lambda: duckdb.sql(f"select id from '{path}'").fetchall()),
    "pyarrow": distinct(lambda: pyarrow.json.read_json(path)["id"].to_pylist()),
    "json": distinct(lambda: [json.loads(line)["id"] for line in lines]),
    "msgspec": distinct(lambda: [msgspec.json.decode(line)["id"] for line in lines]),
    "polars": distinct(lambda: polars.read_ndjson(path)["id"].to_list()),
    "pandas": distinct(lambda: pandas.read_json(path, lines=True)["id"]),
    "orjson writing": distinct(lambda: orjson.dumps(ids)),
}
print(orjson.__version__, seen)
wanted = {"orjson": 1, "duckdb": 1, "pyarrow": 1, "json": 2, "msgspec": 2, "polars": 2}
wanted |= {"pandas": "refused", "orjson writing": "refused"}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
