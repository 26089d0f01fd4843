import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from tiny_models import SENTENCES, tiny_adapter, tiny_model, tiny_tokenizer

from pipelines.encoder import describe as describe_module
from pipelines.encoder import sources
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig, EncoderDescription, require_as_trained
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.prompts import PROMPTS
from pipelines.runtime.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return tiny_model(tmp_path / "model", num_hidden_layers=2)


def describe(folder, **settings):
    return describe_encoder(EncoderConfig(str(folder), **{"dtype": "float32", **settings}))


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(("family", "positions"), [("opt", 1024), ("bert", 512)])
def test_prompt_and_text_must_fit_learned_positions(tmp_path, family, positions):
    if family == "opt":
        folder = tiny_model(tmp_path / family, family)
    else:
        config = transformers.BertConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=positions,
        )  # fmt: skip
        folder = tmp_path / family
        transformers.BertModel(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(InputError, match=f"has {positions} positions: --max-tokens") as caught:
        describe(folder, max_tokens=positions, prompt="none", pooling="mean")
    most = int(str(caught.value).rsplit("--max-tokens ", 1)[1].split()[0])
    encoder = Encoder.load(
        EncoderConfig(str(folder), dtype="float32", max_tokens=most, prompt="none", pooling="mean")
    )
    assert encoder.encode(["x" * 5000]).shape == (1, 64)


def test_a_model_without_a_bound_of_positions_reads_as_many_tokens_as_asked(tmp_path):
    settings = transformers.XLNetConfig(vocab_size=512, d_model=64, n_layer=2, n_head=4, d_inner=96)
    transformers.XLNetModel(settings).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert describe(tmp_path, max_tokens=300).max_tokens == 300


def test_rotary_positions_may_be_exceeded_by_the_prompt(folder):
    assert describe(folder, max_tokens=1024).max_tokens == 1024


def test_an_adapter_of_a_foreign_class_needs_its_attention_named(folder, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", folder)
    path = adapter / "adapter_config.json"
    mapping = {"base_model_class": "LlamaBiModel", "parent_library": "llm2vec.models"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_mapping": mapping}))
    with pytest.raises(InputError, match="LlamaBiModel of llm2vec"):
        describe(folder, adapter=str(adapter))
    named = describe(folder, adapter=str(adapter), attention="bidirectional")
    assert named.attention == "bidirectional"


def test_dimensions_keep_the_first_numbers_renormalised(folder):
    whole = Encoder.load(EncoderConfig(str(folder), dtype="float32"), device="cpu")
    cut = Encoder.load(EncoderConfig(str(folder), dtype="float32", dimensions=16), device="cpu")
    expected = whole.encode(["a text"])[:, :16]
    expected /= (expected**2).sum() ** 0.5
    assert abs(cut.encode(["a text"]) - expected).max() < 1e-6
    assert cut.dimension == 16
    assert cut.fingerprint != whole.fingerprint
    with pytest.raises(InputError, match="vectors have 64"):
        describe(folder, dimensions=65)


def test_a_prompt_of_the_adapters_own_tokens_is_refused(folder, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<query>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", adapter)
    describe(folder, adapter=str(adapter))
    with pytest.raises(InputError, match="only the tokenizer of adapter"):
        describe(folder, adapter=str(adapter), prompt="<query>{text}")


def test_fingerprints_of_earlier_encoders_stay_what_they_were(folder):
    description = describe(folder)
    assert set(description.to_json()) == {
        "format", "fingerprint", "model", "model_revision", "adapter", "adapter_revision", "prompt",
        "pooling", "layers", "max_tokens", "normalize", "dtype", "append_eos", "dimension",
        "trust_remote_code",
    }  # fmt: skip


TEXT = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
IMAGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def random_model(folder, config, kind=transformers.AutoModel):
    torch.manual_seed(0)
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_of_images_and_texts_is_run_by_its_layers_for_text(tmp_path):
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**IMAGES),
        image_token_index=500,
    )
    folder = random_model(tmp_path / "model", config)
    description = describe(folder, layer=2, pooling="mean", prompt="none", max_tokens=60)
    encoder = Encoder.load(description, device="cpu")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, vector in zip(
        encoder.tokenizer.tokenize(SENTENCES), encoder.encode(SENTENCES), strict=True
    ):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
        expected = torch.nn.functional.normalize(states[0].mean(0), dim=0)
        assert vector @ expected.numpy() > 0.9999


def test_a_model_that_needs_images_is_refused(tmp_path):
    config = transformers.CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=IMAGES)
    with pytest.raises(InputError, match=r"CLIPModel\) cannot be run on texts alone"):
        describe(random_model(tmp_path / "model", config))


def test_the_decoder_of_a_model_with_an_encoder_is_refused(tmp_path):
    config = transformers.BartConfig(
        vocab_size=512, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96,
        decoder_ffn_dim=96, encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    kind = transformers.AutoModelForCausalLM
    folder = random_model(tmp_path / "model", config, kind)
    assert json.loads((folder / "config.json").read_text())["is_encoder_decoder"] is False
    with pytest.raises(InputError, match="bart models have an encoder and a decoder"):
        describe(folder)


def test_positions_that_grow_with_the_longest_text_are_not_reached(tmp_path):
    ropes = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    folder = tiny_model(tmp_path / "model", max_position_embeddings=64, rope_parameters=ropes)
    with pytest.raises(InputError, match="64 positions: --max-tokens 63 at most"):
        describe(folder, max_tokens=64, prompt="none")
    describe(folder, max_tokens=63, prompt="none")
    plain = {"rope_type": "default", "rope_theta": 100.0}
    each = {"full_attention": ropes, "sliding_attention": plain}
    tiny_model(folder, "gemma3", max_position_embeddings=64, rope_parameters=each)
    with pytest.raises(InputError, match="64 positions: --max-tokens 63 at most"):
        describe(folder, max_tokens=64, prompt="none")


def test_a_text_that_depends_on_its_batch_is_refused(tmp_path):
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=16, num_key_value_heads=2),
        vision_config=transformers.SiglipVisionConfig(**IMAGES, projection_dim=64),
        image_token_index=500, projection_dim=64,
    )  # fmt: skip
    folder = random_model(tmp_path / "model", config)
    with pytest.raises(InputError, match="does not heed in every batch: pass --attention"):
        describe(folder)
    description = replace(describe(folder, attention="causal", pooling="mean"), attention=None)
    with pytest.raises(InputError, match="another vector beside a longer one than alone"):
        Encoder.load(description, device="cpu")


SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (transformers.ConvBertConfig(**SIZES, embedding_size=64), "float32"),
        (transformers.MobileBertConfig(**SIZES), "bfloat16"),
        (transformers.NystromformerConfig(**SIZES), "bfloat16"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_text_that_its_padding_moves_a_little_is_refused(tmp_path, config, dtype):
    folder = random_model(tmp_path / "model", config)
    with pytest.raises(InputError, match="lets texts see what pads them: take another model"):
        Encoder.load(describe(folder, pooling="mean", dtype=dtype), device="cpu")


def test_attention_that_is_not_heeded_in_a_batch_is_told_by_its_flag(tmp_path):
    folder = random_model(tmp_path / "model", transformers.BertConfig(**SIZES))
    with pytest.raises(InputError, match="leave --attention out"):
        Encoder.load(describe(folder, pooling="mean", attention="causal"), device="cpu")


@pytest.fixture
def with_default_adapter(folder, tmp_path, monkeypatch):
    """``folder`` as the packaged model, with an adapter of its own that was trained in a way."""
    adapter = tiny_adapter(tmp_path / "packaged", folder)
    monkeypatch.setattr(sources, "_PACKAGED_ADAPTER_FOLDER", adapter)
    monkeypatch.setattr(describe_module, "PACKAGED_MODEL", str(folder))
    describe(folder, adapter="packaged", prompt="topic", pooling="last+mean").save(str(adapter))
    return folder


def test_the_packaged_model_has_its_adapter_by_default(with_default_adapter):
    found = describe(with_default_adapter)
    assert found.adapter == "packaged"
    assert (found.prompt, found.pooling) == (PROMPTS["topic"], "last+mean")
    assert found.fingerprint == describe(with_default_adapter, adapter="packaged").fingerprint
    loaded = Encoder.load(found, device="cpu")
    assert loaded.adapter_effect["changed_layers"] > 0
    assert EncoderDescription.from_json(found.to_json()) == found


def test_none_is_the_plain_model_with_the_fingerprint_that_it_always_had(with_default_adapter):
    plain = describe(with_default_adapter, adapter="none")
    assert plain == describe(with_default_adapter, adapter=None)
    assert plain.adapter is None
    assert plain.pooling == "last"
    assert plain.fingerprint != describe(with_default_adapter).fingerprint


@pytest.mark.parametrize(
    "settings",
    [{"prompt": "one-word"}, {"pooling": "mean"}, {"layer": 1}, {"append_eos": True}],
)
def test_what_the_default_adapter_was_not_trained_in_goes_without_it(
    with_default_adapter, settings, caplog
):
    found = describe(with_default_adapter, **settings)
    assert found == describe(with_default_adapter, adapter="none", **settings)
    assert "the model is used without it, as --adapter none does" in caplog.text
    with pytest.raises(InputError, match="was trained with another"):
        require_as_trained(
            describe(with_default_adapter, adapter="packaged", **settings), "packaged"
        )


def test_other_models_have_no_adapter_by_default(with_default_adapter, tmp_path):
    other = tiny_model(tmp_path / "other", seed=3)
    assert describe(other).adapter is None


def test_an_older_packaged_adapter_is_not_taken_for_the_one_of_today(with_default_adapter):
    found = describe(with_default_adapter)
    weights = sources._PACKAGED_ADAPTER_FOLDER / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v * 2 for k, v in tensors.items()}, weights)
    with pytest.raises(InputError, match="adapter 'packaged' is not the one described"):
        found.fetch()


@pytest.mark.parametrize("special", [True, False])
def test_tokens_that_the_embeddings_have_no_rows_for_are_refused_where_they_may_be_met(
    tmp_path, special
):
    rows = len(tiny_tokenizer())
    folder = tiny_model(tmp_path / "model", num_hidden_layers=2, vocab_size=rows)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([tokenizers.AddedToken("<mark>", special=special)])
    tokenizer.save_pretrained(folder)
    message = f"'<mark>' as token {rows}, but the model has rows for {rows} tokens"
    if special:  # a text that spells it is plain characters
        assert Encoder.load(describe(folder), device="cpu").encode(["a <mark> here"]).any()
    else:
        with pytest.raises(InputError, match=message):
            describe(folder)
    with pytest.raises(InputError, match=message):
        describe(folder, prompt="<mark> {text}")
