#!/usr/bin/env bash
# pylance 14.0.2: a full-text index stems words first and takes their accents off afterwards. So a word
# with an accent is found without it only where the English stemmer would have left the bare word as it
# is: "cafe" finds "café", but "resume" does not find "résumé", nor "fiance" "fiancé" (their final e is
# cut where it is bare and kept where it has an accent). With stem=False all are found.
#
# Guess that failed: ascii_folding, on by default, makes a word and its bare spelling one word.
# Seen, ids found for cafe, resume, fiance: [0], [], []; with stem=False [0], [1], [2]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    pylance==14.0.2 pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder/texts.lance" <<'PY'
import sys

import lance
import pyarrow as pa

texts = ["a café at noon", "her résumé arrived", "his fiancé laughed"]
table = pa.table({"id": [0, 1, 2], "text": texts})


def found(word, **settings):
    dataset = lance.write_dataset(table, sys.argv[1], mode="overwrite")
    dataset.create_scalar_index("text", "INVERTED", **settings)
    dataset = lance.dataset(sys.argv[1])
    return dataset.to_table(columns=["id", "_score"], full_text_query=word)["id"].to_pylist()


words = ("cafe", "resume", "fiance")
seen = [[found(word) for word in words], [found(word, stem=False) for word in words]]
print(lance.__version__, seen)
wanted = [[[0], [], []], [[0], [1], [2]]]
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
