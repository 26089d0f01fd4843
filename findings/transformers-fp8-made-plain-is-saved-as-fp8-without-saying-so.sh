#!/usr/bin/env bash
# transformers 5.23.0: a checkpoint in fp8 that is loaded with dequantize=True (on a CPU always) has
# plain weights and no quantization_config. save_pretrained quantises it again on the way out and
# writes a config.json without quantization_config: eight-bit numbers and scales that nothing reads.
# The folder loads without an error (the scales are "unexpected keys"), and its states are others.
#
# Seen: weights in memory float32, in the file F8_E4M3, no quantization_config; cosine of the states
# before saving and after loading again 0.019
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

first, second = (Path(sys.argv[1]) / name for name in ("first", "second"))
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2,
)
torch.manual_seed(0)
transformers.LlamaModel(config).save_pretrained(first)
stored = {}
for key, weight in load_file(first / "model.safetensors").items():
    stored[key] = weight
    if key.endswith("proj.weight"):
        blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scales = blocks.abs().amax((1, 3)) / 448
        stored[key] = (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        stored[f"{key}_scale_inv"] = scales
save_file(stored, first / "model.safetensors", metadata={"format": "pt"})
config.quantization_config = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}
config.save_pretrained(first)

model = transformers.AutoModel.from_pretrained(
    first,
    dtype=torch.float32,
    quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
).eval()
model.save_pretrained(second)
again = transformers.AutoModel.from_pretrained(second, dtype=torch.float32).eval()
tokens = torch.tensor([[1, 5, 9, 13]])
with torch.no_grad():
    states = [m(tokens).last_hidden_state.flatten() for m in (model, again)]
cosine = torch.cosine_similarity(*states, dim=0).item()
written = load_file(second / "model.safetensors")["layers.0.self_attn.q_proj.weight"].dtype
said = "quantization_config" in json.loads((second / "config.json").read_text())
loaded = model.layers[0].self_attn.q_proj.weight.dtype
print(transformers.__version__, loaded, written, "said" if said else "not said", round(cosine, 3))
same = (loaded, written, said) == (torch.float32, torch.float8_e4m3fn, False) and cosine < 0.9
sys.exit(0 if same else "the behaviour changed")
PY
