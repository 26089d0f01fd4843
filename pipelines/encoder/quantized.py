"""Weights that are quantised in a model's files, read as the plain numbers that they stand for.

What a format only does while it runs (activations in eight bits) is not done: a vector is that of
the plain numbers in the encoder's own precision. Formats whose numbers cannot be had exactly are
refused by name.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from pipelines.runtime.errors import InputError

# The settings of transformers that ask for plain weights, by the name of the method.
_AS_READ = {
    "fp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "mxfp4": "Mxfp4Config",
}
WHEN_LOADED = "bitsandbytes"
"""The method whose weights are made plain when the model stands."""
_PACKAGES = {"compressed-tensors": "compressed_tensors", WHEN_LOADED: "bitsandbytes"}
SCALES = (
    ".weight_scale", ".weight_scale_inv", ".weight_packed", ".weight_g_idx", ".weight_zero_point",
    ".weight.absmax", ".SCB", ".qweight", "_blocks", "_scales",
)  # fmt: skip
"""How names of numbers end without which quantised weights mean nothing."""
_PACKED = ("naive-quantized", "int-quantized", "float-quantized", "pack-quantized")
_FP8 = ("F8_E4M3", "F8_E5M2")


def quantization(folder: Path) -> str | None:
    """How the weights in a model's folder are quantised; None where they are plain numbers.

    Raises :class:`InputError` for what cannot be made plain again, or not exactly.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or {}
    settings = config.get("quantization_config") or text.get("quantization_config")
    if not settings:
        return None
    bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method") or (WHEN_LOADED if bits else "an unnamed method")
    known = (*_AS_READ, WHEN_LOADED)
    problem = None
    if method not in known:
        problem = f"only {', '.join(known)} are read"
    elif method == "compressed-tensors":
        problem = _unlike_compressed_tensors(settings)
    elif method == "fp8":
        problem = _uneven_blocks(folder, settings)
    package = _PACKAGES.get(method)
    if problem is None and package is not None and importlib.util.find_spec(package) is None:
        problem = f"{package} is not installed here (pip install 'shoal[quantize]')"
    if problem is not None:
        raise InputError(
            f"the weights in {folder} are quantised already ({method}), and {problem}: give the "
            "model that it was made from, with --dtype int8 or bfloat16 where memory is short"
        )
    return method


def plain_options(method: str | None) -> dict[str, Any]:
    """What to ask of ``from_pretrained`` so that weights are plain as they are read."""
    if method not in _AS_READ:
        return {}
    return {"quantization_config": getattr(transformers, _AS_READ[method])(dequantize=True)}


def bare_model(folder: Path, options: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """Names and shapes of a model whose weights are plain only once they are loaded."""
    trust = {"trust_remote_code": trust_remote_code}
    config = options.get("config") or transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code
    )
    del config.quantization_config
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config, dtype=options["dtype"], **trust)


def made_plain(model: Any, method: str | None, dtype: torch.dtype) -> Any:
    """A loaded model with plain weights, which stay plain when they are saved."""
    if method is None:
        return model
    if method == WHEN_LOADED:
        model = model.dequantize(dtype)
    # saving would quantise them again, into files whose configuration does not say so
    model._weight_conversions = None
    return model


def _unlike_compressed_tensors(settings: Mapping[str, Any]) -> str | None:
    """Why transformers would not give the numbers that these settings mean.

    It reads all linear layers by the first group's settings, puts no column back in its place,
    and knows no rotation that is to be undone while the model runs.
    """
    groups = list((settings.get("config_groups") or {}).values())
    if len(groups) != 1 or not isinstance(groups[0], Mapping):
        return f"it has {len(groups)} groups of settings, where one is required"
    weights = groups[0].get("weights") or {}
    form = groups[0].get("format") or settings.get("format")
    if form not in _PACKED:
        return f"of its formats {', '.join(_PACKED)} are read, not {form}"
    if weights.get("actorder") in ("group", True):
        return "its columns are in the order of their activation"
    if settings.get("transform_config"):
        return "its weights are rotated (transform_config)"
    sparsity = settings.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        return f"its zeros are left out ({sparsity['format']})"
    return None


def _uneven_blocks(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Why block-wise scales would meet other weights: transformers makes all blocks alike."""
    block = settings.get("weight_block_size")
    if not block:
        return None
    for name, shape, scales in _scaled(folder):
        for length, count, size in zip(shape[-2:], scales[-2:], block, strict=False):
            if count > 1 and length != count * size:
                return f"{name} has {length} rows or columns, which are no blocks of {size}"
    return None


def _scaled(folder: Path) -> Iterator[tuple[str, list[int], list[int]]]:
    """Name and shape of each eight-bit weight, and the shape of its scales."""
    shapes: dict[str, tuple[str, list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                piece = file.get_slice(key)
                shapes[key] = piece.get_dtype(), piece.get_shape()
    for key, (dtype, shape) in shapes.items():
        for scale in (f"{key}_scale_inv", f"{key.removesuffix('.weight')}.scale"):
            if dtype in _FP8 and scale in shapes:
                yield key, shape, shapes[scale][1]
