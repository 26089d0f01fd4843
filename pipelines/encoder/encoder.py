"""The encoder: texts in, float32 vectors (n, d) out, in the order of the texts."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.encoder.decoder import choose_decoder, load_tuned_model, vector_head
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig, EncoderDescription, difference
from pipelines.encoder.packed import PackedDecoder, ropes_of
from pipelines.encoder.padded import TokenIds
from pipelines.encoder.precision import resolve_device
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.errors import InputError
from pipelines.runtime.threads import made_ahead, side_by_side

log = logging.getLogger(__name__)

# Parameters of mallopt(3) in glibc's malloc.h, and 32 MiB, the most that it takes for the second.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_FROM_HEAP_BYTES = 1 << 30, 1 << 25


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory instead of giving it back at once.

    A layer's activations are freed and asked for again at every layer. Given back each time, their
    pages are cleared by the kernel each time: a sixth of all time in float32, half of it in int8.
    Elsewhere than on Linux with glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


# On a CPU as many tokens as give full matrix products whose results stay in cache. 1024 and 2048
# measure alike and best in floating point at 1,536 inner numbers, 1024 in int8; of a model with 96
# inner numbers 8192 tokens run at up to twice the rate of 1024.
_CPU_BUDGET_NUMBERS = 1 << 21
_LEAST_CPU_BUDGET_TOKENS, _CPU_BUDGET_TOKENS, _MOST_CPU_BUDGET_TOKENS = 256, 1024, 8192
_LEAST_CUDA_BUDGET_TOKENS, _MOST_CUDA_BUDGET_TOKENS = 2048, 131072
_SHARE_OF_FREE_MEMORY = 0.25


def token_budget_batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches that fill a budget.

    Texts of like length share a batch, so padding a batch to its longest text costs little. A
    batch counts ``texts x longest`` tokens, at most ``budget_tokens``; a text longer than that is
    a batch alone. The longest come first, so that a lack of memory shows at once.

    Args:
        lengths: tokens of each text.
        budget_tokens: most tokens a batch may hold, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = max(1, budget_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def even_budget(lengths: Sequence[int], budget_tokens: int, at_once: int) -> int:
    """Tokens of a batch, at most the budget, by which every thread gets about equally many.

    Args:
        lengths: tokens of each text.
        budget_tokens: most tokens a batch may hold.
        at_once: batches that are worked on side by side.
    """
    if at_once == 1:
        return budget_tokens
    rounds = math.ceil(sum(lengths) / (budget_tokens * at_once))
    even = math.ceil(sum(lengths) / (rounds * at_once)) + max(lengths)
    return min(budget_tokens, max(even, _LEAST_CPU_BUDGET_TOKENS))


def default_budget_tokens(settings: Any, device: torch.device) -> int:
    """Tokens of a batch for a model of these settings: by its width, on a GPU by free memory.

    There it counts what a layer holds for a token at once (residual stream, attention and gated
    product) and takes a quarter of the memory for it; what still proves too much, the encoder
    halves.
    """
    inner = inner_width(settings)
    if device.type != "cuda":
        widest = max(inner, 2 * settings.hidden_size)  # an expert's MLP is narrow, and many run
        tokens = 1 << max(1, _CPU_BUDGET_NUMBERS // widest).bit_length() - 1
        return min(max(tokens, _CPU_BUDGET_TOKENS), _MOST_CPU_BUDGET_TOKENS)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    bytes_per_token = 4 * 4 * settings.hidden_size + 2 * (4 * settings.hidden_size + 3 * inner)
    tokens = int(free_bytes * _SHARE_OF_FREE_MEMORY / bytes_per_token)
    return min(max(tokens, _LEAST_CUDA_BUDGET_TOKENS), _MOST_CUDA_BUDGET_TOKENS)


def inner_width(settings: Any) -> int:
    """The most numbers of a token inside a layer's MLP; the usual number where none is set."""
    inner = getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size
    return max(inner) if isinstance(inner, Sequence) else inner


def switch_length(settings: Any) -> int | None:
    """Tokens beyond which a text's positions count in another way; None where they never do.

    Such a model (longrope) looks at the longest text of a batch.
    """
    for ropes in ropes_of(settings):
        if ropes.get("rope_type") == "longrope":
            own = ropes.get("original_max_position_embeddings")
            return own or getattr(settings, "original_max_position_embeddings", None)
    return None


__all__ = ["Encoder", "EncoderConfig", "EncoderDescription", "describe_encoder", "difference"]


