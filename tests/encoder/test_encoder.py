import numpy as np
import pytest
import torch
import transformers
from tiny_models import FAMILIES, INT8, SENTENCES, tiny_adapter, tiny_model

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import POOLINGS, EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.padded import find_layers, read_states
from pipelines.runtime.errors import InputError

TEXTS = [*SENTENCES, "", " \n\t ", "a", " ".join(SENTENCES) * 4, "naïve 日本語 😀 שלום"]


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama") / "llama")


def reference(encoder, folder, texts, *, dtype=torch.float32, model=None):
    """The plain formula: one text at a time, all hidden states, no cache, no padding."""
    model = model or transformers.AutoModel.from_pretrained(folder, dtype=dtype)
    description, head, tail = encoder.description, encoder.tokenizer.head, encoder.tokenizer.tail
    vectors = []
    for ids in encoder.tokenizer.tokenize(texts):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        states = sum(output.hidden_states[i][0].float() for i in description.layers)
        states = states / len(description.layers)
        body = states[len(head) : len(ids) - len(tail)]
        vector = plain_pool(description.pooling, states, body if len(body) else states)
        vectors.append(vector / vector.norm())
    return torch.stack(vectors).numpy()


def plain_pool(pooling, states, body):
    positions = torch.arange(1, len(states) + 1, dtype=torch.float32)
    return {
        "last": states[-1],
        "first": states[0],
        "mean": states.mean(0),
        "body-mean": body.mean(0),
        "weighted-mean": (positions @ states) / positions.sum(),
        "max": states.amax(0),
        "last+mean": torch.cat([states[-1], states.mean(0)]),
    }[pooling]


def assert_close(found, expected, cosine):
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * expected).sum(axis=1).min() >= cosine


def load(folder, **settings):
    settings = {"dtype": "float32", "max_tokens": 100, **settings}
    return Encoder.load(EncoderConfig(model=str(folder), **settings), device="cpu")


def test_every_family_equals_the_plain_formula(family_folder):
    encoder = load(family_folder)
    assert_close(encoder.encode(TEXTS), reference(encoder, family_folder, TEXTS), 0.99999)


@pytest.mark.parametrize("layer", [0, 2, -2, (1, -1)])
def test_any_layer_of_every_family_equals_the_plain_formula(family_folder, layer):
    encoder = load(family_folder, layer=layer)
    assert_close(encoder.encode(TEXTS), reference(encoder, family_folder, TEXTS), 0.99999)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prompt", ["one-word", "none", "cluster-the-text"])
def test_every_pooling_equals_the_plain_formula(folder, pooling, prompt):
    encoder = load(folder, pooling=pooling, prompt=prompt, append_eos=True)
    assert_close(encoder.encode(TEXTS), reference(encoder, folder, TEXTS), 0.99999)
    assert encoder.encode(TEXTS).shape == (len(TEXTS), encoder.dimension)


