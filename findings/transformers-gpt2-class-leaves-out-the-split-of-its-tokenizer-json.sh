#!/usr/bin/env bash
# transformers 5.23.0: a folder whose tokenizer.json splits digits off before all else, and whose
# tokenizer_config.json names GPT2Tokenizer (as SmolLM2's and StarCoder2's do), is read by
# AutoTokenizer without a word by the class's own split: only vocabulary, merges and post-processor
# are taken from the file. White space before a digit becomes other tokens than those that the file
# gives and the model was trained on. With PreTrainedTokenizerFast as its class the file is read as it
# stands. For a model of type qwen2 the class Qwen2Tokenizer is taken whatever is named, so there the
# file's split is left out too.
#
# Seen: "Total:  42" -> [..., 'Ġ', 'Ġ', '4', '2'] in place of [..., 'ĠĠ', '4', '2']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

folder = Path(sys.argv[1]) / "model"
folder.mkdir()
own = tokenizers.Tokenizer(models.BPE())
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
own.train_from_iterator(["Total:  42", "1. First\n\n2. Second"] * 20, trainer)
own.save(str(folder / "tokenizer.json"))
text = "Total:  42"
right = own.encode(text).tokens


def read(kind, named):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    return transformers.AutoTokenizer.from_pretrained(folder).tokenize(text)


seen = read("llama", "GPT2Tokenizer")
plain = read("llama", "PreTrainedTokenizerFast")
forced = read("qwen2", "PreTrainedTokenizerFast")
print(transformers.__version__, seen, "for", right, "| by PreTrainedTokenizerFast", plain)
print("in a qwen2:", forced)
same = seen != right and plain == right and forced != right
sys.exit(0 if same else "the behaviour changed")
PY
