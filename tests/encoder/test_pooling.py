import pytest
import torch

from pipelines.encoder.description import POOLINGS, pooled_dimension
from pipelines.encoder.pooling import normalize, pool

# Two texts of 4 and 2 tokens; states a person can add up.
STATES = torch.tensor(
    [
        [[1.0, 0.0], [2.0, 8.0], [3.0, 0.0], [6.0, 4.0]],
        [[5.0, 1.0], [7.0, 3.0], [99.0] * 2, [99.0] * 2],
    ]
)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)

EXPECTED = {
    "last": [[6, 4], [7, 3]],
    "first": [[1, 0], [5, 1]],
    "mean": [[3, 3], [6, 2]],
    "max": [[6, 8], [7, 3]],
    "weighted-mean": [[3.8, 3.2], [19 / 3, 7 / 3]],
    "last+mean": [[6, 4, 3, 3], [7, 3, 6, 2]],
}


@pytest.mark.parametrize("pooling", EXPECTED)
def test_each_way_gives_what_its_name_says(pooling):
    torch.testing.assert_close(pool(STATES, MASK, pooling), torch.tensor(EXPECTED[pooling]).float())


def test_body_mean_leaves_the_prompt_out():
    found = pool(STATES, MASK, "body-mean", prefix_tokens=1, suffix_tokens=1)
    torch.testing.assert_close(found[0], torch.tensor([2.5, 4.0]))


def test_body_mean_of_an_empty_body_is_the_mean_of_the_prompt():
    found = pool(STATES, MASK, "body-mean", prefix_tokens=1, suffix_tokens=1)
    torch.testing.assert_close(found[1], torch.tensor([6.0, 2.0]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_padding_side_does_not_matter(pooling):
    left = torch.stack([STATES[0], STATES[1].roll(2, dims=0)])
    left_mask = torch.stack([MASK[0], MASK[1].roll(2)])
    torch.testing.assert_close(
        pool(left, left_mask, pooling, prefix_tokens=1),
        pool(STATES, MASK, pooling, prefix_tokens=1),
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_that_is_not_a_number_stays_out(pooling):
    states = STATES.masked_fill(~MASK[..., None], torch.nan)
    assert pool(states, MASK, pooling).isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_low_precision_states_are_pooled_in_float32_with_gradients(pooling):
    states = STATES.bfloat16().requires_grad_()
    vectors = normalize(pool(states, MASK, pooling))
    assert vectors.dtype == torch.float32
    assert vectors.shape == (2, pooled_dimension(pooling, 2))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    vectors[:, 0].sum().backward()
    assert states.grad.isfinite().all() and (states.grad[1, 2:] == 0).all()


def test_an_unknown_way_is_an_error():
    with pytest.raises(ValueError, match="known are last"):
        pool(STATES, MASK, "middle")
