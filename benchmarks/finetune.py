"""Speed, memory and scaling of fine-tuning: ``python benchmarks/finetune.py``.

Three claims, measured on the packaged model and crops of the packaged training corpus:

speed    tokens a second of a training step against the step of the paper's public code: causal-LM
         class with the states of every layer, float32, gradient accumulation over unsorted
         micro-batches of 12 pairs. Same pairs; the same adapter, and the one we take by default.
memory   peak memory of a step of 512 pairs against one of 64.
side_by_side
         tokens a second of a step of 32 pairs whose micro-batches each take a thread, against one
         micro-batch after the other on all threads, in turns and three rounds.
workers  tokens a second of two workers of one CPU against one, at an equal global batch of 64
         pairs, and of 16 in ``workers_small_batch``, in turns and three rounds.

``--part`` measures some of them and keeps the other figures of the result file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch starts its threads; the jobs set the same for theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from peak_memory import peak_bytes  # type: ignore[import-not-found]

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import DType
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.sources import PACKAGED_MODEL, fetch_model
from pipelines.runtime.packaged import load_labelled_corpus
from pipelines.training.config import FinetuneConfig
from pipelines.training.pairs import crop_pair, document_generator
from pipelines.training.trainer import AdapterTrainer

RESULTS = Path(__file__).parent / "results" / "finetune.json"
PAPER_MICRO_BATCH = 12
PAPER_TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAPER_ADAPTER: dict[str, Any] = {
    "lora_rank": 64, "lora_alpha": 16.0, "lora_dropout": 0.05, "lora_targets": PAPER_TARGETS,
}  # fmt: skip
SPEED_PAIRS = 24
SPEED_WORDS = (40, 75)  # about the paper's crops of 100 tokens at most
SPEED_HELD_TOKENS = 6000
MEMORY_WORDS = (6, 10)
MEMORY_TOKENS = 512
WORKER_ROUNDS = 3

Speed = tuple[float, float]


def make_pairs(count: int, words: tuple[int, int]) -> pa.Table:
    """Crops of the training documents of 20 Newsgroups."""
    rows = []
    for row in load_labelled_corpus("20newsgroups", "train").to_pylist():
        pair = crop_pair(row["text"], document_generator(0, str(row["id"])), words)
        if pair is not None:
            rows.append({"anchor": pair[0], "positive": pair[1], "id": str(row["id"])})
        if len(rows) == count:
            break
    return pa.Table.from_pylist(rows)


def timed(step: Callable[[], int]) -> Speed:
    """Tokens of a step by the second of the clock, and by the second of CPU time.

    The latter tells more on a machine that others use too.
    """
    clock, cpu = time.perf_counter(), time.process_time()
    tokens = step()
    return tokens / (time.perf_counter() - clock), tokens / (time.process_time() - cpu)


def measure_ours(pairs: pa.Table, dtype: DType, adapter: dict[str, Any]) -> Speed:
    """Speed of one of our steps, after a small one."""
    config = FinetuneConfig(
        adapter=None,
        batch_pairs=len(pairs),
        dtype=dtype,
        activation_tokens=SPEED_HELD_TOKENS,
        **adapter,
    )
    trainer = AdapterTrainer(config.trainer, describe_encoder(config.encoder), torch.device("cpu"))
    trainer.step(1, pairs.slice(0, 4), 0)
    return timed(lambda: int(trainer.step(2, pairs, 0)["tokens"]))


def measure_paper(pairs: pa.Table) -> Speed:
    """Speed of one step as the paper's code takes it."""
    folder = fetch_model(PACKAGED_MODEL).folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        peft.LoraConfig(r=64, lora_alpha=16, lora_dropout=0.05, target_modules=[*PAPER_TARGETS]),
    ).train()
    template = PromptTemplate.parse("one-word")

    def embed(texts: list[str]) -> tuple[torch.Tensor, int]:
        inputs = tokenizer([template.wrap(t) for t in texts], padding=True, return_tensors="pt")
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
        return states[:, -1], int(inputs["attention_mask"].sum())

    def step(rows: pa.Table) -> int:
        total = 0
        for start in range(0, len(rows), PAPER_MICRO_BATCH):
            part = rows.slice(start, PAPER_MICRO_BATCH)
            (anchors, first), (positives, second) = (
                embed(part[name].to_pylist()) for name in ("anchor", "positive")
            )
            cosines = torch.nn.functional.cosine_similarity(anchors[:, None], positives, dim=-1)
            target = torch.arange(len(part))
            torch.nn.functional.cross_entropy(cosines / 0.2, target).backward()
            total += first + second
        return total

    step(pairs.slice(0, 4))
    return timed(lambda: step(pairs))


def measure_memory(pairs: int) -> None:
    """Print the peak memory in MiB of a process that takes one step of so many pairs."""
    config = FinetuneConfig(
        adapter=None, batch_pairs=pairs, activation_tokens=MEMORY_TOKENS, prompt="none"
    )
    trainer = AdapterTrainer(config.trainer, describe_encoder(config.encoder), torch.device("cpu"))
    trainer.step(1, make_pairs(pairs, MEMORY_WORDS), 0)
    print(peak_bytes() >> 20)


