"""OpenVINO as a peer of ``benchmarks/encode.py``, which starts this under another interpreter.

    python benchmarks/encode.py --openvino-python PATH

That interpreter needs ``openvino``, ``optimum-intel`` and torch, in versions that need not be ours.
The model is exported once. Token ids come in through a socket, states of last tokens go back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import openvino

Encode = Callable[[Sequence[Sequence[int]]], np.ndarray]
BUDGET_TOKENS = 1024
WAYS = {
    "OpenVINO, bfloat16": (False, {}),
    # Weights of one scale and zero an output; activations in groups of 64, as they come.
    "OpenVINO, int8": (True, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}),
}


def export(model: str, folder: Path, *, int8: bool) -> Path:
    """The model in OpenVINO's format, made at the first call."""
    from optimum.intel import OVModelForFeatureExtraction

    target = folder / f"{Path(model).name}-openvino-{'int8' if int8 else 'float'}"
    if not target.exists():
        exported = OVModelForFeatureExtraction.from_pretrained(
            model, export=True, load_in_8bit=int8, compile=False
        )
        exported.save_pretrained(target)
    return target / "openvino_model.xml"


def load(path: Path, settings: dict[str, int], threads: int) -> Encode:
    """Last tokens' states by a compiled model, float32 (n, d), in length-sorted padded batches."""
    model = openvino.Core().compile_model(
        path,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16",
            "PERFORMANCE_HINT": "LATENCY",
            **settings,
        },
    )
    request = model.create_infer_request()
    names = {name for given in model.inputs for name in given.get_names()}

    def encode(token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        order = sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))
        vectors, start = {}, 0
        while start < len(order):
            longest = len(token_ids[order[start]])
            batch = order[start : start + max(1, BUDGET_TOKENS // longest)]
            start += len(batch)
            ids = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, : len(token_ids[index])] = token_ids[index]
                mask[row, : len(token_ids[index])] = 1
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
            }
            states = request.infer({k: v for k, v in inputs.items() if k in names})[model.output(0)]
            for row, index in enumerate(batch):
                vectors[index] = states[row, len(token_ids[index]) - 1].copy()
        return np.stack([vectors[index] for index in range(len(token_ids))])

    return encode


def main() -> None:
    address, model, folder, threads = sys.argv[1:]
    ways = {
        name: load(export(model, Path(folder), int8=int8), settings, int(threads))
        for name, (int8, settings) in WAYS.items()
    }
    connection = Client(address)
    connection.send(list(ways))
    while True:
        try:
            name, token_ids = connection.recv()
        except EOFError:
            return
        started, cpu_started = time.perf_counter(), time.process_time()
        vectors = ways[name](token_ids)
        taken = time.perf_counter() - started, time.process_time() - cpu_started
        connection.send((vectors, *taken))


if __name__ == "__main__":
    main()
