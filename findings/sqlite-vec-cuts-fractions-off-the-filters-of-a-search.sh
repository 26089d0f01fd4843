#!/usr/bin/env bash
# sqlite-vec 0.1.9: in a search by vector (MATCH), a condition on an integer column takes the whole part
# of the number that it is compared with. So n < 1.5 leaves out the rows of 1, n >= 0.5 returns those of
# 0, n > -0.5 leaves out those of 0, and n = 1.5 finds those of 1. The same conditions without MATCH, on
# the same table, and on a partition key in a search, give what SQL says. An average or a share as bound
# (n < (select avg(...) ...)) so returns other rows, without an error.
#
# Guess that failed: SQLite compares numbers of both kinds by their value, and columns here are strict
# Seen, rows of -2 to 2, in a search and outside it: n < 1.5: -2 -1 0, -2 -1 0 1; n >= 0.5: 0 1 2, 1 2;
#   n > -0.5: 1 2, 0 1 2; n = 1.5: 1, none; n between 0.5 and 1.5: 0 1, 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check sqlite-vec==0.1.9 apsw==3.54.1.0
"$folder/venv/bin/python" - <<'PY'
import struct
import sys

import apsw
import sqlite_vec

database = apsw.Connection(":memory:")
database.enable_load_extension(True)
database.load_extension(sqlite_vec.loadable_path())
database.execute(
    "create virtual table v using vec0(embedding float[2], n integer, p integer partition key)"
)
for n in range(-2, 3):
    database.execute("insert into v(embedding, n, p) values (?, ?, ?)", (struct.pack("2f", n, 1), n, n))
query = struct.pack("2f", 0, 1)


def rows(condition):
    search = f"select n from v where embedding match ? and k = 9 and {condition}"
    plain = f"select n from v where {condition}"
    return [sorted(n for (n,) in database.execute(*sql)) for sql in ((search, (query,)), (plain,))]


wanted = {
    "n < 1.5": [[-2, -1, 0], [-2, -1, 0, 1]],
    "n >= 0.5": [[0, 1, 2], [1, 2]],
    "n > -0.5": [[1, 2], [0, 1, 2]],
    "n = 1.5": [[1], []],
    "n between 0.5 and 1.5": [[0, 1], [1]],
    "n < 1": [[-2, -1, 0], [-2, -1, 0]],
    "n < (select avg(x) from (select 1 as x union select 2))": [[-2, -1, 0], [-2, -1, 0, 1]],
    "p < 1.5": [[-2, -1, 0, 1], [-2, -1, 0, 1]],
}
seen = {condition: rows(condition) for condition in wanted}
print(next(database.execute("select vec_version()"))[0], seen)
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
