#!/usr/bin/env bash
# sentence-transformers 6.2.0: a model whose folder names a default prompt ("default_prompt_name")
# and was given no prompt called "query" or "document" (it is saved with empty ones) writes it before texts of encode(), but not before
# those of encode_query() and encode_document(): they write nothing at all. So a corpus embedded by
# encode() and one embedded by encode_document() differ, and queries have no prompt, with no word
# about it when they are encoded.
#
# Seen: encode equals encode(prompt="passage: "), encode_query and encode_document equal
# encode(prompt="")
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    sentence-transformers==6.2.0 transformers==5.23.0 torch==2.13.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import numpy as np
import sentence_transformers
import tokenizers
import torch
import transformers

folder = Path(sys.argv[1]) / "model"
backend = tokenizers.Tokenizer(tokenizers.models.BPE())
backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=260, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
)
backend.train_from_iterator(["a"], trainer)
transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(folder)
torch.manual_seed(0)
transformers.BertModel(
    transformers.BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128,
    )
).save_pretrained(folder)
made = sentence_transformers.SentenceTransformer(
    str(folder), device="cpu", prompts={"passage": "passage: "}, default_prompt_name="passage"
)
made.save(str(folder / "st"))

model = sentence_transformers.SentenceTransformer(str(folder / "st"), device="cpu")
texts = ["a text of some words"]
with_prompt = model.encode(texts, prompt="passage: ")
without = model.encode(texts, prompt="")
ways = {"encode": model.encode, "query": model.encode_query, "document": model.encode_document}
seen = {
    name: "prompt" if np.allclose(way(texts), with_prompt, atol=1e-5)
    else "none" if np.allclose(way(texts), without, atol=1e-5) else "other"
    for name, way in ways.items()
}
print(sentence_transformers.__version__, model.default_prompt_name, model.prompts, seen)
wanted = {"encode": "prompt", "query": "none", "document": "none"}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
