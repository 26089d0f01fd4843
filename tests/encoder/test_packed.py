import logging

import pytest
import torch
import transformers
from tiny_models import SENTENCES, tiny_model

from pipelines.encoder import packed as packed_decoder
from pipelines.encoder.encoder import Encoder, EncoderConfig
from pipelines.encoder.packed import PackedDecoder, can_pack
from pipelines.encoder.packed_attention import Packing, attend, attend_from_last, rotate
from pipelines.encoder.padded import PaddedDecoder
from pipelines.encoder.pooling import pool

PREFIX = [1, 9, 8]
BODIES = [[5], [7, 5, 6, 11], list(range(3, 150)), [30] * 70, list(range(40, 40 + 64))]
TOKEN_IDS = [[*PREFIX, *body] for body in BODIES]

PACKABLE = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3 positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama with one key head": {"num_key_value_heads": 1},
    "mistral": {"sliding_window": 4096},
    "mistral of a window": {"sliding_window": 20},
    "qwen2": {},
    "qwen2 of windows": {
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
    },
    "qwen3": {},
    "gemma3": {},
    "gemma3 of few windows": {
        "sliding_window": 70,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 9,
    },
}


@pytest.fixture(scope="module", params=PACKABLE)
def model(request, tmp_path_factory):
    family = request.param.split()[0]
    folder = tiny_model(tmp_path_factory.mktemp("model"), family, **PACKABLE[request.param])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():  # norms and biases that are not told apart while they are all alike
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("layers", [(4,), (2,), (0,), (0, 1, 3), (2, 4)])
@pytest.mark.parametrize("prefix", [PREFIX, []])
@pytest.mark.parametrize("last_only", [True, False])
def test_it_equals_the_models_own_pass(model, layers, prefix, last_only):
    padded = PaddedDecoder(copy_of(model), layers)
    packed = PackedDecoder(copy_of(model), layers, prefix, longest_tokens=200)
    expected = pool(*padded.states(TOKEN_IDS), "last" if last_only else "mean")
    found = pool(*packed.states(TOKEN_IDS, last_only=last_only), "mean")
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def copy_of(model):
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def test_joined_weights_take_no_memory_and_leave_the_model_as_it_was(model):
    model = copy_of(model)
    ids = torch.tensor([TOKEN_IDS[1]])
    with torch.no_grad():
        before = model(ids).last_hidden_state
        packed = PackedDecoder(model, (4,), PREFIX, longest_tokens=200)
        torch.testing.assert_close(model(ids).last_hidden_state, before, atol=1e-5, rtol=1e-4)
    joined = packed._layers[0].qkv.weight
    own = model.layers[0].self_attn.q_proj.weight
    assert own.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {}),
        ("phi", {}),
        ("gpt_neox", {}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_what_it_was_not_written_for_runs_the_models_own_pass(family, settings, tmp_path):
    folder = tiny_model(tmp_path, family, **settings)
    assert not can_pack(transformers.AutoModel.from_pretrained(folder))


def test_a_wrong_packed_pass_is_noticed_at_load(tmp_path, monkeypatch, caplog):
    def attends_backwards(queries, keys, values, *others):
        return attend(queries, keys.flip(2), values, *others)

    config = EncoderConfig(model=str(tiny_model(tmp_path)), dtype="float32")
    right = Encoder.load(config, device="cpu").encode(SENTENCES)
    monkeypatch.setattr(packed_decoder, "attend", attends_backwards)
    with caplog.at_level(logging.WARNING):
        encoder = Encoder.load(config, device="cpu")
    assert "disagrees" in caplog.text
    torch.testing.assert_close(torch.tensor(encoder.encode(SENTENCES)), torch.tensor(right))


@pytest.mark.parametrize("lengths", [[3, 3], [1, 5, 2], [7]])
def test_packing_pads_and_unpads(lengths):
    packing = Packing.of(lengths, torch.device("cpu"))
    rows = torch.arange(sum(lengths) * 2).view(-1, 2)
    padded = packing.pad(rows)
    assert padded.shape == (len(lengths), max(lengths), 2)
    torch.testing.assert_close(packing.unpad(padded), rows)
    ends = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
    assert packing.last.tolist() == ends
    assert packing.positions.tolist() == [place for size in lengths for place in range(size)]


@pytest.mark.parametrize("lengths", [[3, 3], [1, 5, 2], [8, 8], [16]])
def test_packing_rounds_rows_and_places_up(lengths):
    cpu = torch.device("cpu")
    packing = Packing.of(lengths, cpu, multiple=16, longest_multiple=8)
    total = sum(lengths)
    assert packing.filler == {6: 10, 8: 8, 16: 0}[total]
    rows = torch.arange((total + packing.filler) * 2).view(-1, 2)
    padded = packing.pad(rows)
    assert padded.shape == (len(lengths), 16 if max(lengths) > 8 else 8, 2)
    torch.testing.assert_close(packing.unpad(padded)[:total], rows[:total])
    assert len(packing.unpad(padded)) == len(rows)
    plain = Packing.of(lengths, cpu)
    for text, length in enumerate(lengths):
        torch.testing.assert_close(padded[text, :length], plain.pad(rows[:total])[text, :length])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("prefix", [0, 5])
def test_blocks_attend_as_one_softmax_would(length, prefix):
    torch.manual_seed(0)
    queries = torch.randn(2, 3, length, 4, 16)
    keys, values = torch.randn(2, 2, 3, prefix + length, 16)
    seen = torch.arange(prefix + length) <= prefix + torch.arange(length)[:, None]
    scores = torch.einsum("nklgd,nkmd->nkglm", queries, keys) * 0.25
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("nkglm,nkmd->nklgd", weights, values)
    torch.testing.assert_close(attend(queries, keys, values, 0.25), expected, atol=1e-5, rtol=1e-4)
    ends = torch.tensor([prefix + length] * 2)
    found = attend_from_last(queries[:, :, -1], keys, values, ends, 0.25)
    torch.testing.assert_close(found, expected[:, :, -1], atol=1e-5, rtol=1e-4)


def test_turning_by_no_angle_changes_nothing():
    vectors = torch.randn(2, 3, 8)
    cos, sin = torch.ones(3, 8), torch.zeros(3, 8)
    torch.testing.assert_close(rotate(vectors, cos, sin, torch.empty_like(vectors)), vectors)
