"""Tiny random models of many families with a small real tokenizer, made in memory.

Each is a folder as ``save_pretrained`` leaves it: a few thousand weights, two or more layers, a
byte-level BPE tokenizer trained on a handful of sentences.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers

from pipelines.encoder.int8 import require_exact_products
from pipelines.encoder.precision import measure_gain
from pipelines.runtime.errors import InputError

_IMITATED = 0.35
"""Of the speed in float32."""
INT8 = pytest.param("int8", marks=pytest.mark.int8)
"""The precision, as a parameter of tests that are skipped where it is refused."""

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "This sentence means in one word: clustering of large text corpora.",
    "Gravity pulls the satellite towards the planet while its orbit decays.",
    "The goalkeeper saved two penalties and the home side won the league.",
    "Interest rates rose again, and the market closed lower on Friday.",
    "A pinch of salt, two eggs, flour and warm milk make the dough.",
    "The court ruled that the contract was void from the beginning.",
    "She tuned the old guitar and played a slow song about the sea.",
]

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 32}),
    "mistral": ("MistralConfig", _GROUPED),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi": ("PhiConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
}

_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
_LAYER_TYPES = ["sliding_attention", "full_attention"]

OTHER_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {}),  # learned positions, convolutions as linear layers
    "bloom": ("BloomConfig", {}),  # ALiBi
    "falcon": ("FalconConfig", {}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 16}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **_GROUPED, "head_dim": 16, "sliding_window": 16, "layer_types": _LAYER_TYPES,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512,
        },
    ),
    "cohere2": (
        "Cohere2Config", {**_GROUPED, "sliding_window": 16, "layer_types": _LAYER_TYPES},
    ),
    "olmo2": ("Olmo2Config", _GROUPED),  # norms behind
    "granite": (
        "GraniteConfig", {**_GROUPED, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_MLA, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GROUPED, **_EXPERTS, "head_dim": 16}),
    "phi3": (  # a part of each head turns
        "Phi3Config",
        {
            **_GROUPED,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            },
        },
    ),
    "starcoder2": ("Starcoder2Config", _GROUPED),
    "phimoe": ("PhimoeConfig", {**_GROUPED, "num_local_experts": 4}),
    "mamba": ("MambaConfig", {"state_size": 16}),
    "falcon_h1": ("FalconH1Config", {**_GROUPED, **_MAMBA}),  # attention and state space
    "lfm2": ("Lfm2Config", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "bert": ("BertConfig", {}),
    "xlm_roberta": ("XLMRobertaConfig", {}),  # positions that begin after the padding token's
    "mpnet": ("MPNetConfig", {}),
    "modernbert": ("ModernBertConfig", {"local_attention": 16, "global_attn_every_n_layers": 2}),
    "albert": ("AlbertConfig", {"embedding_size": 16}),  # one layer, run twice
}  # fmt: skip
"""Families of other kinds, of two layers, that run by transformers' own pass."""


def tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **settings: Any) -> Path:
    """A random float32 model of a family with a tokenizer, saved in ``folder``.

    It is the causal one where there is one. ``settings`` change its configuration, such as
    ``num_hidden_layers=2``.
    """
    if family in OTHER_KINDS:
        settings = {"num_hidden_layers": 2, **settings}
    config_class, extra = {**FAMILIES, **OTHER_KINDS}[family]
    config = getattr(transformers, config_class)(**{**_SHAPE, **extra, **settings})
    torch.manual_seed(seed)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    model = kind.from_config(config)
    with torch.no_grad():  # away from the symmetric start, where many mistakes cancel
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tiny_tokenizer(
        opens=family in ("llama", "mistral", "gemma2", "gemma3", "gemma4", "opt")
    ).save_pretrained(folder)
    return folder


def tiny_tokenizer(*, opens: bool = True, pad: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens that begins a text with <s> if it ``opens``."""
    special = ["<pad>", "<s>", "</s>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        SENTENCES * 4,
        tokenizers.trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if opens:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
    )


def tiny_adapter(folder: Path, model_folder: Path, *, with_head: bool = False) -> Path:
    """A LoRA adapter of rank 4 with random weights for a Llama-like model, saved in ``folder``."""
    kind = transformers.AutoModelForCausalLM if with_head else transformers.AutoModel
    torch.manual_seed(7)
    tuned = peft.get_peft_model(
        kind.from_pretrained(model_folder),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(folder)
    return folder


def scripted_model(folder: Path, scripts: dict[str, list[str]], template: str) -> Path:
    """A chat model that says what it is told to, saved in ``folder``.

    A question whose prompt ends in one of the marks of ``scripts`` gets the words that follow it
    there. Every mark and word is a token, and each word decides the next one.
    """
    words = list(dict.fromkeys([w for mark, said in scripts.items() for w in (mark, *said)]))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids(words)
    width = 2 * len(words) + 2
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, -1] = 1  # what every other token says: nothing
        for place, token in enumerate(ids):
            model.model.embed_tokens.weight[token] = torch.eye(width)[place]
        model.lm_head.weight[2, -1] = 50
        for mark, said in scripts.items():
            chain = [mark, *said]
            for word, following in zip(chain, [*said, tokenizer.eos_token], strict=True):
                target = tokenizer.convert_tokens_to_ids(following)
                model.lm_head.weight[target, words.index(word)] = 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def imitates_bfloat16() -> bool:
    """Whether this CPU is so slow in bfloat16 that a real model takes minutes for some texts."""
    return measure_gain() < _IMITATED


@cache
def multiplies_int8() -> bool:
    """Whether int8 runs on this CPU."""
    try:
        require_exact_products()
    except InputError:
        return False
    return True
