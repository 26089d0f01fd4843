#!/usr/bin/env bash
# transformers 5.23.0: a Gemma 1 whose configuration says use_bidirectional_attention (documented as
# "the model will attend to all text tokens instead of using a causal mask") does so only for a text
# that is run without padding. Beside a longer text in one batch it is causal, and with
# attn_implementation="eager" it always is. So a text's states depend on its batch, without a
# warning. Gemma 3, which has the same word, heeds it in each case.
#
# Seen: first token sees later ones: sdpa True alone, False beside; eager False, False; Gemma 3 True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 huggingface-hub
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import transformers


def sees_later_tokens(family, attention):
    """Whether a first token's state follows a later token: alone, and beside a longer text."""
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, use_bidirectional_attention=True,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model" if family == "Gemma" else "Gemma3TextModel")
    model = model(settings).eval()

    def first_state(token, longest):
        tokens = torch.tensor([[4, token, 7, 8] + [0] * (longest - 4), [9] * longest])
        mask = torch.tensor([[1] * 4 + [0] * (longest - 4), [1] * longest])
        with torch.no_grad():
            states = model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return states.last_hidden_state[0, 0]

    return [
        not torch.allclose(first_state(5, longest), first_state(6, longest), atol=1e-5)
        for longest in (4, 6)
    ]


seen = {
    "sdpa": sees_later_tokens("Gemma", "sdpa"),
    "eager": sees_later_tokens("Gemma", "eager"),
    "Gemma 3": sees_later_tokens("Gemma3Text", "sdpa"),
}
print(transformers.__version__, seen)
wanted = {"sdpa": [True, False], "eager": [False, False], "Gemma 3": [True, True]}
sys.exit(0 if seen == wanted else f"the behaviour changed: {wanted} was seen before")
PY
