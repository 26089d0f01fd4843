#!/usr/bin/env bash
# tokenizers 0.23.3: Encoding.tokens holds, for an added token that takes the blanks around it (lstrip,
# rstrip, as mask tokens do), the text that was matched, blanks included, and not the token's name.
# token_to_id of it is None, and counts by token have as many entries as there are kinds of blanks.
# The ids are right; id_to_token gives the name.
#
# Guess that failed: tokens are id_to_token of the ids.
# Seen, "a  <x> b": ids [1, 3, 2]; tokens ["a", "  <x> ", "b"]; id_to_token ["a", "<x>", "b"]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
import sys

import tokenizers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
encoding = tokenizer.encode("a  <x> b")
seen = {
    "ids": encoding.ids,
    "tokens": encoding.tokens,
    "names": [tokenizer.id_to_token(i) for i in encoding.ids],
    "token_to_id": [tokenizer.token_to_id(t) for t in encoding.tokens],
}
print(tokenizers.__version__, seen)
wanted = {
    "ids": [1, 3, 2],
    "tokens": ["a", "  <x> ", "b"],
    "names": ["a", "<x>", "b"],
    "token_to_id": [1, None, 2],
}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
