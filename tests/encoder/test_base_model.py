import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import SENTENCES, tiny_adapter, tiny_model, tiny_tokenizer

from pipelines.encoder.base_model import load_base_model
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.runtime.errors import InputError
from pipelines.training.adapter import add_adapter
from pipelines.training.config import LoraSettings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


CAUSAL = transformers.AutoModelForCausalLM


def tune(folder, adapter, *, spread=0.2, kind=CAUSAL, **settings):
    """An adapter of the model with its head, random unless ``spread`` is 0."""
    torch.manual_seed(3)
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
    tuned = peft.get_peft_model(kind.from_pretrained(folder), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.normal_(0, spread)
            elif weight.requires_grad and ("lora" not in name or not weight.any()):
                weight.add_(spread * torch.randn_like(weight))
    tuned.save_pretrained(adapter)
    return str(adapter)


def load(folder, **settings):
    settings = {"dtype": "float32", "prompt": "none", **settings}
    return Encoder.load(EncoderConfig(str(folder), **settings), device="cpu")


def unmerged(folder, adapter, texts, encoder, kind=CAUSAL):
    """Last states of the adapted model itself, one text at a time, as PEFT runs it."""
    tuned = peft.PeftModel.from_pretrained(kind.from_pretrained(folder), adapter).eval()
    rows = []
    for ids in encoder.tokenizer.tokenize(texts):
        with torch.no_grad():
            output = tuned(input_ids=torch.tensor([ids]), output_hidden_states=True)
        rows.append(output.hidden_states[-1][0, -1])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def assert_as_peft(folder, adapter, kind=CAUSAL):
    encoder = load(folder, adapter=adapter, pooling="last")
    expected = unmerged(folder, adapter, SENTENCES, encoder, kind)
    assert (encoder.encode(SENTENCES) * expected).sum(1).min() > 0.9999


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 6, 70]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    ],
    ids=str,
)
def test_adapters_of_a_tied_model_equal_peft(tmp_path, settings):
    # a change of the head leaves the input embeddings alone
    folder = tiny_model(tmp_path / "tied", num_hidden_layers=2, tie_word_embeddings=True)
    assert_as_peft(folder, tune(folder, tmp_path / "adapter", **settings))


def test_adapters_of_experts_equal_peft(tmp_path):
    folder = tiny_model(tmp_path / "moe", "qwen3_moe")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert_as_peft(folder, tune(folder, tmp_path / "adapter", target_parameters=experts))


def test_adapters_that_change_biases_equal_peft(tmp_path):
    folder = tiny_model(tmp_path / "opt", "opt")
    assert_as_peft(folder, tune(folder, tmp_path / "adapter", bias="all"))


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("gpt_neox", "query_key_value"),
        ("gpt2", "c_attn"),
        ("falcon", "query_key_value"),
        ("bloom", "query_key_value"),
        ("opt", "q_proj"),
        ("gemma2", "o_proj"),
    ],
)
def test_adapters_of_other_families_with_their_head_are_merged(tmp_path, family, target):
    folder = tiny_model(tmp_path / family, family)
    assert_as_peft(folder, tune(folder, tmp_path / "adapter", target_modules=[target]))


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "mpnet"])
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (transformers.AutoModel, "FEATURE_EXTRACTION"),
        (transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
        (transformers.AutoModelForMaskedLM, None),
    ],
    ids=["alone", "classifier", "masked"],
)
def test_adapters_of_encoders_with_any_head_equal_peft(tmp_path, family, kind, task):
    folder = tiny_model(tmp_path / family, family)
    target = {"mpnet": "q"}.get(family, "query")
    adapter = tune(folder, tmp_path / "a", kind=kind, task_type=task, target_modules=[target])
    assert_as_peft(folder, adapter, kind)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (transformers.AutoModelForImageTextToText, "q_proj"),  # of the images' tower too
        (transformers.AutoModelForImageTextToText, r".*language_model.*q_proj"),
        (transformers.AutoModel, r".*language_model.*q_proj"),
    ],
    ids=["all", "text", "alone"],
)
def test_adapters_of_models_of_images_equal_peft(tmp_path, kind, target):
    images = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = transformers.AutoConfig.from_pretrained(tiny_model(tmp_path / "t", "gemma3"))
    config = transformers.Gemma3Config(
        text_config=text, vision_config=images, mm_tokens_per_image=4, image_token_id=500
    )
    torch.manual_seed(0)
    folder = tmp_path / "model"
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    targets = target if "." in target else [target]
    adapter = tune(folder, tmp_path / "a", kind=kind, task_type=None, target_modules=targets)
    assert_as_peft(folder, adapter, kind)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {r"layers\.1\..*q_proj": 8}, "alpha_pattern": {"q_proj": 32}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"target_modules": r".*layers\.0\..*(q|v)_proj"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"trainable_token_indices": [5, 6, 70]},
        {"modules_to_save": ["input_layernorm"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "mica"},
        {"kasa_config": peft.KasaConfig()},
        {"monteclora_config": peft.MontecloraConfig()},
        {"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
    ],
    ids=str,
)
def test_adapters_of_every_shape_equal_peft(folder, tmp_path, settings):
    assert_as_peft(folder, tune(folder, tmp_path / "adapter", **settings))


