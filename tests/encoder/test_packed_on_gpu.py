"""The packed pass as a GPU takes it, its kernel replaced by one of the same signature on a CPU."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny_model
from torch.nn.attention.varlen import varlen_attn

from pipelines.encoder.packed import PackedDecoder

ROOT = Path(__file__).parents[2]


def attend_one_by_one(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, **others
):
    """Causal attention of each text alone, by torch's own function."""
    assert window_size == (-1, 0)
    assert not others
    mixed = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        assert stop - start <= max_q
        heads = [part[start:stop].transpose(0, 1)[None] for part in (query, key, value)]
        one = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        mixed.append(one[0].transpose(0, 1))
    return torch.cat(mixed)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen2"])
@pytest.mark.parametrize("last_only", [True, False])
def test_the_way_of_a_gpu_computes_what_the_model_does(tmp_path, monkeypatch, family, last_only):
    model = transformers.AutoModel.from_pretrained(tiny_model(tmp_path, family)).eval()
    own = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in own]
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", attend_one_by_one)
    monkeypatch.setattr(
        PackedDecoder,
        "_attend",
        lambda self, number, h, packing, keep: self._attend_packed(
            self._layers[number - 1], h, packing
        ),
    )
    decoder = PackedDecoder(model, [model.config.num_hidden_layers], (), 64)
    states, mask = decoder.states(own, last_only=last_only)
    for row, inside, wanted in zip(states, mask, expected, strict=True):
        wanted = wanted[-1:] if last_only else wanted
        torch.testing.assert_close(row[inside], wanted, rtol=1e-4, atol=1e-5)


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
        "measure_tuning tiny",
        "measure_assignment",
    }
    ways = results["check_exactness tiny"]["ways"]
    assert min(way["least_cosine"] for name, way in ways.items() if "float32" in name) > 0.99999
    assert min(way["least_cosine"] for way in ways.values()) > 0.999
    assert "skipped" in results["measure_tuning tiny"]