def compare_speed() -> dict[str, Any]:
    """Our step with the paper's adapter in both precisions, and with our own adapter."""
    pairs = make_pairs(SPEED_PAIRS, SPEED_WORDS)
    ours: dict[DType, Speed] = {}
    ours["float32"] = measure_ours(pairs, "float32", PAPER_ADAPTER)
    paper = measure_paper(pairs)
    ours["bfloat16"] = measure_ours(pairs, "bfloat16", PAPER_ADAPTER)
    best = max(ours, key=lambda dtype: ours[dtype])
    default = measure_ours(pairs, best, {})
    speeds = {
        "paper's step, float32": paper,
        **{f"ours, the same adapter, {dtype}": speed for dtype, speed in ours.items()},
        f"ours, our adapter, {best}": default,
    }
    return {
        "pairs": SPEED_PAIRS,
        "tokens_per_second": {name: round(speed[0], 1) for name, speed in speeds.items()},
        "tokens_per_cpu_second": {name: round(speed[1], 1) for name, speed in speeds.items()},
        "ratio": round(ours[best][0] / paper[0], 2),
        "ratio_by_cpu_time": round(ours[best][1] / paper[1], 2),
        "ratio_with_our_adapter": round(default[0] / paper[0], 2),
        "required": 2.0,
    }


def compare_memory() -> dict[str, Any]:
    peaks = {}
    for pairs in (64, 512):
        command = [sys.executable, __file__, "--memory-of", str(pairs)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[pairs] = int(done.stdout.split()[-1])
    return {
        "peak_mib": peaks,
        "growth": round(peaks[512] / peaks[64] - 1, 3),
        "required": 0.2,
    }


def compare_side_by_side() -> dict[str, Any]:
    """Medians over the rounds; both ways take the first step of one trainer, again and again."""
    if torch.get_num_threads() == 1:
        raise SystemExit("side_by_side compares ways to use several threads: torch has one here")
    pairs = make_pairs(32, (16, 32))
    found: dict[str, Any] = {"pairs": len(pairs), "rounds": WORKER_ROUNDS}
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        config = FinetuneConfig(adapter=None, batch_pairs=len(pairs), dtype=dtype)
        description = describe_encoder(config.encoder)
        trainer = AdapterTrainer(config.trainer, description, torch.device("cpu"))
        speeds: dict[int, list[float]] = {1: [], trainer.at_once: []}
        for round_number in range(WORKER_ROUNDS + 1):
            for at_once, of_rounds in speeds.items():
                trainer.at_once = at_once
                speed = timed(lambda: int(trainer.step(1, pairs, 0)["tokens"]))  # noqa: B023
                if round_number:  # the first compiles products and fills memory
                    of_rounds.append(speed[0])
        one, beside = (statistics.median(of_rounds) for of_rounds in speeds.values())
        found[dtype] = {
            "tokens_per_second": {"one": round(one, 1), "side by side": round(beside, 1)},
            "ratio": round(beside / one, 2),
        }
    return found


def train_with(workers: int, batch_pairs: int, steps: int, folder: str) -> list[float]:
    """Tokens a second of each step of the job on Ray Train but the first."""
    output = tempfile.mkdtemp(dir=folder)
    options = {
        "pairs": f"{folder}/pairs.parquet", "output": output, "num-workers": workers,
        "cpus-per-worker": 1, "batch-pairs": batch_pairs, "max-steps": steps,
        "measure-every": steps, "heldout-pairs": 4, "dtype": "float32",
    }  # fmt: skip
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    job = Path(__file__).parent.parent / "jobs" / "finetune_adapter.py"
    subprocess.run([sys.executable, str(job), *flags], check=True, capture_output=True)
    rows = pq.read_table(f"{output}/history.parquet").to_pylist()
    return [row["tokens"] / row["seconds"] for row in rows if row["step"] > 1]


def compare_workers(batch_pairs: int, steps: int) -> dict[str, Any]:
    """One and two workers of one CPU, in turns: the median of the rounds' ratios.

    The machine's speed changes more from round to round than within one.
    """
    speeds: dict[int, list[list[float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(make_pairs(300, (16, 32)), f"{folder}/pairs.parquet")
        for _ in range(WORKER_ROUNDS):
            for workers, runs in speeds.items():
                runs.append(train_with(workers, batch_pairs, steps, folder))
                print(workers, "workers:", [round(speed, 1) for speed in runs[-1]], flush=True)
    one, two = (statistics.median(itertools.chain(*runs)) for runs in speeds.values())
    ratios = [
        statistics.median(second) / statistics.median(first)
        for first, second in zip(*speeds.values(), strict=True)
    ]
    return {
        "batch_pairs": batch_pairs,
        "tokens_per_second": {"1": round(one, 1), "2": round(two, 1)},
        "ratio": round(statistics.median(ratios), 2),
        "ratios_of_rounds": [round(ratio, 2) for ratio in ratios],
        "required": 1.7,
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "speed": compare_speed,
    "memory": compare_memory,
    "side_by_side": compare_side_by_side,
    "workers": functools.partial(compare_workers, batch_pairs=64, steps=3),
    "workers_small_batch": functools.partial(compare_workers, batch_pairs=16, steps=6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"command": "python benchmarks/finetune.py", "cpus": os.cpu_count()}
    results["threads"] = torch.get_num_threads()
    for part in arguments.part:
        load = os.getloadavg()[0]
        results[part] = {**PARTS[part](), "load_before": round(load, 1)}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(part, json.dumps(results[part]), flush=True)


if __name__ == "__main__":
    main()
