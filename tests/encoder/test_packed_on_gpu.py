"""The packed pass as a GPU takes it, its kernel replaced by one of the same signature on a CPU."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import SENTENCES, tiny_model
from torch.nn.attention.varlen import varlen_attn

from pipelines.encoder import elementwise, packed
from pipelines.encoder.base_model import with_attention
from pipelines.encoder.elementwise import PLAIN, Elementwise
from pipelines.encoder.encoder import Encoder, EncoderConfig, one_ahead

ROOT = Path(__file__).parents[2]


def attend_one_by_one(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, **others
):
    """Attention of each text alone, by torch's own function; queries are a text's last tokens."""
    assert not others
    before, after = (math.inf if reach == -1 else reach for reach in window_size)
    mixed = []
    places = (
        zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True) for ends in (cu_seq_q, cu_seq_k)
    )
    for (first_q, last_q), (first_k, last_k) in zip(*places, strict=True):
        assert last_q - first_q <= max_q
        assert last_k - first_k <= max_k
        queries = torch.arange(first_q, last_q) - last_q
        away = queries[:, None] - (torch.arange(first_k, last_k) - last_k)
        spans = slice(first_q, last_q), slice(first_k, last_k), slice(first_k, last_k)
        heads = [
            part[span].transpose(0, 1)[None]
            for part, span in zip((query, key, value), spans, strict=True)
        ]
        one = torch.nn.functional.scaled_dot_product_attention(
            *heads,
            attn_mask=(away <= before) & (-away <= after),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        mixed.append(one[0].transpose(0, 1))
    return torch.cat(mixed)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen2", "gemma3"])
@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_way_of_a_gpu_computes_what_the_model_does(
    tmp_path, monkeypatch, family, last_only, fused, both_ways
):
    windows = {"mistral": {"sliding_window": 8}}.get(family, {})
    folder = tiny_model(tmp_path, family, **windows)
    config = with_attention(folder, "bidirectional" if both_ways else "causal", False)
    model = transformers.AutoModel.from_pretrained(folder, config=config).eval()
    own = [[5, 6, 7, 8, 9], [10], [11, 12, 13], list(range(3, 43))]
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in own]
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_one_by_one)
    monkeypatch.setattr(packed, "has_kernel", lambda device: True)
    between = Elementwise.fused() if fused else PLAIN
    layers = [model.config.num_hidden_layers]
    decoder = packed.PackedDecoder(
        model, layers, (), 64, bidirectional=both_ways, elementwise=between
    )
    states, mask = decoder.states(own, last_only=last_only)
    for row, inside, wanted in zip(states, mask, expected, strict=True):
        wanted = wanted[-1:] if last_only else wanted
        torch.testing.assert_close(row[inside], wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_compile_runs_as_it_is(caplog):
    rows, more, weight = torch.randn(5, 8), torch.randn(5, 8), torch.rand(8)
    fused = Elementwise.fused()
    with torch._inductor.config.patch(
        {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    ):
        found = [fused.gated(rows, "silu"), fused.gated(rows, "silu")]
        added = rows.clone()
        normed = fused.added_norm(added, more, weight, 1e-6, torch.float32)
    torch.testing.assert_close(found, [PLAIN.gated(rows, "silu")] * 2)
    torch.testing.assert_close(added, rows + more)
    torch.testing.assert_close(normed, PLAIN.rms_norm(rows + more, weight, 1e-6, torch.float32))
    told = [text for name, _, text in caplog.record_tuples if name == elementwise.__name__]
    assert [text.split(":")[0] for text in told] == [
        "gated is not compiled",
        "added_norm is not compiled",
    ]


def test_where_the_kernel_refuses_the_models_own_pass_runs(tmp_path, monkeypatch, caplog):
    config = EncoderConfig(model=str(tiny_model(tmp_path)), dtype="float32")
    right = Encoder.load(config, device="cpu").encode(SENTENCES)

    def refuses(*_, **__):
        raise RuntimeError("no kernel of this head width")

    monkeypatch.setattr(packed, "has_kernel", lambda device: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", refuses)
    encoder = Encoder.load(config, device="cpu")
    assert "no kernel of this head width" in caplog.text
    assert "slower pass" in caplog.text
    np.testing.assert_allclose(encoder.encode(SENTENCES), right, atol=1e-5)


def test_a_batch_is_given_when_the_next_one_is_under_way():
    begun = []

    def batches():
        for number in range(4):
            begun.append(number)
            yield number

    assert [(item, begun[-1]) for item in one_ahead(batches())] == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert list(one_ahead(iter([7]))) == [7]
    assert list(one_ahead(iter([]))) == []


def test_the_stand_in_is_called_as_the_kernel_is():
    real = inspect.signature(varlen_attn).parameters
    ours = inspect.signature(attend_one_by_one).parameters
    assert [name for name in ours if name != "others"] == [name for name in real if name in ours]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_ray_and_peft(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('ray', 'peft', 'faiss', 'mteb', 'lance', 'tyro', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
    )
    output = tmp_path / "gpu.json"
    script = ROOT / "benchmarks" / "gpu.py"
    subprocess.run(
        [sys.executable, script, "--device", "cpu", "--models", "tiny", "--output", output],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        check=True,
        timeout=300,
    )
    results = json.loads(output.read_text())
    assert set(results) == {
        "machine",
        "check_exactness tiny",
        "measure_speed tiny",
        "measure_budgets tiny",
        "measure_tuning tiny",
        "measure_job tiny",
        "measure_assignment",
    }
    assert not [name for name, found in results.items() if "failed" in found]
    ways = results["check_exactness tiny"]["ways"]
    assert min(way["least_cosine"] for name, way in ways.items() if "float32" in name) > 0.99999
    assert min(way["least_cosine"] for way in ways.values()) > 0.999
    assert "skipped" in results["measure_tuning tiny"]
    assert "skipped" in results["measure_job tiny"]
    assert min(results["measure_budgets tiny"]["tokens_per_second_by_budget"].values()) > 0