def test_weights_that_an_adapter_lacks_are_told(folder, tmp_path, caplog):
    adapter = tune(folder, tmp_path / "adapter")
    change_weights(adapter, lambda weights: {k: v for k, v in weights.items() if "layers.1" in k})
    describe_encoder(EncoderConfig(str(folder), adapter=adapter))
    assert "layers.0.self_attn.q_proj.lora_A.weight and 1 more" in caplog.text


def test_an_adapter_with_numbers_that_are_not_finite_is_refused(folder, tmp_path):
    adapter = tune(folder, tmp_path / "adapter")
    change_weights(adapter, lambda weights: {k: v * torch.nan for k, v in weights.items()})
    with pytest.raises(InputError, match=r"is damaged: .* is not finite"):
        describe_encoder(EncoderConfig(str(folder), adapter=adapter))


def change_weights(adapter, change):
    path = f"{adapter}/adapter_model.safetensors"
    weights = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "worked out anew, and otherwise, at each load"),
        ({"lora_alpha": 0}, "changes nothing"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [70, 71]}, "alora_invocation_tokens"),
        ({"target_modules": ["lm_head"]}, "changes only lm_head"),
        ({"spread": 0}, "changes nothing"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused_before_weights_are_read(
    folder, tmp_path, settings, message
):
    adapter = tune(folder, tmp_path / "adapter", **settings)
    with pytest.raises(InputError, match=message) as caught:
        describe_encoder(EncoderConfig(str(folder), adapter=adapter))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "LoKr", "VBLoRA"])
def test_other_kinds_of_adapters_are_refused_by_name(folder, tmp_path, kind):
    config = getattr(peft, f"{kind}Config")(target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"peft_type '{kind.upper()}'; LORA is required"):
        describe_encoder(EncoderConfig(str(folder), adapter=str(tmp_path)))


def test_an_adapter_of_a_wider_model_is_refused_before_weights_are_read(folder, tmp_path):
    other = tiny_model(tmp_path / "other", hidden_size=32, num_hidden_layers=2)
    adapter = str(tiny_adapter(tmp_path / "adapter", other))
    with pytest.raises(InputError, match="does not fit the model") as caught:
        describe_encoder(EncoderConfig(str(folder), adapter=adapter))
    assert "\n" not in str(caught.value)


def test_whole_embeddings_in_an_adapter_are_used(folder, tmp_path):
    adapter = tune(folder, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(path)
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name] = torch.randn_like(weights[name])
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    assert_as_peft(folder, adapter)


