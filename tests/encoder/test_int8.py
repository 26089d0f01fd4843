import pytest
import torch
from tiny_models import multiplies_int8
from torch import nn

from pipelines.encoder import int8
from pipelines.encoder.elementwise import quantize_rows
from pipelines.encoder.int8 import Int8Linear, hadamard, quantize_linears, require_exact_products
from pipelines.runtime.errors import InputError


def test_a_row_is_rounded_to_its_largest_entry():
    rounded, scale = quantize_rows(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    assert rounded.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(scale[0, 0], torch.tensor(0.01))
    assert torch.isfinite(scale).all()


@pytest.mark.int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [31, 96, 128])
def test_products_are_near_those_in_float32(bias, inputs):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, 40, bias=bias).requires_grad_(False)
    x = torch.randn(3, 17, inputs)
    products, expected = Int8Linear(linear.weight, linear.bias)(x), linear(x)
    assert products.shape == expected.shape and products.dtype == torch.float32
    assert torch.cosine_similarity(products, expected, dim=-1).min() > 0.999


@pytest.mark.int8
def test_a_large_input_does_not_drown_the_others():
    torch.manual_seed(0)
    linear = nn.Linear(128, 40).requires_grad_(False)
    linear.weight[:, 5] = 0
    x = torch.randn(9, 128)
    x[:, 5] = 50
    products = Int8Linear(linear.weight, linear.bias)(x)
    assert torch.cosine_similarity(products, linear(x), dim=-1).min() > 0.998


@pytest.mark.int8
def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    linear = Int8Linear(torch.randn(24, 32), None)
    x = torch.randn(5, 32)
    x[3] *= 1000
    alone = torch.vstack([linear(row[None]) for row in x])
    torch.testing.assert_close(linear(x), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("inputs", "block"), [(576, 64), (96, 32), (20, 4), (7, 1)])
def test_inputs_are_turned_in_blocks_that_lose_nothing(inputs, block):
    turn = hadamard(inputs)
    assert turn.shape == (block, block)
    torch.testing.assert_close(turn @ turn, torch.eye(block))


def test_a_cpu_whose_products_overflow_is_refused(monkeypatch):
    if multiplies_int8():  # else it is such a CPU
        right = int8.multiply
        monkeypatch.setattr(int8, "multiply", lambda *given: right(*given).clamp(-32768, 32767))
    with pytest.raises(InputError, match="inexactly: use --dtype float32"):
        require_exact_products()


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="float32"):
        quantize_linears(nn.ModuleList([nn.Sequential(nn.Conv1d(2, 2, 1))]))
