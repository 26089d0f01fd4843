"""The encoder: texts in, float32 vectors (n, d) out, in the order of the texts."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.encoding.allocator import keep_freed_memory
from pipelines.encoding.base_model import load_base_model
from pipelines.encoding.batching import default_budget_tokens, token_budget_batches
from pipelines.encoding.elementwise import PLAIN, Elementwise
from pipelines.encoding.encoder_description import (
    EncoderConfig,
    EncoderDescription,
    describe_encoder,
    difference,
    resolve_device,
)
from pipelines.encoding.int8_linear import quantize_linears
from pipelines.encoding.packed_decoder import PackedDecoder, can_pack
from pipelines.encoding.padded_decoder import PaddedDecoder, find_layers
from pipelines.encoding.tokenization import PromptedTokenizer
from pipelines.errors import InputError
from pipelines.pooling import normalize, pool

__all__ = ["Encoder", "EncoderConfig", "EncoderDescription", "describe_encoder", "difference"]

log = logging.getLogger(__name__)

# Texts tokenized and sorted by length together: enough that batches hold like lengths, few enough
# that a window's vectors and token ids stay small.
_WINDOW_TEXTS = 4096
# Two right passes agree to within rounding; a wrong one is far off.
_LEAST_AGREEMENT = {"float32": 0.9999, "bfloat16": 0.98, "float16": 0.98, "int8": 0.98}


@dataclass
class EncodeStats:
    """What an encoder has done since it was loaded."""

    texts: int = 0
    tokens: int = 0
    """Tokens of all texts, prompts included."""
    padded_tokens: int = 0
    """Tokens with the padding of their batches; as many as ``tokens`` where texts are packed."""
    seconds: float = 0.0
    """Time in :meth:`Encoder.encode_tokens`."""


class Encoder:
    """A loaded model with its prompt and pooling."""

    def __init__(
        self,
        description: EncoderDescription,
        tokenizer: PromptedTokenizer,
        model: Any,
        device: torch.device,
        budget_tokens: int | None = None,
        *,
        compile_model: bool = False,
    ) -> None:
        self.description = description
        self.tokenizer = tokenizer
        self.device = device
        self.stats = EncodeStats()
        self.budget_tokens = budget_tokens or default_budget_tokens(
            model.config.get_text_config(), device
        )
        self._decoder = choose_decoder(model, description, tokenizer, compile_model=compile_model)

    @classmethod
    def load(
        cls,
        encoder: EncoderConfig | EncoderDescription,
        *,
        device: str = "auto",
        threads: int | None = None,
        budget_tokens: int | None = None,
        compile_model: bool = False,
    ) -> Encoder:
        """Load an encoder's weights.

        Args:
            encoder: a configuration, or a description made elsewhere, whose model and adapter
                must be the same here.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for the GPU where there is one.
            threads: CPU threads for this whole process; None leaves them as they are.
            budget_tokens: tokens of a batch; None finds it.
            compile_model: fuse work between matrix products by ``torch.compile``: a slower first
                batch, faster ones after it.

        Raises:
            InputError: what :func:`describe_encoder` refuses, another revision than described,
                and an adapter of another model.
        """
        keep_freed_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        description = (
            describe_encoder(encoder, device=device)
            if isinstance(encoder, EncoderConfig)
            else encoder
        )
        model_files, adapter_files = description.fetch()
        target = resolve_device(device)
        tokenizer = PromptedTokenizer.load(description)
        model = load_base_model(
            model_files.folder,
            dtype=torch.float32
            if description.dtype == "int8"
            else getattr(torch, description.dtype),
            device=target,
            adapter=None if adapter_files is None else adapter_files.folder,
            trust_remote_code=description.trust_remote_code,
        )
        return cls(
            description, tokenizer, model, target, budget_tokens, compile_model=compile_model
        )

    @classmethod
    def from_folder(cls, folder: str, *, device: str = "auto") -> Encoder:
        """The encoder whose ``encoder.json`` lies in ``folder``."""
        return cls.load(EncoderDescription.load(folder), device=device)

    def save(self, folder: str) -> None:
        """Write ``encoder.json`` into ``folder``."""
        self.description.save(folder)

    @property
    def fingerprint(self) -> str:
        """What tells this encoder's vectors from all others', 64 hexadecimal digits."""
        return self.description.fingerprint

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self.description.dimension

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """One vector a text, float32 (n, d), in the order given.

        Rows have length 1 if the encoder normalises. A text's vector does not depend on the
        texts beside it, up to rounding. The next window of texts is tokenized while one runs.

        Raises :class:`InputError` for a text without any token (empty, with no prompt).
        """
        vectors = np.empty((len(texts), self.dimension), np.float32)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        windows = [order[i : i + _WINDOW_TEXTS] for i in range(0, len(order), _WINDOW_TEXTS)]
        with ThreadPoolExecutor(max_workers=1) as background:
            token_ids = [
                background.submit(self.tokenizer.tokenize, [texts[i] for i in window])
                for window in windows[:1]
            ]
            for number, window in enumerate(windows):
                ready = token_ids.pop().result()
                for following in windows[number + 1 : number + 2]:
                    texts_ahead = [texts[i] for i in following]
                    token_ids.append(background.submit(self.tokenizer.tokenize, texts_ahead))
                vectors[window] = self.encode_tokens(ready)
        return vectors

    def encode_tokens(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        """One vector a tokenized text, float32 (n, d), in the order given.

        Args:
            token_ids: what :meth:`PromptedTokenizer.tokenize` of this encoder gave.

        Raises :class:`InputError` for a text without any token.
        """
        lengths = [len(ids) for ids in token_ids]
        if 0 in lengths:
            raise InputError(f"text {lengths.index(0)} of this batch is empty and has no prompt")
        started = time.perf_counter()
        vectors = np.empty((len(token_ids), self.dimension), np.float32)
        batches = deque(token_budget_batches(lengths, self.budget_tokens))
        while batches:
            batch = batches.popleft()
            try:
                found = self._encode_batch([token_ids[index] for index in batch])
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                found = None
            if found is None:  # outside the handler, which keeps the failed batch's memory alive
                self._halve_budget()
                half = len(batch) // 2
                batches.extendleft([batch[half:], batch[:half]])
                continue
            vectors[batch] = found
            self.stats.padded_tokens += self._decoder.padded_tokens([lengths[i] for i in batch])
        self.stats.texts += len(token_ids)
        self.stats.tokens += sum(lengths)
        self.stats.seconds += time.perf_counter() - started
        return vectors

    @torch.inference_mode()
    def _encode_batch(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        last_only = self.description.pooling == "last"
        states, mask = self._decoder.states(token_ids, last_only=last_only)
        vectors = pool(
            states,
            mask,
            self.description.pooling,
            prefix_tokens=self.tokenizer.prefix_tokens,
            suffix_tokens=self.tokenizer.suffix_tokens,
        )
        if self.description.normalize:
            vectors = normalize(vectors)
        return vectors.cpu().numpy()

    def _halve_budget(self) -> None:
        self.budget_tokens = max(1, self.budget_tokens // 2)
        log.warning("out of memory: batches now hold %d tokens", self.budget_tokens)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def choose_decoder(
    model: Any,
    description: EncoderDescription,
    tokenizer: PromptedTokenizer,
    *,
    compile_model: bool = False,
) -> PackedDecoder | PaddedDecoder:
    """The fastest forward pass that computes what the model's own does.

    The packed pass is compared with the model's own on two short texts before it is trusted.
    """
    padded = PaddedDecoder(model, description.layers)
    longest = tokenizer.prefix_tokens + tokenizer.max_tokens + tokenizer.suffix_tokens
    int8 = description.dtype == "int8"
    if not can_pack(model, longest):
        if int8:
            quantize_linears(find_layers(model))
        if compile_model:
            model.compile(dynamic=True)
        return padded
    # A text's own part must hold a token: with no suffix, keep one token of the prefix for it.
    prefix = tokenizer.head if tokenizer.tail else tokenizer.head[:-1]
    packed = PackedDecoder(
        model,
        description.layers,
        prefix,
        longest,
        int8=int8,
        elementwise=Elementwise.fused() if compile_model else PLAIN,
    )
    probe = tokenizer.tokenize(["A cat sat on the mat, and a dog beside it.", "Rain."])
    expected, found = (
        pool(*decoder.states(probe, last_only=False), "last") for decoder in (padded, packed)
    )
    cosine = float(torch.cosine_similarity(expected, found).min())
    if cosine >= _LEAST_AGREEMENT[description.dtype]:
        return packed
    log.warning(
        "the packed pass disagrees with %s (cosine %.4f): running the model's own, slower pass",
        type(model).__name__,
        cosine,
    )
    return padded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out, on GPU or CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
