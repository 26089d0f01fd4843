import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import SENTENCES, tiny_model, tiny_tokenizer

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.sentence_transformers import export_sentence_transformer
from pipelines.runtime.errors import InputError

BLOCK = 32
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}


def fp8_settings(block=BLOCK):
    size = [block, block]
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}


def compressed(weights=WEIGHTS, form="int-quantized", **more):
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": form,
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], **more,
    }  # fmt: skip


def store(folder, source, weights, settings=None):
    """A copy of a model's folder with other weights and what its configuration says of them."""
    shutil.copytree(source, folder)
    weights = {key: value.contiguous() for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if settings:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_blocks(weight, size):
    """A weight in eight-bit floats, a scale a block, and the numbers that both mean."""
    rows, columns = (-(-length // size) for length in weight.shape)
    quantized = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    plain, scales = torch.empty_like(weight), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place = (
                slice(row * size, row * size + size),
                slice(column * size, column * size + size),
            )
            scales[row, column] = weight[place].abs().max() / 448
            quantized[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
            plain[place] = quantized[place].float() * scales[row, column]
    return quantized, scales, plain


def make_fp8(folder, **settings):
    base = tiny_model(folder / "base", num_hidden_layers=2, **settings)
    stored, plain = {}, {}
    for key, weight in load_file(base / "model.safetensors").items():
        stored[key] = plain[key] = weight
        if key.endswith("proj.weight"):
            stored[key], stored[f"{key}_scale_inv"], plain[key] = in_blocks(weight, BLOCK)
    return (
        store(folder / "stored", base, stored, fp8_settings()),
        store(folder / "plain", base, plain),
    )


def make_compressed(folder):
    base = tiny_model(folder / "base", num_hidden_layers=2)
    stored, plain = {}, {}
    for key, weight in load_file(base / "model.safetensors").items():
        stored[key] = plain[key] = weight
        if key.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            stored[key] = (weight / scale).round().to(torch.int8)
            stored[f"{key}_scale"], plain[key] = scale, stored[key].float() * scale
    return (
        store(folder / "stored", base, stored, compressed()),
        store(folder / "plain", base, plain),
    )


def make_mxfp4(folder):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=1024, sliding_window=16, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    base = folder / "base"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    stored, plain = {}, {}
    for key, weight in load_file(base / "model.safetensors").items():
        stored[key] = plain[key] = weight
        if key.endswith(("gate_up_proj", "down_proj")):
            parts = weight.transpose(1, 2).unflatten(-1, (-1, 32))
            exponents = parts.abs().amax(-1).log2().floor() - 2
            scaled = parts / exponents.exp2()[..., None]
            codes = (scaled[..., None] - FP4).abs().argmin(-1)
            del stored[key]
            stored[f"{key}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
            stored[f"{key}_scales"] = (exponents + 127).to(torch.uint8)
            plain[key] = (FP4[codes] * exponents.exp2()[..., None]).flatten(-2).transpose(1, 2)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return store(folder / "stored", base, stored, settings), store(folder / "plain", base, plain)


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def vectors(folder):
    config = EncoderConfig(str(folder), dtype="float32", pooling="mean")
    return Encoder.load(config, device="cpu").encode(SENTENCES)


@pytest.mark.parametrize(
    "make",
    [
        make_fp8,
        make_mxfp4,
        pytest.param(make_compressed, marks=needs("compressed_tensors")),
    ],
)
def test_quantised_weights_are_the_numbers_that_they_stand_for(tmp_path, make):
    stored, plain = make(tmp_path)
    np.testing.assert_allclose(vectors(stored), vectors(plain), atol=1e-5)


@needs("bitsandbytes")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_weights_of_bitsandbytes_are_made_plain(tmp_path, bits):
    base = tiny_model(tmp_path / "base", num_hidden_layers=2)
    settings = transformers.BitsAndBytesConfig(**{bits: True})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=settings
    )
    stored = tmp_path / "stored"
    model.save_pretrained(stored)
    tiny_tokenizer().save_pretrained(stored)
    plain = model.dequantize(torch.float32).state_dict()
    assert {weight.dtype for weight in plain.values()} == {torch.float32}
    expected = vectors(store(tmp_path / "plain", base, plain))
    np.testing.assert_allclose(vectors(stored), expected, atol=1e-5)


def test_plain_weights_stay_plain_in_an_export(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    stored, _ = make_fp8(tmp_path)
    encoder = Encoder.load(
        EncoderConfig(str(stored), dtype="float32", prompt="none", pooling="mean"), device="cpu"
    )
    export_sentence_transformer(encoder.description, tmp_path / "exported")
    there = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    assert (there.encode(SENTENCES) * encoder.encode(SENTENCES)).sum(1).min() > 0.9999


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 16}, "(awq), and only fp8"),
        ({"quant_method": "gptq", "bits": 4}, "(gptq), and only fp8"),
        ({"bits": 4}, "(an unnamed method), and only fp8"),
        (compressed(form="marlin-24"), "not marlin-24"),
        (compressed({**WEIGHTS, "actorder": "group"}), "in the order of their activation"),
        (compressed(transform_config={"config_groups": {}}), "are rotated"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "zeros are left out"),
        (compressed(config_groups={"a": {}, "b": {}}), "has 2 groups of settings"),
    ],
)
def test_what_is_not_made_plain_again_is_refused_by_name(tmp_path, settings, reason):
    base = tiny_model(tmp_path / "base", num_hidden_layers=1)
    folder = store(tmp_path / "model", base, load_file(base / "model.safetensors"), settings)
    with pytest.raises(InputError) as caught:
        describe_encoder(EncoderConfig(str(folder)))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    base = tiny_model(tmp_path / "base", num_hidden_layers=1)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = store(tmp_path / "model", base, load_file(base / "model.safetensors"), settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"bitsandbytes is not installed .*shoal\[quantize\]"):
        describe_encoder(EncoderConfig(str(folder)))


def test_blocks_that_do_not_fill_the_last_row_are_refused(tmp_path):
    stored, _ = make_fp8(tmp_path, intermediate_size=48)
    with pytest.raises(InputError, match="48 rows or columns, which are no blocks of 32"):
        describe_encoder(EncoderConfig(str(stored)))


def test_scales_that_the_configuration_does_not_speak_of_are_refused(tmp_path):
    stored, _ = make_fp8(tmp_path)
    config = json.loads((stored / "config.json").read_text())
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="weight_scale_inv, which nothing reads"):
        describe_encoder(EncoderConfig(str(stored)))