def test_order_neighbours_and_batch_size_change_nothing(family_folder):
    encoder = load(family_folder)
    expected = encoder.encode(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert_close(encoder.encode([TEXTS[i] for i in order]), expected[order], 0.99999)
    assert_close(np.vstack([encoder.encode([text]) for text in TEXTS]), expected, 0.99999)
    encoder.budget_tokens = 150
    assert_close(encoder.encode(TEXTS), expected, 0.99999)


def test_left_padding_gives_the_states_of_right_padding(family_folder):
    model = transformers.AutoModel.from_pretrained(family_folder)
    stack = find_layers(model)
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    layers, count = (1, len(stack)), len(stack)
    right = read_states(model, stack, layers, count, ids, mask)[1, :3]
    left = read_states(
        model, stack, layers, count, ids[1:].roll(2, dims=1), mask[1:].roll(2, dims=1)
    )[0, 2:]
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_head", [False, True])
def test_an_adapter_is_merged_wherever_it_was_trained(folder, tmp_path, with_head):
    import peft

    adapter = tiny_adapter(tmp_path / "adapter", folder, with_head=with_head)
    encoder = load(folder, adapter=str(adapter))
    kind = transformers.AutoModelForCausalLM if with_head else transformers.AutoModel
    tuned = peft.PeftModel.from_pretrained(kind.from_pretrained(folder), adapter)
    expected = reference(encoder, folder, TEXTS, model=tuned.eval())
    assert_close(encoder.encode(TEXTS), expected, 0.9999)
    assert (load(folder).encode(TEXTS) * expected).sum(axis=1).max() < 0.999


def test_an_adapter_of_another_model_is_refused(folder, tmp_path):
    other = tiny_model(tmp_path / "other", num_hidden_layers=6)
    adapter = tiny_adapter(tmp_path / "adapter", other)
    with pytest.raises(InputError, match="does not fit the model"):
        load(folder, adapter=str(adapter))


def test_no_texts_give_no_vectors(folder):
    assert load(folder).encode([]).shape == (0, 64)


def test_a_text_without_any_token_is_refused_by_name(tmp_path):
    encoder = load(tiny_model(tmp_path / "phi", "phi"), prompt="none")
    assert encoder.tokenizer.check_text("") is not None
    assert encoder.tokenizer.check_text(" ") is None
    with pytest.raises(InputError, match="empty"):
        encoder.encode(["a", ""])


def test_stats_tell_tokens_from_padding(folder, tmp_path):
    texts = ["a b c d e f", "a"]
    for encoder, waste in (load(folder), 0), (load(tiny_model(tmp_path, "phi")), 1):
        encoder.encode(texts)
        lengths = [len(ids) for ids in encoder.tokenizer.tokenize(texts)]
        assert (encoder.stats.texts, encoder.stats.tokens) == (2, sum(lengths))
        padding = 2 * max(lengths) - sum(lengths)
        assert encoder.stats.padded_tokens == sum(lengths) + waste * padding


def test_out_of_memory_halves_the_budget_and_loses_nothing(folder, monkeypatch):
    encoder = load(folder)
    expected = encoder.encode(TEXTS)
    whole = encoder._encode_batch

    def fails_on_many(token_ids):
        if len(token_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(token_ids)

    monkeypatch.setattr(encoder, "_encode_batch", fails_on_many)
    before = encoder.budget_tokens
    assert_close(encoder.encode(TEXTS), expected, 0.99999)
    assert encoder.budget_tokens < before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", INT8])
def test_threads_that_take_a_batch_each_give_the_same_and_are_as_many_after(folder, dtype):
    encoder = load(folder, dtype=dtype)
    texts = [f"{text} {number}" for number in range(40) for text in TEXTS[:3]]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = encoder.encode(texts)
        torch.set_num_threads(3)
        encoder.budget_tokens = 300
        assert_close(encoder.encode(texts), expected, 0.9999 if dtype == "float32" else 0.999)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_other_errors_are_not_retried(folder, monkeypatch):
    encoder = load(folder)

    def breaks(token_ids):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(encoder, "_encode_batch", breaks)
    with pytest.raises(RuntimeError, match="shapes"):
        encoder.encode(TEXTS)


def test_bfloat16_stays_near_the_reference(folder):
    encoder = load(folder, dtype="bfloat16")
    assert_close(encoder.encode(TEXTS), reference(encoder, folder, TEXTS), 0.999)


@pytest.mark.int8
def test_int8_stays_near_the_reference_in_every_family(family_folder):
    encoder = load(family_folder, dtype="int8")
    assert_close(encoder.encode(TEXTS), reference(encoder, family_folder, TEXTS), 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", INT8])
def test_compiled_vectors_are_the_same(folder, dtype):
    plain = load(folder, dtype=dtype)
    compiled = Encoder.load(plain.description, device="cpu", compile_model=True)
    least = 0.9995 if dtype == "bfloat16" else 0.9999
    assert_close(compiled.encode(TEXTS), plain.encode(TEXTS), least)


def test_a_saved_encoder_comes_back_the_same(folder, tmp_path):
    encoder = load(folder, pooling="mean", layer=(1, 2))
    encoder.save(str(tmp_path))
    again = Encoder.from_folder(str(tmp_path), device="cpu")
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_the_dimension_is_known_without_weights(family_folder):
    config = EncoderConfig(model=str(family_folder), pooling="last+mean", dtype="float32")
    assert describe_encoder(config).dimension == Encoder.load(config).encode(["a"]).shape[1]
