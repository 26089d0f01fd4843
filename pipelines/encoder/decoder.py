"""Which forward pass an encoder runs: the packed one where it computes what the model's own does.

Before a pass is trusted it makes the vectors of a few short texts, by the pooling, layers and
precision that it will be used with, and they are held against those of the model's own pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipelines.encoder.base_model import (
    OWN_WORD,
    load_base_model,
    load_projections,
    merge_adapter,
    says_both_ways,
)
from pipelines.encoder.description import INT8_ROUNDING, WINDOWS, EncoderDescription
from pipelines.encoder.elementwise import PLAIN, Elementwise
from pipelines.encoder.int8 import quantize_linears, require_exact_products
from pipelines.encoder.packed import PackedDecoder, can_pack
from pipelines.encoder.padded import PaddedDecoder, find_layers, pad_right, read_states
from pipelines.encoder.pooling import VectorHead
from pipelines.encoder.sources import first_sentence
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.errors import InputError

log = logging.getLogger(__name__)

PROBE = ("A cat sat on the mat, and a dog beside it.", "Rain.")
# Two right passes agree to within rounding; a wrong one is far off.
_LEAST_AGREEMENT = {"float32": 0.9999, "bfloat16": 0.98, "float16": 0.98, "int8": 0.98}
# A change of the text that no rounding explains, in parts of a state's length.
_SEEN = 1e-5
# The same of what pads it; experts may round otherwise beside other tokens.
_SEEN_BESIDE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


def load_described_model(description: EncoderDescription, device: torch.device) -> Any:
    """An encoder's base model with all its layers, adapter merged, in the encoder's precision.

    Raises :class:`InputError` where model or adapter are not the described ones.
    """
    model, _ = load_tuned_model(description, device)
    if description.dtype == "int8":
        quantize_linears(find_layers(model))
    return model


def load_tuned_model(
    description: EncoderDescription,
    device: torch.device,
    tokenizer: PromptedTokenizer | None = None,
) -> tuple[Any, Mapping[str, float] | None]:
    """An encoder's base model with all its layers, adapter merged, float32 for int8.

    Args:
        description: the encoder.
        device: where it is to run.
        tokenizer: the encoder's; with it, what the adapter does is measured.

    Returns:
        The model, and the adapter's effect: ``changed_layers``, a share, and ``cosine`` of vectors
        with and without it, the mean over the probe.

    Raises:
        InputError: model or adapter are not the described ones, do not go together, or attend
            otherwise than described.
    """
    if description.dtype == "int8":
        require_known_int8(description)
        require_exact_products()
    files, adapter = description.fetch()
    model = load_base_model(
        files.folder,
        dtype=weights_dtype(description),
        device=device,
        attention=description.attention,
        trust_remote_code=description.trust_remote_code,
    )
    check_attention(model, description)
    if adapter is None:
        return model, None
    before = None if tokenizer is None else probe_vectors(model, description, tokenizer)
    share = merge_adapter(model, adapter.folder)
    model.eval().requires_grad_(False)
    if tokenizer is None or before is None:
        return model, None
    after = probe_vectors(model, description, tokenizer)
    cosine = float(torch.cosine_similarity(before, after).mean())
    log.info("adapter: %.0f%% of its layers changed, cosine to untuned %.4f", 100 * share, cosine)
    return model, {"changed_layers": round(share, 4), "cosine": round(cosine, 4)}


def require_known_int8(description: EncoderDescription) -> None:
    """Refuse an int8 encoder of a version that rounded otherwise."""
    if description.int8_rounding != INT8_ROUNDING:
        raise InputError(
            f"this encoder rounds to int8 by scheme {description.int8_rounding}, this version of "
            f"Shoal by scheme {INT8_ROUNDING}, which gives other vectors: embed the corpus anew"
        )


def weights_dtype(description: EncoderDescription) -> torch.dtype:
    """The precision in which weights are loaded; int8 is made of float32."""
    name = "float32" if description.dtype == "int8" else description.dtype
    return getattr(torch, name)


def vector_head(
    description: EncoderDescription, tokenizer: PromptedTokenizer, device: torch.device
) -> VectorHead:
    """What makes vectors of an encoder's states."""
    projections = []
    if description.projections:
        folder = description.fetch()[0].folder
        projections = load_projections(folder, description.projections, device)
    return VectorHead(
        pooling=description.pooling,
        prefix_tokens=tokenizer.prefix_tokens,
        suffix_tokens=tokenizer.suffix_tokens,
        skipped_tokens=0 if description.pool_prompt else tokenizer.prompt_tokens,
        projections=projections,
        dimensions=description.dimensions,
        normalize=description.normalize,
    )


