#!/usr/bin/env bash
# transformers 5.23.0: a DeepSeek-V4 model that was saved with its head, as save_pretrained writes it,
# loads as AutoModel with a last norm of ones. Its names are translated, and "model.norm.weight" is
# taken for a "kv_norm" of a layer: the class with a head finds the norm, the one without does not.
# Other families of the same folder layout load whole (Llama, DeepSeek-V3). So the states that
# AutoModel gives, and embeddings made of them, are others, with a line in a report as the one sign.
#
# Seen: missing norm.weight, unexpected model.kv_norm.weight; cosine of last states below 0.99
#       (DeepSeek-V4), nothing missing, cosine 1 (Llama, DeepSeek-V3)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import torch
import transformers

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "Llama": {"intermediate_size": 96},
    "DeepseekV3": {
        **EXPERTS, "intermediate_size": 96, "q_lora_rank": 16, "kv_lora_rank": 16, "n_group": 1,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "topk_group": 1,
    },
    "DeepseekV4": {
        **EXPERTS, "head_dim": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "o_lora_rank": 16,
        "o_groups": 2, "index_n_heads": 2, "index_head_dim": 32, "sliding_window": 16,
    },
}  # fmt: skip


def loaded_without_head(family):
    """What is missing and unexpected then, and whether the states are those of the model."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    whole = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        whole.model.norm.weight.normal_()
    path = f"{sys.argv[1]}/{family}"
    whole.save_pretrained(path)
    bare, report = transformers.AutoModel.from_pretrained(path, output_loading_info=True)
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        wanted, found = (model(ids).last_hidden_state[0, -1] for model in (whole.model, bare.eval()))
    same = torch.cosine_similarity(wanted, found, dim=0).item() > 0.99
    unexpected = sorted(set(report["unexpected_keys"]) - {"lm_head.weight"})
    return sorted(report["missing_keys"]), unexpected, same


seen = {family: loaded_without_head(family) for family in FAMILIES}
print(transformers.__version__, seen)
wanted = {family: ([], [], True) for family in ("Llama", "DeepseekV3")}
wanted["DeepseekV4"] = (["norm.weight"], ["model.kv_norm.weight"], False)
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
