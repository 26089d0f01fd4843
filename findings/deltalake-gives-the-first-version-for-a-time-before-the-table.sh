#!/usr/bin/env bash
# deltalake 1.6.6: asked for a table as it was years before its first commit, load_as_version gives the
# first version without a word, so a typing error in a date reads rows that were not there then. A
# version number that there is not raises, a time in the future gives the newest.
#
# Guess that failed: an error, as for a version number that there is not
# Seen: 2020-01-01 -> version 0; 2099-01-01 -> version 1; version 7 raises
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    deltalake==1.6.6 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import datetime
import importlib.metadata
import sys

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

path = f"{sys.argv[1]}/table"
for number in (1, 2):
    write_deltalake(path, pa.table({"id": [number]}), mode="append")


def version_at(asked):
    table = DeltaTable(path)
    try:
        table.load_as_version(asked)
    except Exception:
        return "refused"
    return table.version()


years = [datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (2020, 2099)]
seen = [version_at(asked) for asked in (*years, 7)]
print(importlib.metadata.version("deltalake"), seen)
wanted = [0, 1, "refused"]
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
