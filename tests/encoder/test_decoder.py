import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tiny_models import SENTENCES, tiny_model, tiny_tokenizer

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.packed import PackedDecoder
from pipelines.runtime.errors import InputError

TEXTS = [*SENTENCES, "a", " ".join(SENTENCES)]


def load(folder, **settings):
    settings = {"dtype": "float32", **settings}
    return Encoder.load(EncoderConfig(str(folder), **settings), device="cpu")


def reference(encoder, folder, texts, **changes):
    """One text at a time by the model's own pass, its configuration changed."""
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModel.from_pretrained(folder, config=config).eval()
    rows = []
    for ids in encoder.tokenizer.tokenize(texts):
        with torch.no_grad():
            output = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=int))
        states = output.last_hidden_state[0]
        rows.append(states[-1] if encoder.description.pooling == "last" else states.mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def change_weights(folder, change):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            change(layer)
    model.save_pretrained(folder)
    return folder


def one_large_channel(layer):
    """A channel that is large and means little: int8 loses the others beside it."""
    attention, mlp = layer.self_attn, layer.mlp
    for norm, products in (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        norm.weight[3] *= 30000
        for product in products:
            product.weight[:, 3] /= 30000


@pytest.mark.int8
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_int8_that_loses_too_much_is_refused_and_never_something_else(tmp_path, activation):
    folder = tiny_model(tmp_path / "llama", hidden_act=activation)
    change_weights(folder, one_large_channel)
    with pytest.raises(InputError, match=r"loses too much in int8: cosine .* use --dtype"):
        load(folder, dtype="int8")


def test_float16_that_overflows_is_refused_with_the_remedy(tmp_path):
    folder = change_weights(
        tiny_model(tmp_path / "llama"), lambda layer: layer.mlp.down_proj.weight.mul_(1e6)
    )
    with pytest.raises(InputError, match="no finite vector in float16: use --dtype bfloat16"):
        load(folder, dtype="float16")


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt_neox"])
def test_bidirectional_attention_equals_the_models_own(tmp_path, family, pooling):
    folder = tiny_model(tmp_path / family, family)
    encoder = load(folder, attention="bidirectional", pooling=pooling, prompt="cluster-the-text")
    expected = reference(encoder, folder, TEXTS, is_causal=False)
    assert (encoder.encode(TEXTS) * expected).sum(1).min() > 0.9999
    assert (load(folder, pooling=pooling).encode(TEXTS) * expected).sum(1).min() < 0.999
    assert isinstance(encoder._decoder, PackedDecoder) == (family != "gpt_neox")


def says_both_ways(folder, target, word):
    """A copy of a model whose configuration has Gemma's own word for bidirectional attention."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    config["use_bidirectional_attention"] = word
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("family", "word"), [("gemma3", True), ("gemma4", "all")])
def test_attention_asked_of_gemma_is_that_of_a_folder_that_says_so(tmp_path, family, word):
    # of windows too, which it counts in another way then
    causal = tiny_model(tmp_path / "causal", family, num_hidden_layers=2)
    both = says_both_ways(causal, tmp_path / "both", word)
    settings = {"pooling": "mean", "prompt": "none"}
    encoders = {folder: load(folder, **settings) for folder in (causal, both)}
    expected = {folder: reference(encoders[folder], folder, TEXTS) for folder in (causal, both)}
    assert (expected[causal] * expected[both]).sum(1).min() < 0.99
    for attention, same in (("causal", causal), ("bidirectional", both)):
        for folder in (causal, both):
            encoder = load(folder, attention=attention, **settings)
            assert (encoder.encode(TEXTS) * expected[same]).sum(1).min() > 0.9999
            own = encoder.fingerprint == encoders[folder].fingerprint
            assert own == (folder == same)


WINDOWED = {
    "gemma3": {"sliding_window": 17},  # which bidirectional attention halves
    "mistral": {"sliding_window": 8},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}


def looks_closely(layer):
    """Attention to few tokens, so that one more or less makes another vector."""
    layer.self_attn.q_proj.weight.mul_(4)
    layer.self_attn.o_proj.weight.mul_(4)


@pytest.mark.parametrize("attention", ["auto", "causal", "bidirectional"])
@pytest.mark.parametrize("says", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_the_models_own_for_texts_around_and_beyond_them(
    tmp_path, family, says, attention
):
    folder = tiny_model(tmp_path, family, num_hidden_layers=2, **WINDOWED[family])
    change_weights(folder, looks_closely)
    config = json.loads((folder / "config.json").read_text())
    files = {}
    for word in ("causal", "bidirectional"):
        both_ways = word == "bidirectional"
        own = {"use_bidirectional_attention": both_ways}
        files[word] = {**config, **(own if family == "gemma3" else {"is_causal": not both_ways})}
    (folder / "config.json").write_text(json.dumps(files[says]))
    encoder = load(folder, attention=attention, pooling="first+last", prompt="none")
    assert isinstance(encoder._decoder, PackedDecoder)
    wanted = transformers.AutoConfig.for_model(**files[says if attention == "auto" else attention])
    model = transformers.AutoModel.from_pretrained(
        folder, config=wanted, attn_implementation="eager", dtype=torch.float32
    ).eval()
    for length in (7, 8, 9, 10, 16, 17, 18, 19, 70):
        ids = list(range(3, 3 + length))
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(torch.cat([states[0], states[-1]]), dim=0)
        found = encoder.encode_tokens([ids, [*ids, 5, 6], [9]])[0]
        assert found @ expected.numpy() > 0.9999, length


@pytest.mark.parametrize("attention", ["auto", "causal", "bidirectional"])
def test_a_gemma_whose_configuration_says_bidirectional_in_the_common_word(tmp_path, attention):
    folder = tiny_model(tmp_path, "gemma3", num_hidden_layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    encoder = load(folder, attention=attention, pooling="mean")
    assert isinstance(encoder._decoder, PackedDecoder)
    expected = reference(encoder, folder, TEXTS, is_causal=attention == "causal")
    assert (encoder.encode(TEXTS) * expected).sum(1).min() > 0.9999


def test_windows_that_an_earlier_version_counted_otherwise_are_told_apart_and_not_run(tmp_path):
    folder = tiny_model(tmp_path, "gemma3", num_hidden_layers=2)
    mine = describe_encoder(EncoderConfig(str(folder), attention="bidirectional"))
    earlier = replace(mine, windows=1)
    assert earlier.fingerprint != mine.fingerprint
    with pytest.raises(InputError, match=r"counts its windows as an earlier .* embed the corpus"):
        Encoder.load(earlier, device="cpu")
    assert describe_encoder(EncoderConfig(str(folder))).windows == 1  # as there is one way alone


def test_gemma_4_that_sees_images_both_ways_is_causal_on_texts(tmp_path):
    folder = tiny_model(tmp_path / "gemma4", "gemma4")
    folder = says_both_ways(folder, tmp_path / "vision", "vision")
    assert describe_encoder(EncoderConfig(str(folder), attention="causal")).attention is None
    both = describe_encoder(EncoderConfig(str(folder), attention="bidirectional"))
    assert both.attention == "bidirectional"


def test_a_model_of_images_that_would_see_both_ways_is_refused_with_a_way_out(tmp_path):
    text = tiny_model(tmp_path / "text", "gemma3", num_hidden_layers=2)
    content = transformers.AutoConfig.from_pretrained(text).to_dict()
    images = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**content, "use_bidirectional_attention": True}, vision_config=images,
        mm_tokens_per_image=4, image_token_id=3, boi_token_id=4, eoi_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    shutil.copytree(text, tmp_path / "whole")
    whole.save_pretrained(tmp_path / "whole")
    for attention in ("auto", "bidirectional"):
        with pytest.raises(InputError, match=r"both ways in batches; pass --attention causal"):
            load(tmp_path / "whole", attention=attention, prompt="none")
    encoder = load(tmp_path / "whole", attention="causal", prompt="none")
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 64)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_attention_that_a_configuration_names_in_vain_must_be_asked_for(tmp_path, family):
    causal = tiny_model(tmp_path / "causal", family, num_hidden_layers=2)
    folder = says_both_ways(causal, tmp_path / "both", True)
    with pytest.raises(
        InputError, match=f"{family} does not heed in every batch: pass --attention"
    ):
        load(folder)
    expected = load(causal, pooling="mean").encode(TEXTS)
    found = load(folder, attention="causal", pooling="mean").encode(TEXTS)
    assert (found * expected).sum(1).min() > 0.9999
    both = load(folder, attention="bidirectional", pooling="mean")
    expected = reference(both, folder, TEXTS, is_causal=False)
    assert (both.encode(TEXTS) * expected).sum(1).min() > 0.9999
    found = load(causal, attention="bidirectional", pooling="mean").encode(TEXTS)
    assert (found * expected).sum(1).min() > 0.9999


def test_code_that_cannot_run_is_refused_in_one_line_also_where_attention_is_asked_for(tmp_path):
    folder = tiny_model(tmp_path, "deepseek_v3", num_key_value_heads=2)  # its heads cannot share
    for attention in ("auto", "bidirectional"):
        with pytest.raises(InputError, match=r"DeepseekV3Model cannot be run .* another model"):
            load(folder, attention=attention)


@pytest.mark.int8
def test_code_that_cannot_run_in_int8_is_refused_in_one_line(tmp_path):
    folder = tiny_model(tmp_path / "mamba", "mamba")  # multiplies by a layer's weights itself
    with pytest.raises(InputError, match=r"MambaModel cannot be run .* in int8 .* --dtype") as told:
        load(folder, dtype="int8")
    assert "\n" not in str(told.value)


@pytest.mark.int8
def test_routers_to_experts_are_not_rounded(tmp_path):
    folder = tiny_model(tmp_path / "phimoe", "phimoe")  # its router is a kind of linear layer
    found, expected = load(folder, dtype="int8").encode(TEXTS), load(folder).encode(TEXTS)
    assert (found * expected).sum(1).min() > 0.99


def embedding_gemma2(folder):
    """A tiny EmbeddingGemma 2, which projects each token's last state."""
    tiny_model(folder)  # for its tokenizer
    torch.manual_seed(0)
    config = transformers.EmbeddingGemma2TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, global_head_dim=32, embedding_dim=48,
        hidden_size_per_layer_input=16, sliding_window=8, max_position_embeddings=1024,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["opt", "embedding_gemma2"])
def test_a_last_state_of_a_width_of_its_own_is_taken(tmp_path, family):
    if family == "opt":
        folder, width = tiny_model(tmp_path / "opt", "opt", word_embed_proj_dim=32), 32
    else:
        folder, width = embedding_gemma2(tmp_path / "gemma"), 48
    encoder = load(folder, pooling="mean", prompt="cluster-the-text")
    assert (encoder.dimension, load(folder, layer=1).dimension) == (width, 64)
    expected = reference(encoder, folder, TEXTS)
    assert (encoder.encode(TEXTS) * expected).sum(1).min() > 0.9999
    with pytest.raises(InputError, match=f"{width} numbers a token after its last layer and 64"):
        load(folder, layer=(1, -1))


def test_attention_is_in_the_fingerprint_only_where_it_is_not_the_models_own(tmp_path):
    folder = tiny_model(tmp_path / "llama", num_hidden_layers=2)
    fingerprints = [
        describe_encoder(
            EncoderConfig(str(folder), dtype="float32", attention=attention)
        ).fingerprint
        for attention in ("auto", "causal", "bidirectional")
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


UNLISTED = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def unlisted_model(folder, config):
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_layers_for_text_of_a_model_of_images_attend_as_asked(tmp_path):
    config = transformers.Qwen3VLTextConfig(**UNLISTED, num_key_value_heads=2, head_dim=16)
    folder = unlisted_model(tmp_path / "model", config)
    encoder = load(folder, pooling="mean", attention="bidirectional")
    assert encoder.description.attention == "bidirectional"
    expected = reference(encoder, folder, TEXTS, is_causal=False)
    assert (encoder.encode(TEXTS) * expected).sum(1).min() > 0.9999
    causal = load(folder, pooling="mean")
    assert (causal.encode(TEXTS) * reference(causal, folder, TEXTS)).sum(1).min() > 0.9999
    assert (causal.encode(TEXTS) * expected).sum(1).max() < 0.999


def test_a_model_that_writes_and_sees_all_is_not_taken_for_causal(tmp_path):
    config = transformers.BertGenerationConfig(**UNLISTED)
    folder = unlisted_model(tmp_path / "model", config)
    assert describe_encoder(EncoderConfig(str(folder), attention="bidirectional")).attention is None
    with pytest.raises(InputError, match=r"--attention causal|leave --attention out"):
        load(folder, pooling="mean", attention="causal")


def test_a_configuration_that_says_bidirectional_is_honoured(tmp_path):
    folder = tiny_model(tmp_path / "llama", num_hidden_layers=2)
    causal = load(folder, pooling="mean").encode(TEXTS)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_causal = False
    config.save_pretrained(folder)
    encoder = load(folder, pooling="mean")
    assert encoder.description.attention is None
    expected = reference(encoder, folder, TEXTS)
    assert (encoder.encode(TEXTS) * expected).sum(1).min() > 0.9999
    np.testing.assert_allclose(
        load(folder, pooling="mean", attention="causal").encode(TEXTS), causal, atol=1e-4
    )


def test_a_shared_prefix_that_some_texts_do_not_begin_with_is_no_harm(tmp_path):
    folder = tiny_model(tmp_path / "llama", num_hidden_layers=2)
    encoder = load(folder, prompt="ab: {text}", pooling="mean")
    ids = encoder.tokenizer.tokenize(["one text", "another"])
    odd = [ids[0], [7, *ids[1][1:]]]
    together, alone = encoder.encode_tokens(odd), encoder.encode_tokens([odd[1]])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
    np.testing.assert_allclose(together[0], encoder.encode_tokens([ids[0]])[0], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_longrope_texts_do_not_depend_on_their_batch(tmp_path, family):
    ropes = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 32, "factor": 32.0,
    }  # fmt: skip
    if family == "gemma3":  # each kind of layer turns in its own way
        plain = {"rope_type": "default", "rope_theta": 100.0}
        ropes = {"full_attention": ropes, "sliding_attention": plain}
    settings = {"num_hidden_layers": 2, "rope_parameters": ropes}
    if family == "gemma3":
        settings["layer_types"] = ["full_attention", "sliding_attention"]
    folder = tiny_model(tmp_path / family, family, **settings)
    encoder = load(folder, pooling="mean")
    texts = ["short", " ".join(SENTENCES)]
    alone = np.vstack([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), alone, atol=1e-5)
