"""Where an encoder runs and in which precision, where that is left to the hardware."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.runtime.errors import InputError


def resolve_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def resolve_dtype(dtype: str, device: str) -> str:
    """``auto`` is bfloat16 where matrix products in it are faster: any GPU, some CPUs.

    Raises :class:`InputError` for int8 on a GPU.
    """
    on_cuda = resolve_device(device).type == "cuda"
    if dtype == "int8" and on_cuda:
        raise InputError("dtype int8 runs on CPUs only; on a GPU use bfloat16")
    if dtype != "auto":
        return dtype
    return "bfloat16" if on_cuda or cpu_prefers_bfloat16() else "float32"


def cpu_prefers_bfloat16() -> bool:
    """Whether this CPU multiplies faster in bfloat16 than in float32.

    With AMX it does, and on AMD's Zen 4 and later (1.9 times). Intel's AVX-512 bfloat16 without
    AMX, as in virtual machines that hide it, takes nearly twice as long as float32.
    """
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16") or capabilities.get("bf16"):
        return True
    return bool(capabilities.get("avx512_bf16")) and cpu_vendor() == "AuthenticAMD"


def cpu_vendor() -> str | None:
    """The vendor that an x86 processor under Linux names, else None."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return names[0] if names else None
