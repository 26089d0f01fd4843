#!/usr/bin/env bash
# Lance 14.0.2: lance.dataset(path, asof=...) takes no time that says its zone: it raises a TypeError from
# within. One without a zone is taken for the machine's local time, so that the same call gives another
# version on a machine elsewhere.
#
# Guess that failed: a datetime with a zone is the exact way to say it, as in most libraries
# Seen: an hour from now in UTC -> TypeError; the same hour without its zone, on a machine in Auckland,
# finds no version, and in UTC the version
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pylance==14.0.2 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder" <<'PY'
import datetime
import importlib.metadata
import os
import sys
import time

import lance
import pyarrow as pa

path = f"{sys.argv[1]}/a.lance"
lance.write_dataset(pa.table({"a": [1]}), path)
later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)


def version_at(asked, zone="UTC"):
    os.environ["TZ"] = zone
    time.tzset()
    try:
        return lance.dataset(path, asof=asked).version
    except Exception as error:
        return type(error).__name__


bare = later.replace(tzinfo=None)
seen = [version_at(later), version_at(bare, "Pacific/Auckland"), version_at(bare)]
print(importlib.metadata.version("pylance"), seen)
wanted = ["TypeError", "ValueError", 1]
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
