import peft
import pytest
import torch
import transformers
from tiny_models import FAMILIES, tiny_model

from pipelines.encoder.base_model import load_base_model
from pipelines.encoder.padded import pad_right
from pipelines.training.adapter import add_adapter
from pipelines.training.config import LoraSettings
from pipelines.training.lean import install_row_dropout, is_plain_lora, lighten

TOKENS = [[3, 9, 27, 81, 4], [5, 6, 7], [11, 12, 13, 14, 15, 16, 17]]
GATED = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny_model(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def adapted(folder, *, dropout=0.0, targets=("all-linear",)):
    """A model with an adapter whose two halves are both away from zero."""
    base = load_base_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    model = add_adapter(base, LoraSettings(4, 8.0, dropout, targets, 0), None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.sin(torch.arange(parameter.numel())).view_as(parameter) / 9)
    rows = install_row_dropout(model)
    return model, rows


def states_and_gradients(model, rows, *, autocast=False):
    rows.set([1, 2, 3])
    input_ids, mask = pad_right(TOKENS, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state.float()
    (states * mask[..., None]).tanh().square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return states.detach()[mask], gradients


def assert_close(found, expected, tolerance):
    (states, gradients), (states_before, gradients_before) = found, expected
    assert torch.linalg.norm(states - states_before) <= tolerance * torch.linalg.norm(states_before)
    assert gradients.keys() == gradients_before.keys()
    for name, before in gradients_before.items():
        difference = torch.linalg.norm(gradients[name] - before)
        assert difference <= tolerance * torch.linalg.norm(before), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_parts_replaced(folders, family, dropout):
    model, rows = adapted(folders[family], dropout=dropout)
    before = states_and_gradients(model, rows)
    rows.set(None)
    counts = lighten(model)
    model.zero_grad()
    assert_close(states_and_gradients(model, rows), before, 1e-4)
    assert counts["lora"] >= 4 * 4
    if family in GATED:
        assert counts["norm"] >= 2 * 4 + 1 and counts["gated"] == 4


def test_parts_that_compute_something_else_stay(folders):
    model, _ = adapted(folders["gemma2"])
    counts = lighten(model)
    assert counts["norm"] == 0  # scales by 1 + w
    assert counts["gated"] == 0  # gated by GELU


def test_bfloat16_errs_no_more_than_the_parts_replaced(folders):
    model, rows = adapted(folders["llama"])
    exact = states_and_gradients(model, rows)
    model.zero_grad()
    before = states_and_gradients(model, rows, autocast=True)
    rows.set(None)
    model.zero_grad()
    lighten(model)
    found = states_and_gradients(model, rows, autocast=True)
    error, usual = (
        sum(float((way[1][name] - exact[1][name]).square().sum()) for name in exact[1])
        for way in (found, before)
    )
    assert error <= 1.5 * usual


def test_layers_without_an_adapter_keep_their_own_pass(folders):
    model, rows = adapted(folders["llama"], targets=("v_proj", "down_proj"))
    before = states_and_gradients(model, rows)
    assert lighten(model)["lora"] == 2 * 4
    model.zero_grad()
    assert_close(states_and_gradients(model, rows), before, 1e-4)


def test_adapters_of_another_kind_are_left_alone(folders):
    base = transformers.AutoModel.from_pretrained(folders["llama"])
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    assert not any(is_plain_lora(module) for module in model.modules())
