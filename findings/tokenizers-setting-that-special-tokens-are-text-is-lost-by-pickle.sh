#!/usr/bin/env bash
# tokenizers 0.23.3: encode_special_tokens = True (a text that says "[SEP]" is read as its characters)
# is not part of what to_str and save write, nor of pickle and copy. A tokenizer that is set in the
# driver and sent to a worker process reads such texts as control tokens there: the same text gets
# other ids, and another vector, by where it was encoded. Truncation and padding are kept.
#
# Guess that failed: kept like truncation and padding.
# Seen, ids of "[SEP] a" (unknown 0, [SEP] 1, a 2): set 0 0 0 2; after pickle, deepcopy, to_str 1 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
import copy
import pickle
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

first = Tokenizer(models.WordLevel({"?": 0, "[SEP]": 1, "a": 2}, unk_token="?"))
first.pre_tokenizer = pre_tokenizers.Whitespace()
first.add_special_tokens(["[SEP]"])
first.enable_truncation(7)
first.encode_special_tokens = True
copies = {
    "set": first,
    "pickle": pickle.loads(pickle.dumps(first)),
    "deepcopy": copy.deepcopy(first),
    "to_str": Tokenizer.from_str(first.to_str()),
}
seen = {name: (t.encode("[SEP] a").ids, t.truncation["max_length"]) for name, t in copies.items()}
print(tokenizers.__version__, seen)
lost = ([1, 2], 7)
wanted = {"set": ([0, 0, 0, 2], 7), "pickle": lost, "deepcopy": lost, "to_str": lost}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
