"""Where an encoder runs and in which precision, where that is left to the hardware."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import re
import time
from pathlib import Path
from typing import Any

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import read_bytes, shoal_home, write_bytes

log = logging.getLogger(__name__)

# A product whose time is measured, and how often.
_ROWS, _INPUTS, _OUTPUTS, _MEASUREMENTS = 256, 512, 1024, 7
# What bfloat16 must gain to be worth its rounding; where it does, it is twice as fast and more.
_LEAST_GAIN = 1.25
# CPUs that only imitate bfloat16 multiply many times as slowly: that is plain after a few.
_PLAINLY_SLOWER, _FEWEST_MEASUREMENTS = 0.2, 3
_CPUS = Path("/proc/cpuinfo")
_VECTOR_INSTRUCTIONS = re.compile(r"avx|amx|fma|f16|vnni|asimd|sve")


def resolve_device(device: str) -> Any:
    """``auto`` is the GPU where there is one, else the CPU; a ``torch.device``."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: str) -> str:
    """``auto`` is bfloat16 where matrix products in it are faster: any GPU, some CPUs.

    Raises :class:`InputError` for int8 on a GPU.
    """
    # torch is slow to load, and only "auto" needs it here
    kind = resolve_device(device).type if device == "auto" else device.partition(":")[0]
    on_cuda = kind == "cuda"
    if dtype == "int8" and on_cuda:
        raise InputError("dtype int8 runs on CPUs only; on a GPU use bfloat16")
    if dtype != "auto":
        return dtype
    return "bfloat16" if on_cuda or cpu_prefers_bfloat16() else "float32"


def cpu_prefers_bfloat16() -> bool:
    """Whether this CPU multiplies faster in bfloat16 than in float32.

    Measured once and remembered in Shoal's folder: a busy moment must not change an encoder from
    one day to the next.
    """
    path = str(shoal_home() / "faster_dtype.json")
    try:
        remembered = json.loads(read_bytes(path))
    except (FileNotFoundError, ValueError):
        remembered = {}
    cpu = f"{cpu_name()}, torch {importlib.metadata.version('torch')}"
    if remembered.get(cpu) not in ("bfloat16", "float32"):
        gain = measure_gain()
        log.info("%s multiplies %.1f times as fast in bfloat16 as in float32", cpu, gain)
        remembered[cpu] = "bfloat16" if gain >= _LEAST_GAIN else "float32"
        try:
            write_bytes(path, json.dumps(remembered, indent=2).encode())
        except OSError as error:
            log.info("not remembered: %s", error)
    return remembered[cpu] == "bfloat16"


def measure_gain() -> float:
    """How many times as fast as float32 products those in bfloat16 are, at their best of some."""
    import torch

    from pipelines.encoder.packed import Linear

    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for number in range(_MEASUREMENTS):
        plain = best[torch.float32] < _PLAINLY_SLOWER * best[torch.bfloat16]
        if number >= _FEWEST_MEASUREMENTS and plain:
            break
        for dtype in best:
            with torch.inference_mode():
                product = Linear.of(torch.ones(_OUTPUTS, _INPUTS, dtype=dtype), None)
                rows = torch.ones(_ROWS, _INPUTS, dtype=dtype)
                product(rows)  # once to compile
                started = time.perf_counter()
                product(rows)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def cpu_name() -> str:
    """What this processor calls itself and the vector instructions it has, as far as it says.

    Virtual machines on very different processors may give the same name, such as "AMD EPYC".
    """
    try:
        lines = _CPUS.read_text().splitlines()
    except OSError:
        lines = []
    told: dict[str, str] = {}
    for line in lines:
        what, _, value = line.partition(":")
        told.setdefault(what.strip(), value.strip())
    name = told.get("model name") or platform.processor() or platform.machine()
    instructions = told.get("flags", told.get("Features", "")).split()  # x86, Arm
    found = sorted(word for word in instructions if _VECTOR_INSTRUCTIONS.search(word))
    return f"{name} ({' '.join(found)})" if found else name