@torch.inference_mode()
def probe_vectors(
    model: Any, description: EncoderDescription, tokenizer: PromptedTokenizer
) -> Tensor:
    """Vectors of the probe by the model's own pass, float32 (n, d), none of its layers cut."""
    stack = find_layers(model)
    input_ids, mask = pad_right(tokenizer.tokenize(PROBE), next(model.parameters()).device)
    states = read_states(model, stack, description.layers, len(stack), input_ids, mask)
    return vector_head(description, tokenizer, states.device)(states, mask)


@torch.inference_mode()
def check_attention(model: Any, description: EncoderDescription) -> None:
    """Refuse a model that does not attend as asked for: its code may not heed its configuration."""
    if description.attention is None:
        return
    if model.config.get_text_config().model_type in OWN_WORD and description.windows != WINDOWS:
        raise InputError(
            f"this encoder runs {description.model} with --attention {description.attention} and "
            "counts its windows as an earlier version of Shoal did, which gave long texts other "
            "vectors: embed the corpus anew"
        )
    if max(description.layers) == 0:
        return
    device = next(model.parameters()).device
    stack = find_layers(model)
    first = []
    for second in (5, 6):
        ids = torch.tensor([[4, second, 7, 8]], device=device)
        mask = torch.ones_like(ids).bool()
        with told_in_one_line(f"{type(model).__name__} cannot be run"):
            states = read_states(model, stack, (1,), len(stack) + 1, ids, mask)
        first.append(states[0, 0].float())
    sees = bool((first[0] - first[1]).norm() > _SEEN * first[0].norm())
    if sees != (description.attention == "bidirectional"):
        raise InputError(
            f"{type(model).__name__} cannot be run with --attention {description.attention}: its "
            "code does not heed it; leave the flag out"
        )


def choose_decoder(
    model: Any,
    description: EncoderDescription,
    tokenizer: PromptedTokenizer,
    head: VectorHead,
    *,
    compile_model: bool = False,
) -> PackedDecoder | PaddedDecoder:
    """The fastest forward pass that computes what the model's own does.

    On a GPU the packed one is compiled between its products, asked or not.

    Raises :class:`InputError` where the encoder's precision does not do for this model: vectors
    that are not finite, or int8 ones that are far from float32.
    """
    padded = PaddedDecoder(model, description.layers)
    probe = tokenizer.tokenize(PROBE)
    expected = own_vectors(padded, probe, head, model, description)
    int8 = description.dtype == "int8"
    bidirectional = attends_both_ways(model, description)
    on_gpu = expected.device.type == "cuda"
    if can_pack(model):
        packed = PackedDecoder(
            model,
            description.layers,
            () if bidirectional else shared_prefix(tokenizer),
            tokenizer.most_tokens,
            int8=int8,
            bidirectional=bidirectional,
            elementwise=Elementwise.fused() if compile_model or on_gpu else PLAIN,
        )
        agreement = packed_agreement(packed, probe, head, expected)
        if agreement >= _LEAST_AGREEMENT[description.dtype]:
            return packed
        if int8:
            raise InputError(refuse_int8(description, agreement))
        log.warning(
            "the packed pass disagrees with %s (cosine %.4f): running the model's own, slower pass",
            type(model).__name__,
            agreement,
        )
    elif int8:
        quantize_linears(padded.stack)
        with told_in_one_line(cannot_run(model, description, "int8")):
            agreement = agree(expected, head(*padded.states(probe)))
        if agreement < _LEAST_AGREEMENT["int8"]:
            raise InputError(refuse_int8(description, agreement))
    if compile_model:
        model.compile(dynamic=True)
    return padded