def test_embeddings_of_added_tokens_are_refused_with_the_reason(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(520)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(InputError, match="embeddings of 520 tokens, the model has 512"):
        describe_encoder(EncoderConfig(str(folder), adapter=str(tmp_path / "adapter")))


def test_what_an_adapter_did_is_measured_and_kept_beside_the_fingerprint(folder, tmp_path):
    adapter = str(tiny_adapter(tmp_path / "adapter", folder))
    encoder = load(folder, adapter=adapter)
    effect = encoder.adapter_effect
    assert effect["changed_layers"] == 1.0
    assert effect["cosine"] < 0.999
    assert load(folder).adapter_effect is None


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_merged_model_beside_its_adapter_is_not_adapted_twice(tmp_path, activation):
    base = tiny_model(tmp_path / "base", num_hidden_layers=2, hidden_act=activation)
    adapter = tune(base, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter
    ).merge_and_unload()
    shutil.copytree(base, tmp_path / "clean")
    merged.save_pretrained(tmp_path / "clean")
    shutil.copytree(tmp_path / "clean", tmp_path / "beside")
    shutil.copytree(adapter, tmp_path / "beside", dirs_exist_ok=True)
    expected = load(tmp_path / "clean").encode(SENTENCES)
    np.testing.assert_allclose(load(tmp_path / "beside").encode(SENTENCES), expected, atol=1e-6)


def test_weights_that_lack_or_misfit_the_configuration_are_named(folder, tmp_path):
    for change, message in (
        ({"num_hidden_layers": 3}, "lack layers.2"),
        ({"intermediate_size": 48}, "of shape"),
    ):
        shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config.pop("layer_types", None)
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            describe_encoder(EncoderConfig(str(tmp_path / "model")))


def test_embeddings_stored_under_the_heads_name_are_found(tmp_path):
    folder = tiny_model(tmp_path / "tied", num_hidden_layers=2, tie_word_embeddings=True)
    expected = load(folder).encode(SENTENCES)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_allclose(load(folder).encode(SENTENCES), expected, atol=1e-6)


def test_weights_of_a_masked_model_without_its_pooler_are_whole(tmp_path):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = load_base_model(tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.tensor([[0, 7, 8, 2]])
    expected = model.roberta(ids).last_hidden_state
    torch.testing.assert_close(loaded(ids).last_hidden_state, expected)


def test_names_and_shapes_alone_are_read_on_the_meta_device(folder):
    model = load_base_model(folder, dtype=torch.float32, device=torch.device("meta"))
    assert all(weight.is_meta for weight in model.parameters())


def test_no_hub_is_asked_about_the_model_that_an_adapter_names(folder, tmp_path, monkeypatch):
    adapter = Path(tune(folder, tmp_path / "adapter"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "someone/some-model"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub",
        lambda *_args, **_more: pytest.fail("the hub was asked"),
    )
    load(folder, adapter=str(adapter))


def test_a_last_norm_whose_name_only_the_class_with_a_head_translates_is_read(tmp_path):
    folder = tiny_model(tmp_path, num_hidden_layers=2)  # for its tokenizer
    config = transformers.DeepseekV4Config(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        q_lora_rank=16, qk_rope_head_dim=16, o_lora_rank=16, o_groups=2, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, index_n_heads=2, index_head_dim=32,
        sliding_window=16, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    whole = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        whole.model.norm.weight.normal_()
    whole.save_pretrained(folder)
    encoder = load(folder)
    expected = [whole.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in
                encoder.tokenizer.tokenize(SENTENCES)]  # fmt: skip
    expected = torch.nn.functional.normalize(torch.stack(expected), dim=-1).detach().numpy()
    assert (encoder.encode(SENTENCES) * expected).sum(1).min() > 0.9999


def with_weights(folder, target, **more):
    """A copy of a model whose file holds ``more`` weights; two underscores are a point."""
    shutil.copytree(folder, target)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    more = {name.replace("__", "."): weight for name, weight in more.items()}
    safetensors.torch.save_file(
        {**weights, **more}, target / "model.safetensors", metadata={"format": "pt"}
    )
    return target


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model__layers__0__self_attn__q_proj__bias", "q_proj.bias, which its config.json"),
        ("model__layers__0__self_attn__q_norm__weight", "they would be left out"),
        ("model__layers__1__mlp__up_proj__lora_A__default__weight", "merge_and_unload"),
        ("model__norm__bias", "norm.bias"),
        ("model__layers__2__input_layernorm__weight", "it has 2 layers"),
    ],
)
def test_weights_that_would_be_left_out_are_refused(folder, tmp_path, name, message):
    changed = with_weights(folder, tmp_path / "model", **{name: torch.ones(4)})
    with pytest.raises(InputError, match=message) as caught:
        describe_encoder(EncoderConfig(str(changed)))
    assert "\n" not in str(caught.value)


def test_heads_tables_and_layers_that_predict_later_tokens_are_no_harm(folder, tmp_path):
    changed = with_weights(
        folder, tmp_path / "model", score__weight=torch.ones(2, 64), v_head__weight=torch.ones(64),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        model__layers__0__self_attn__rotary_emb__cos_cached=torch.ones(8),
        model__layers__2__input_layernorm__weight=torch.ones(64),
    )  # fmt: skip
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    np.testing.assert_array_equal(load(changed).encode(SENTENCES), load(folder).encode(SENTENCES))


@pytest.fixture(scope="module")
def albert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("albert") / "model"
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=512, embedding_size=16, hidden_size=64, intermediate_size=96,
        num_hidden_layers=3, num_hidden_groups=1, num_attention_heads=4,
    )  # fmt: skip
    transformers.AlbertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [-1, 0, 1, (2, -1)])
def test_a_layer_that_is_run_many_times_is_a_stack(albert, layer):
    encoder = load(albert, layer=layer, pooling="mean")
    model = transformers.AutoModel.from_pretrained(albert).eval()
    rows = []
    for ids in encoder.tokenizer.tokenize(SENTENCES):
        with torch.no_grad():
            states = model.encoder.embedding_hidden_mapping_in(
                model.embeddings(torch.tensor([ids]))
            )
            after = [states]
            for _ in range(3):
                after.append(model.encoder.albert_layer_groups[0](after[-1], None))
        rows.append(torch.stack([after[i][0] for i in encoder.description.layers]).mean((0, 1)))
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()
    assert (encoder.encode(SENTENCES) * expected).sum(1).min() > 0.9999


def test_a_layer_that_is_run_many_times_takes_no_adapter(albert, tmp_path):
    tuned = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(albert),
        peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a model that runs one layer many times"):
        load(albert, adapter=str(tmp_path), pooling="mean")
    with pytest.raises(InputError, match="so no adapter is trained on it"):
        add_adapter(load_base_model(albert, dtype=torch.float32, device=CPU), LoraSettings(), None)
