"""Every family with every pooling, layer, attention, precision and kind of adapter.

Held against the naive formula: PEFT's unmerged model, one text at a time, float32, no padding.
"""

import itertools
from functools import cache

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_models import FAMILIES, OTHER_KINDS, SENTENCES, tiny_model

from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder

TEXTS = ["a", *SENTENCES[:3], " ".join(SENTENCES[3:])]
POOLINGS = ("last", "mean", "weighted-mean", "first+max")
LAYERS = (-1, 1)
ATTENTIONS = ("auto", "bidirectional")
DTYPES = ("float32", "bfloat16", "float16", "int8")
ADAPTERS = ("none", "base", "with head", "rank-stabilised", "dora")
TARGETS = {"phi": "q_proj", "gpt_neox": "query_key_value"}
LEAST = {"float32": 0.9999, "bfloat16": 0.995, "float16": 0.999, "int8": 0.99}

CASES = list(itertools.product(FAMILIES, POOLINGS, LAYERS, ATTENTIONS, DTYPES, ADAPTERS))
# 100 cases in which every value of an axis meets every value of every other
SLOW = CASES[::29]
# each value of each axis at least once, each family with two cases
FAST = [
    (family, POOLINGS[n % 4], LAYERS[n % 2], ATTENTIONS[n // 2 % 2], "float32", ADAPTERS[n % 5])
    for n, family in enumerate([*FAMILIES, *reversed(FAMILIES)])
] + [("phi", "mean", 1, "auto", "int8", "dora"), ("llama", "last", -1, "auto", "int8", "base")]


def marked(case, *marks):
    return pytest.param(case, marks=[*marks, pytest.mark.int8] if "int8" in case else marks)


@pytest.fixture(scope="session")
def matrix_folders(tmp_path_factory):
    return {f: tiny_model(tmp_path_factory.mktemp(f) / f, f, num_hidden_layers=2) for f in FAMILIES}


@pytest.fixture(scope="session")
def other_folders(tmp_path_factory):
    return cache(lambda family: tiny_model(tmp_path_factory.mktemp(family) / family, family))


@pytest.fixture(scope="session")
def matrix_adapters(matrix_folders, tmp_path_factory):
    made = {}

    def adapter(family, kind):
        if kind == "none":
            return None
        if (family, kind) not in made:
            made[family, kind] = make_adapter(
                matrix_folders[family], tmp_path_factory.mktemp("adapter"), family, kind
            )
        return made[family, kind]

    return adapter


def model_class(kind):
    named = {"with head": transformers.AutoModelForCausalLM}
    return named.get(kind, transformers.AutoModel)


def make_adapter(folder, target, family, kind):
    torch.manual_seed(11)
    options = {"rank-stabilised": {"use_rslora": True}, "dora": {"use_dora": True}}
    task = {"with head": "CAUSAL_LM"}
    config = peft.LoraConfig(
        r=4, target_modules=[TARGETS.get(family, "v_proj")], task_type=task.get(kind),
        **options.get(kind, {}),
    )  # fmt: skip
    tuned = peft.get_peft_model(model_class(kind).from_pretrained(folder), config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    tuned.save_pretrained(target)
    return str(target)


def naive(encoder, folder, adapter, kind, attention):
    """The plain formula for all texts, float32 (n, d)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if attention == "bidirectional" and config.model_type == "gemma3_text":
        config = type(config).from_dict({**config.to_dict(), "use_bidirectional_attention": True})
    elif attention == "bidirectional":
        config.is_causal = False
    model = model_class(kind).from_pretrained(folder, config=config)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    rows = []
    for ids in encoder.tokenizer.tokenize(TEXTS):
        with torch.no_grad():
            output = model.eval()(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                output_hidden_states=True, use_cache=False,
            )  # fmt: skip
        *inner, _ = output.hidden_states
        if config.model_type == "mamba":  # whose list begins after the first layer
            inner = [None, *inner[:-1]]
        states = torch.stack(
            [
                output.hidden_states[-1][0]
                if layer == config.num_hidden_layers
                else inner[layer][0]
                for layer in encoder.description.layers
            ]
        ).mean(0)
        rows.append(naive_pool(encoder.description.pooling, states))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def naive_pool(pooling, states):
    positions = torch.arange(1, len(states) + 1, dtype=torch.float32)
    return {
        "last": states[-1],
        "mean": states.mean(0),
        "weighted-mean": positions @ states / positions.sum(),
        "first+max": torch.cat([states[0], states.amax(0)]),
    }[pooling]


@pytest.mark.parametrize(
    "case",
    [*map(marked, FAST), *(marked(case, pytest.mark.slow) for case in SLOW)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_vectors_equal_the_naive_formula(matrix_folders, matrix_adapters, case):
    family, pooling, layer, attention, dtype, kind = case
    folder, adapter = matrix_folders[family], matrix_adapters(family, kind)
    config = EncoderConfig(
        str(folder), adapter=adapter, pooling=pooling, layer=layer, attention=attention,
        dtype=dtype, prompt="cluster-the-text", max_tokens=60,
    )  # fmt: skip
    encoder = Encoder.load(config, device="cpu")
    expected = naive(encoder, folder, adapter, kind, attention)
    found = encoder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * expected).sum(1).min() >= LEAST[dtype]


@pytest.mark.parametrize(
    ("dtype", "layer"),
    [("float32", (1, -1)), *(pytest.param(d, -1, marks=pytest.mark.slow) for d in DTYPES[:2])],
)
@pytest.mark.parametrize("family", OTHER_KINDS)
def test_families_of_other_kinds_equal_the_naive_formula(other_folders, family, dtype, layer):
    folder = other_folders(family)
    config = EncoderConfig(
        str(folder), pooling="first+max", layer=layer, dtype=dtype, prompt="cluster-the-text",
        max_tokens=60,
    )  # fmt: skip
    encoder = Encoder.load(config, device="cpu")
    expected = naive(encoder, folder, None, "none", "auto")
    found = encoder.encode(TEXTS)
    assert (found * expected).sum(1).min() >= LEAST[dtype]
    alone = np.vstack([encoder.encode([text]) for text in TEXTS])
    assert (alone * expected).sum(1).min() >= LEAST[dtype]