def own_vectors(
    padded: PaddedDecoder,
    probe: Sequence[Sequence[int]],
    head: VectorHead,
    model: Any,
    description: EncoderDescription,
) -> Tensor:
    """The probe's vectors by the model's own pass; :class:`InputError` where they will not do."""
    dtype = str(weights_dtype(description)).removeprefix("torch.")
    with told_in_one_line(cannot_run(model, description, dtype)):
        expected = head(*padded.states(probe))
    if expected.shape[1] != description.dimension:
        raise InputError(
            f"{type(model).__name__} gives vectors of {expected.shape[1]} numbers, its "
            f"configuration calls for {description.dimension}: take another model"
        )
    if not expected.isfinite().all():
        remedy = (
            "use --dtype bfloat16 or float32"
            if description.dtype == "float16"
            else ("its weights are damaged or need another precision")
        )
        raise InputError(
            f"{description.model} gives no finite vector in {description.dtype}: {remedy}"
        )
    alone = torch.cat([head(*padded.states([ids])) for ids in probe])
    seen = padding_seen(padded)
    if agree(alone, expected) < _LEAST_AGREEMENT[description.dtype] or seen > _SEEN_BESIDE[dtype]:
        raise InputError(
            f"{type(model).__name__} gives a text another vector beside a longer one than alone "
            f"(cosine {agree(alone, expected):.4f} on a probe), as its code lets texts see what "
            f"pads them: {way_out(model, description)}"
        )
    return expected


def padding_seen(padded: PaddedDecoder) -> float:
    """How far other padding moves the states of a short text, in parts of their length.

    Convolutions over tokens (MobileBERT, ConvBERT) show in the last few tokens alone, so that two
    texts of ordinary length are hardly moved.
    """
    found = [
        padded.states([[4, 5, 7, 8], [padding] * 28], padding=padding)[0][0, :4].float()
        for padding in (0, 9)
    ]
    return float((found[0] - found[1]).norm() / found[0].norm())


def way_out(model: Any, description: EncoderDescription) -> str:
    """What to do about a model whose code does not keep texts of a batch apart."""
    if description.attention is None and not attends_both_ways(model, description):
        return "take another model"
    if description.attention == "causal":
        return "leave --attention out, or take another model"
    return (
        "it does not attend both ways in batches; pass --attention causal if that does as well, or "
        "take a model of texts alone"
    )


def packed_agreement(
    packed: PackedDecoder, probe: Sequence[Sequence[int]], head: VectorHead, expected: Tensor
) -> float:
    """The least cosine of the packed pass to the model's own; -1 where a GPU's kernel refuses."""
    try:
        return agree(expected, head(*packed.states(probe, last_only=head.last_only)))
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        if not packed.has_kernel:
            raise
        log.warning("packed texts cannot be attended to here: %s", first_sentence(error))
        return -1.0


def cannot_run(model: Any, description: EncoderDescription, dtype: str) -> str:
    """What is to be said where a model's own code fails."""
    return f"{type(model).__name__} cannot be run to layers {list(description.layers)} in {dtype}"


@contextmanager
def told_in_one_line(runs: str) -> Iterator[None]:
    """:class:`InputError` where a model's own code cannot be run; ``runs`` says as what."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise InputError(
            f"{runs} ({first_sentence(error)}): take another model or --dtype"
        ) from error


def shared_prefix(tokenizer: PromptedTokenizer) -> tuple[int, ...]:
    """Tokens with which nearly every text begins and goes on."""
    return tokenizer.head if tokenizer.tail else tokenizer.head[:-1]


def attends_both_ways(model: Any, description: EncoderDescription) -> bool:
    """Whether tokens of a packable model see those after them."""
    if description.attention is not None:
        return description.attention == "bidirectional"
    return says_both_ways(model.config.get_text_config())


def agree(expected: Tensor, found: Tensor) -> float:
    """The least cosine of rows; 1 for those that are the same, as zeros after a ReLU may be."""
    cosines = torch.cosine_similarity(expected, found).nan_to_num(-1.0)
    return float(cosines.masked_fill((expected == found).all(dim=1), 1.0).min())


def refuse_int8(description: EncoderDescription, agreement: float) -> str:
    """Why a model is not run in int8."""
    return (
        f"{description.model} loses too much in int8: cosine {agreement:.4f} to float32 on a "
        f"probe, {_LEAST_AGREEMENT['int8']} is required; use --dtype bfloat16 or float32"
    )
