#!/usr/bin/env bash
# datasets 5.2.0: class_encode_column on integers 0 to 11 gives other integers: names are the numbers
# as text, sorted as text ("0", "1", "10", "11", "2", ...), so label 2 becomes 4 and label 10 becomes 2.
# The column looks like labels of the same range as before; scores against the old labels, and models
# trained on them, are wrong without an error. Below ten labels nothing moves.
#
# Guess that failed: sorted as numbers, so 0 to n-1 stay as they are.
# Seen: [0, 1, 2, 9, 10, 11] of 12 labels -> [0, 1, 4, 11, 2, 3]; of 10 labels as before
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    datasets==5.2.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import importlib.metadata
import os
import sys

os.environ["HF_HOME"] = sys.argv[1]
os.environ["HF_HUB_OFFLINE"] = "1"
import datasets

datasets.disable_progress_bars()


def encoded(labels):
    data = datasets.Dataset.from_dict({"label": labels}).class_encode_column("label")
    return data["label"][:], data.features["label"].names


twelve, names = encoded(list(range(12)))
ten, _ = encoded(list(range(10)))
print(importlib.metadata.version("datasets"), twelve, names, ten)
usual = twelve == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3] and ten == list(range(10))
usual = usual and names[:5] == ["0", "1", "10", "11", "2"]
sys.exit(0 if usual else "the behaviour changed: label 2 became 4 and label 10 became 2 before")
PY
