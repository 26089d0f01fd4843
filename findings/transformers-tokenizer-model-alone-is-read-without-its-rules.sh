#!/usr/bin/env bash
# transformers 5.23.0: a folder of a Llama with a SentencePiece file (tokenizer.model) and neither
# tokenizer.json nor tokenizer_config.json is read by AutoTokenizer without an error, but without the
# file's own rules: no space before a text, so that the first word is cut into other pieces, and no
# opening token. With the package sentencepiece not installed, the error
# asks for tiktoken. (With a tokenizer_config.json that names LlamaTokenizer the pieces are right,
# and the opening token is left out unless it says add_bos_token.)
#
# Seen: "The fox" -> ['T', 'he', '▁fox'] in place of ['▁The', '▁fox'], no opening token
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
"$folder/venv/bin/python" - "$folder" <<'PY'
import io
import json
import sys
from pathlib import Path

import sentencepiece
import transformers

folder = Path(sys.argv[1]) / "model"
folder.mkdir()
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["The quick brown fox jumps over the lazy dog."] * 50),
    model_writer=written, vocab_size=320, model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1,
    eos_id=2, hard_vocab_limit=False, minloglevel=2,
)
(folder / "tokenizer.model").write_bytes(written.getvalue())
library = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
right = library.encode("The fox", out_type=str)

bare = transformers.AutoTokenizer.from_pretrained(folder)
seen, opened = bare.tokenize("The fox"), [bare("The fox").input_ids[0] == library.bos_id()]
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
named = transformers.AutoTokenizer.from_pretrained(folder)
opened.append(named("The fox").input_ids[0] == library.bos_id())
print(transformers.__version__, seen, "for", right, "| opening tokens:", opened)
print("with its class:", named.tokenize("The fox"))
same = seen != right and named.tokenize("The fox") == right and not any(opened)
sys.exit(0 if same else "the behaviour changed")
PY