# Texts tokenized and sorted by length together: enough that batches hold like lengths, few enough
# that a window's vectors and token ids stay small and a GPU need not wait long for the first.
_WINDOW_TEXTS = 4096
_LEAST_WINDOW_CHARACTERS = 1 << 18


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
        self.adapter_effect: Mapping[str, float] | None = None
        self._head = vector_head(description, tokenizer, device)
        self._decoder = choose_decoder(
            model, description, tokenizer, self._head, compile_model=compile_model
        )
        # The model's own pass, and compiled functions, are not made for several threads.
        self._side_by_side = isinstance(self._decoder, PackedDecoder) and not compile_model
        self._boundary = switch_length(model.config.get_text_config())

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
                batch, faster ones after it. On a GPU the packed pass is fused asked or not.

        Raises:
            InputError: what :func:`describe_encoder` refuses, another revision than described,
                an adapter of another model or without effect, and a precision that does not do
                for this model.
        """
        keep_freed_memory()
        if threads is not None:
            torch.set_num_threads(threads)
        description = (
            describe_encoder(encoder, device=device)
            if isinstance(encoder, EncoderConfig)
            else encoder
        )
        target = resolve_device(device)
        tokenizer = PromptedTokenizer.load(description)
        model, effect = load_tuned_model(description, target, tokenizer)
        loaded = cls(
            description, tokenizer, model, target, budget_tokens, compile_model=compile_model
        )
        loaded.adapter_effect = effect
        return loaded

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
        windows = list(self._windows(texts))
        chosen = ([texts[index] for index in window] for window in windows)
        token_ids = made_ahead(map(self.tokenizer.tokenize, chosen))
        with contextlib.closing(token_ids):
            for window, ids in zip(windows, token_ids, strict=True):
                vectors[window] = self.encode_tokens(ids)
        return vectors

    def _windows(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Indices of texts, longest first, in windows that are tokenized while one is encoded."""
        batches = 1 if self.device.type == "cuda" else 16 * self._threads()
        most = max(_LEAST_WINDOW_CHARACTERS, 4 * self.budget_tokens * batches)
        window: list[int] = []
        characters = 0
        for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
            if window and (len(window) == _WINDOW_TEXTS or characters >= most):
                yield window
                window, characters = [], 0
            window.append(index)
            characters += len(texts[index])
        if window:
            yield window

    def encode_tokens(self, token_ids: Sequence[TokenIds]) -> np.ndarray:
        """One vector a tokenized text, float32 (n, d), in the order given.

        Args:
            token_ids: what :meth:`PromptedTokenizer.tokenize` of this encoder gave, as lists or
                as arrays.

        Raises :class:`InputError` for a text without any token.
        """
        lengths = [len(ids) for ids in token_ids]
        if 0 in lengths:
            raise InputError(f"text {lengths.index(0)} of this batch is empty and has no prompt")
        started = time.perf_counter()
        vectors = np.empty((len(token_ids), self.dimension), np.float32)
        waiting = list(self._batches(lengths))
        while waiting:
            batches, waiting = waiting, []
            for batch, rows in zip(batches, self._encode_batches(batches, token_ids), strict=True):
                if rows is None:
                    self._halve_budget()
                    half = len(batch) // 2
                    waiting += [batch[:half], batch[half:]]
                    continue
                vectors[batch] = rows
                self.stats.padded_tokens += self._decoder.padded_tokens([lengths[i] for i in batch])
        self.stats.texts += len(token_ids)
        self.stats.tokens += sum(lengths)
        self.stats.seconds += time.perf_counter() - started
        return vectors

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Batches, those whose positions count in another way apart."""
        budget = even_budget(lengths, self.budget_tokens, self._threads())
        if self._boundary is None or max(lengths) <= self._boundary:
            yield from token_budget_batches(lengths, budget)
            return
        for long in (True, False):
            some = [i for i, n in enumerate(lengths) if (n > self._boundary) == long]
            for batch in token_budget_batches([lengths[i] for i in some], budget):
                yield [some[i] for i in batch]

    def _threads(self) -> int:
        """Batches that may be encoded at once."""
        beside = self._side_by_side and self.device.type == "cpu"
        return torch.get_num_threads() if beside else 1

    def _encode_batches(
        self, batches: Sequence[Sequence[int]], token_ids: Sequence[TokenIds]
    ) -> Iterator[np.ndarray | None]:
        """Vectors of each batch; None where memory ran out."""
        chosen = ([token_ids[index] for index in batch] for batch in batches)
        threads = min(self._threads(), len(batches))
        if threads == 1:
            yield from map(fetch, one_ahead(map(self._try_batch, chosen)))
            return
        yield from map(fetch, side_by_side(self._try_batch, chosen, threads))

    def _try_batch(self, token_ids: Sequence[TokenIds]) -> OnItsWay | None:
        try:
            return self._encode_batch(token_ids)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(token_ids) == 1:
                raise
        return None  # outside the handler, which keeps the failed batch's memory alive

    @torch.inference_mode()
    def _encode_batch(self, token_ids: Sequence[TokenIds]) -> OnItsWay:
        states, mask = self._decoder.states(token_ids, last_only=self._head.last_only)
        vectors = self._head(states, mask)
        if self.device.type != "cuda":
            return OnItsWay(vectors, None)
        vectors = vectors.to("cpu", non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(self.device))
        return OnItsWay(vectors, arrival)

    def _halve_budget(self) -> None:
        self.budget_tokens = max(1, self.budget_tokens // 2)
        log.warning("out of memory: batches now hold %d tokens", self.budget_tokens)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class OnItsWay:
    """Vectors of a batch that a GPU may still be at work on."""

    vectors: torch.Tensor
    """float32 (n, d), in the CPU's memory, not to be read before ``arrival``."""
    arrival: Any
    """A ``torch.cuda.Event``; None where they are there."""


def fetch(batch: OnItsWay | None) -> np.ndarray | None:
    """The vectors of a batch, float32 (n, d), once they are there."""
    if batch is None:
        return None
    if batch.arrival is not None:
        batch.arrival.synchronize()
    return batch.vectors.numpy()


Item = TypeVar("Item")


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each given when the next one is made: so a GPU has its next batch in time."""
    for item in items:
        for following in items:
            yield item
            item = following
        yield item


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out, on GPU or CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
