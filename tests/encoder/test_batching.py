from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pipelines.encoder.encoder import default_budget_tokens, token_budget_batches


@given(st.lists(st.integers(1, 400), max_size=200), st.integers(1, 2000))
def test_every_text_is_in_one_batch_and_no_batch_exceeds_the_budget(lengths, budget):
    batches = list(token_budget_batches(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_the_longest_come_first():
    assert list(token_budget_batches([3, 9, 5, 1], 10)) == [[1], [2, 0], [3]]


@pytest.mark.parametrize(("free_gib", "expected"), [(0.01, 2048), (1000, 131072)])
def test_the_budget_on_a_gpu_follows_its_free_memory_within_limits(free_gib, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30), 0))
    found = default_budget_tokens(transformers.LlamaConfig(), torch.device("cuda"))
    assert found == expected


@pytest.mark.parametrize(
    ("hidden", "inner", "expected"),
    [
        (64, 96, 8192), (256, 768, 2048), (128, [256, 512], 4096), (576, 1536, 1024),
        (64, 1 << 22, 1024), (2048, 128, 1024),
    ],
)  # fmt: skip
def test_the_budget_on_a_cpu_follows_the_width_of_the_model(hidden, inner, expected):
    settings = SimpleNamespace(hidden_size=hidden, intermediate_size=inner)
    assert default_budget_tokens(settings, torch.device("cpu")) == expected
