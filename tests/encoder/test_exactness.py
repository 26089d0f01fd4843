"""The packaged LLM's vectors against the plain formula: one text at a time, float32."""

import subprocess
import sys
from functools import cache

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_models import imitates_bfloat16, multiplies_int8
from torch.utils.flop_counter import FlopCounterMode

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.packed import PackedDecoder
from pipelines.runtime.errors import InputError
from pipelines.runtime.packaged import load_labelled_corpus, minilm_folder

pytestmark = pytest.mark.slow

INT8_TOO = pytest.param("int8", 0.99, marks=pytest.mark.int8)


def bfloat16_too(cosine):
    return pytest.param("bfloat16", cosine, marks=pytest.mark.bfloat16)


HARD_TEXTS = [
    "",
    "a",
    " \t\n  ",
    "😀👩‍👩‍👧‍👦🏴‍☠️",
    "שלום עולם مرحبا بالعالم",
    "broken \ud800 surrogate \udfff",
    "nul \0 characters \0",
    "x" * 1_000_000,
    "</s><|im_end|><|im_start|>",
    "e\u0301" * 5000,
]


@pytest.fixture(scope="module")
def texts():
    try:
        corpus = load_labelled_corpus("20newsgroups", "test")["text"].to_pylist()
    except InputError as error:
        pytest.skip(str(error))
    return [*corpus[::500], *HARD_TEXTS]


@pytest.fixture(scope="module")
def encoders(texts):
    @cache
    def encoder(dtype):
        return Encoder.load(EncoderConfig(adapter=None, dtype=dtype, max_tokens=128), device="cpu")

    return encoder


@pytest.fixture(scope="module")
def reference(texts, encoders):
    encoder = encoders("float32")
    folder = encoder.description.fetch()[0].folder
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = [
            model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
            for ids in encoder.tokenizer.tokenize(texts)
        ]
    return torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()


def least_cosine(found, expected):
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    return (found * expected).sum(axis=1).min()


@pytest.mark.parametrize(("dtype", "cosine"), [("float32", 0.99999), bfloat16_too(0.999), INT8_TOO])
def test_vectors_equal_the_plain_formula(encoders, texts, reference, dtype, cosine):
    assert isinstance(encoders(dtype)._decoder, PackedDecoder)
    assert least_cosine(encoders(dtype).encode(texts), reference) >= cosine


def test_the_default_is_the_model_with_its_adapter_as_peft_runs_it(texts):
    encoder = Encoder.load(EncoderConfig(dtype="float32", max_tokens=128), device="cpu")
    model, adapter = encoder.description.fetch()
    base = transformers.AutoModel.from_pretrained(model.folder, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, str(adapter.folder)).eval()
    texts = texts[::3]
    rows = []
    for ids in encoder.tokenizer.tokenize(texts):
        with torch.no_grad():
            states = tuned(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        rows.append(torch.cat([states[-1], states.mean(dim=0)]))
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()
    assert least_cosine(encoder.encode(texts), expected) >= 0.9999


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("float32", 0.99999), bfloat16_too(0.9995), INT8_TOO]
)
def test_vectors_do_not_depend_on_batches_order_and_neighbours(encoders, texts, dtype, cosine):
    encoder = encoders(dtype)
    texts = texts[::2]
    expected = encoder.encode(texts)
    np.testing.assert_array_equal(encoder.encode(texts), expected)  # the same work, the same bits
    order = np.random.default_rng(0).permutation(len(texts))
    assert least_cosine(encoder.encode([texts[i] for i in order]), expected[order]) >= cosine
    alone = np.vstack([encoder.encode([text]) for text in texts])
    assert least_cosine(alone, expected) >= cosine


def test_a_sentence_encoders_folder_gives_the_vectors_of_its_library(texts):
    library = pytest.importorskip("sentence_transformers")
    folder = str(minilm_folder())
    readable = [text for text in texts if "\ud800" not in text]
    expected = library.SentenceTransformer(folder, device="cpu").encode(readable)
    encoder = Encoder.load(EncoderConfig(folder, dtype="float32"), device="cpu")
    assert least_cosine(encoder.encode(readable), expected) > 0.9999


def test_lower_precision_clusters_as_well_as_float32():
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    corpus = load_labelled_corpus("20newsgroups", "test").slice(0, 7500)
    chosen = np.random.default_rng(0).choice(len(corpus), 1000, replace=False)
    corpus = corpus.take(chosen)
    scores = {}
    runs = {"bfloat16": not imitates_bfloat16(), "int8": multiplies_int8()}
    lower = [dtype for dtype, is_run in runs.items() if is_run]
    if not lower:
        pytest.skip("this CPU runs no lower precision")
    for dtype in ("float32", *lower):
        encoder = Encoder.load(
            EncoderConfig(adapter="auto", dtype=dtype, max_tokens=24), device="cpu"
        )
        vectors = encoder.encode(corpus["text"].to_pylist())
        scores[dtype] = np.mean(
            [
                v_measure_score(corpus["label"], KMeans(20, random_state=seed).fit_predict(vectors))
                for seed in range(10)
            ]
        )
    for dtype in lower:
        assert abs(scores["float32"] - scores[dtype]) <= 0.01, dtype


def test_layers_above_the_wanted_one_are_not_run(texts):
    products = {}
    for layer in (-1, 10):
        encoder = Encoder.load(
            EncoderConfig(adapter=None, layer=layer, max_tokens=64), device="cpu"
        )
        with FlopCounterMode(display=False) as counter:
            encoder.encode(texts[:12])
        products[layer] = counter.get_total_flops()
    assert products[10] == pytest.approx(products[-1] / 3, rel=0.1)


_MEMORY_PROBE = """
from pathlib import Path
from pipelines.encoder.encoder import Encoder, EncoderConfig
encoder = Encoder.load(EncoderConfig(max_tokens=4000), device="cpu")
encoder.encode(["word " * 100_000, *["short text"] * 300, "x" * 1_000_000])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def test_memory_stays_within_the_model_and_two_gib_whatever_the_lengths():
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROBE], capture_output=True, text=True, check=True
    )
    description = describe_encoder(EncoderConfig(), device="cpu")
    folder = description.fetch()[0].folder
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # in bfloat16
    model_bytes = stored * (2 if description.dtype == "float32" else 1)
    peak_bytes = int(done.stdout) * 1024
    assert peak_bytes <= model_bytes + 2 * 2**30
