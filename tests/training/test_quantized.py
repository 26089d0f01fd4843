import pytest
import torch
from tiny_models import tiny_adapter, tiny_model

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.runtime.errors import InputError
from pipelines.training import adapter as quantized_base
from pipelines.training.adapter import load_quantized_base, require_quantization
from pipelines.training.config import FinetuneConfig
from pipelines.training.trainer import AdapterTrainer, load_trainable_base


def test_a_machine_without_a_gpu_is_told_so_before_anything_is_loaded(tmp_path):
    description = describe_encoder(EncoderConfig(model=str(tiny_model(tmp_path / "model"))))
    with pytest.raises(InputError, match=r"--quantize 4bit needs a CUDA GPU .* leave it out"):
        load_trainable_base(description, torch.device("cpu"), "4bit")
    require_quantization("none", "cpu")


def test_a_machine_without_the_package_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(quantized_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'shoal\[quantize\]'"):
        require_quantization("8bit", "cuda")


def test_an_unknown_number_of_bits_is_refused():
    with pytest.raises(InputError, match="unknown quantize '3bit'; known are none, 8bit, 4bit"):
        FinetuneConfig(quantize="3bit")


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_adapters_train_on_quantized_weights(tmp_path, monkeypatch, quantize):
    """On the CPU, where the package's slow kernels compute the same, so no GPU is needed here."""
    pytest.importorskip("bitsandbytes")
    device = torch.device("cpu")
    folder = tiny_model(tmp_path / "model", intermediate_size=128)
    base = load_quantized_base(folder, quantize, dtype=torch.float32, device=device)
    assert base.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    monkeypatch.setattr("pipelines.training.trainer.load_trainable_base", lambda *_: base)
    config = FinetuneConfig(model=str(folder), dtype="float32", learning_rate=1e-2, warmup_steps=0)
    trainer = AdapterTrainer(config.trainer, describe_encoder(config.encoder), device)
    import pyarrow as pa

    pairs = pa.table(
        {"anchor": list("abcd"), "positive": ["a b", "b c", "c d", "d e"], "id": list("1234")}
    )
    losses = [trainer.step(step, pairs, 0)["loss"] for step in range(1, 9)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_training_attends_as_asked(tmp_path, monkeypatch, quantize):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("pipelines.training.trainer.require_quantization", lambda *_: None)
    folder = tiny_model(tmp_path, intermediate_size=128)
    for attention in ("causal", "bidirectional"):
        config = EncoderConfig(str(folder), dtype="float32", attention=attention)
        base = load_trainable_base(describe_encoder(config), torch.device("cpu"), quantize)
        first = [base(torch.tensor([[4, later]])).last_hidden_state[0, 0] for later in (5, 6)]
        assert torch.equal(*first) == (attention == "causal")


def test_a_model_that_heeds_no_attention_is_not_trained(tmp_path):
    config = EncoderConfig(str(tiny_model(tmp_path, "mamba")), attention="bidirectional")
    with pytest.raises(InputError, match="its code does not heed it"):
        load_trainable_base(describe_encoder(config), torch.device("cpu"))


@pytest.mark.parametrize("quantize", ["none", "8bit"])
def test_a_merged_model_beside_its_adapter_is_not_adapted_twice(tmp_path, monkeypatch, quantize):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("pipelines.training.trainer.require_quantization", lambda *_: None)
    folder = tiny_model(tmp_path / "model", intermediate_size=128)
    states = []
    for _ in range(2):
        description = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
        base = load_trainable_base(description, torch.device("cpu"), quantize)
        states.append(base(torch.tensor([[4, 5, 6]])).last_hidden_state)
        tiny_adapter(folder, folder)
    assert torch.equal(*states)
