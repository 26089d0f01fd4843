#!/usr/bin/env bash
# transformers 5.23.0: output_hidden_states of Mamba, Mamba 2 and RWKV begins with the output of the
# first layer, that of all other families with the token embeddings. Both lists have one entry more
# than there are layers, since Mamba's ends in the last layer's output without and with the final
# norm. So hidden_states[i] of these models is what elsewhere is hidden_states[i + 1]: a layer that
# was chosen by its number is another one here, with no sign of it.
#
# Seen: hidden_states[0] is the output of layer 1 (Mamba, Mamba 2, RWKV), the embeddings (Llama, Jamba)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import transformers

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES = {
    "Llama": HEADS,
    "Jamba": {**HEADS, "mamba_d_state": 8, "use_mamba_kernels": False, "num_experts": 2},
    "Mamba": {"state_size": 8},
    "Mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "Rwkv": {"attention_hidden_size": 64, "intermediate_size": 96},
}


def first_entry(family):
    """What hidden_states[0] is, and how many entries there are."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(settings).eval()
    stack = model.blocks if family == "Rwkv" else model.layers
    seen = {}
    stack[0].register_forward_pre_hook(
        lambda _, given, named: seen.update(embeddings=given[0] if given else named["hidden_states"]),
        with_kwargs=True,
    )
    stack[0].register_forward_hook(
        lambda _, __, out: seen.update(layer_1=out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        states = model(torch.tensor([[4, 5, 6, 7]]), output_hidden_states=True, use_cache=False)
    first = states.hidden_states[0]
    same = [name for name, value in seen.items() if torch.equal(value, first)]
    return same, len(states.hidden_states)


seen = {family: first_entry(family) for family in FAMILIES}
print(transformers.__version__, seen)
wanted = {family: (["embeddings"], 4) for family in ("Llama", "Jamba")}
wanted |= {family: (["layer_1"], 4) for family in ("Mamba", "Mamba2", "Rwkv")}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
