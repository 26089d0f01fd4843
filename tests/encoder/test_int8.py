import pytest
import torch
from torch import nn

from pipelines.encoder.elementwise import quantize_rows
from pipelines.encoder.int8 import Int8Linear, layers_in_int8, quantize_linears
from pipelines.runtime.errors import InputError


def test_a_row_is_rounded_to_its_largest_entry():
    rounded, scale = quantize_rows(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    assert rounded.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(scale[0, 0], torch.tensor(0.01))
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_near_those_in_float32(bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    x = torch.randn(3, 17, 96)
    found, expected = Int8Linear(linear.weight, linear.bias)(x), linear(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    linear = Int8Linear(torch.randn(24, 32), None)
    x = torch.randn(5, 32)
    x[3] *= 1000
    alone = torch.vstack([linear(row[None]) for row in x])
    torch.testing.assert_close(linear(x), alone, rtol=1e-6, atol=0)


def test_few_layers_are_all_rounded_and_of_many_the_outer_ones_are_not():
    assert list(layers_in_int8(4)) == [0, 1, 2, 3]
    assert list(layers_in_int8(30)) == list(range(2, 28))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="float32"):
        quantize_linears(nn.ModuleList([nn.Sequential(nn.Conv1d(2, 2, 1))]))
