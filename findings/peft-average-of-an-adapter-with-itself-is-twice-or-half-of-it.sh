#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter of one adapter under two names with the weights 0.5 and 0.5, which
# should be that adapter, gives twice its change of the weights with combination_type "linear" (and
# "dare_linear" and "magnitude_prune" at density 1), and half of it with "ties", "dare_ties" and
# "ties_svd". "linear" adds the A and the B matrices for themselves, each by the root of its weight, so
# the mean of n checkpoints that are alike is n times as strong; TIES divides by the number of adapters
# that agree, on top of the weights. "cat" and "svd" are the mean. Checkpoints of one training run that
# are averaged are nearly alike, so this is about what the model gets.
#
# Guess that failed: weights that sum to one leave what all adapters agree on as it is
# Seen, change of the weights by that of the adapter: linear 2.0 (of four copies at 0.25: 4.0),
#   dare_linear 2.0, magnitude_prune 2.0, ties 0.5, dare_ties 0.5, ties_svd 0.5, cat 1.0, svd 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    peft==0.21.2 transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PY'
import sys
import warnings

import peft
import torch
from peft import LoraConfig, get_peft_model

warnings.simplefilter("ignore")  # a density of 1 prunes nothing
torch.manual_seed(0)
settings = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), settings, adapter_name="copy_0")
layer = model.base_model.model[0]
for number in range(1, 4):
    model.add_adapter(f"copy_{number}", settings)
    for part in (layer.lora_A, layer.lora_B):
        part[f"copy_{number}"].load_state_dict(part["copy_0"].state_dict())
change = layer.get_delta_weight("copy_0")


def strength(kind, copies=2):
    """The combined adapter's part along the adapter's own change of the weights, 1 where it is the same."""
    names = [f"copy_{number}" for number in range(copies)]
    density = {} if kind in ("linear", "cat", "svd") else {"density": 1.0}
    model.add_weighted_adapter(names, [1 / copies] * copies, "mean", combination_type=kind, **density)
    combined = layer.get_delta_weight("mean")
    model.delete_adapter("mean")
    return round(float((combined * change).sum() / (change * change).sum()), 2)


kinds = ("linear", "dare_linear", "magnitude_prune", "ties", "dare_ties", "ties_svd", "cat", "svd")
seen = {kind: strength(kind) for kind in kinds}
seen["linear of four"] = strength("linear", 4)
print(peft.__version__, seen)
wanted = dict.fromkeys(kinds[:3], 2.0) | dict.fromkeys(kinds[3:6], 0.5) | dict.fromkeys(kinds[6:], 1.0)
wanted["linear of four"] = 4.0
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
