#!/usr/bin/env bash
# peft 0.21.2: an adapter that began by the fast SVD (init_lora_weights="pissa_niter_4", as PiSSA's
# own documentation advises for speed) is saved without the part that was taken out of the base
# model. PeftModel.from_pretrained works that part out again, from a random projection: the loaded
# model is not the trained one, and another one at each load. No error, no warning. With the exact
# SVD ("pissa") both loads equal the trained model.
#
# Seen: cosine of states to the trained model's 0.97, of two loads to each other 0.98; pissa 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    peft==0.21.2 transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import copy
import sys

import peft
import torch
import transformers

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
)
torch.manual_seed(0)
base = transformers.LlamaForCausalLM(config)
with torch.no_grad():
    for weight in base.parameters():
        weight.add_(torch.randn_like(weight) * 0.05)
tokens = torch.tensor([[4, 5, 6, 7, 8, 9]])


def states(model):
    with torch.no_grad():
        return model.eval()(tokens, output_hidden_states=True).hidden_states[-1].flatten()


def cosines(start):
    """Of a trained model's states to a loaded one's, and of two loaded ones'."""
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=start, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(copy.deepcopy(base), settings)
    with torch.no_grad():  # a training
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    trained = states(tuned)
    tuned.save_pretrained(f"{sys.argv[1]}/{start}")
    loads = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{sys.argv[1]}/{start}")
        loads.append(states(loaded))
    pairs = [(trained, loads[0]), (loads[0], loads[1])]
    return [round(torch.cosine_similarity(a, b, dim=0).item(), 4) for a, b in pairs]


seen = {start: cosines(start) for start in ("pissa", "pissa_niter_4")}
print(peft.__version__, seen)
same = min(seen["pissa"]) > 0.9999 and max(seen["pissa_niter_4"]) < 0.999
sys.exit(0 if same else "the behaviour changed")
PY
