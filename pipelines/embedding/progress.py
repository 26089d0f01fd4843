"""How far embedding is: totals, rates and the time left, as lines and as metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.util.metrics import Counter, Gauge

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0


@dataclass
class Progress:
    """Totals of the embedding stage, fed with what each finished chunk reports.

    ``expected_tokens`` and ``expected_texts`` count what this run has to do; what an earlier run
    did is left out, so that rates and the time left are this run's own.
    """

    expected_texts: int
    expected_tokens: int
    rejected: int = 0
    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    done_tokens: int = 0
    _first_seconds: float | None = None
    _first_tokens: int = 0
    _started: float = field(default_factory=time.monotonic)
    _printed: float = 0.0

    def __post_init__(self) -> None:
        self._texts_metric = Counter("shoal_embedded_texts", "Texts embedded")
        self._tokens_metric = Counter("shoal_embedded_tokens", "Tokens embedded, prompts included")
        self._padded_metric = Counter("shoal_padded_tokens", "Tokens run, padding included")
        self._left_metric = Gauge("shoal_texts_left", "Texts that are still to be embedded")
        self._rejected_metric = Gauge("shoal_rejected_documents", "Documents rejected so far")
        self._rejected_metric.set(self.rejected)
        self._left_metric.set(self.expected_texts)

    @property
    def texts_left(self) -> int:
        """Texts that this run has still to embed."""
        return max(0, self.expected_texts - self.texts)

    @property
    def tokens_left(self) -> int:
        """Estimated tokens of those texts."""
        return max(0, self.expected_tokens - self.done_tokens)

    def add(self, chunk: Mapping[str, Any], expected_tokens: int) -> None:
        """Count a finished chunk, whose work was estimated at ``expected_tokens``."""
        self.texts += chunk["texts"]
        self.tokens += chunk["tokens"]
        self.padded_tokens += chunk["padded_tokens"]
        self.rejected += chunk["failed"]
        self.done_tokens += expected_tokens
        if self._first_seconds is None:
            self._first_seconds = time.monotonic() - self._started
            self._first_tokens = expected_tokens
        for metric, name in (
            (self._texts_metric, "texts"),
            (self._tokens_metric, "tokens"),
            (self._padded_metric, "padded_tokens"),
        ):
            if chunk[name]:
                metric.inc(chunk[name])
        self._left_metric.set(self.texts_left)
        self._rejected_metric.set(self.rejected)
        if time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            log.info("%s", self.line())

    def figures(self) -> dict[str, float]:
        """What ``run.json`` keeps; the speed is the whole stage's, the start of actors included."""
        seconds = max(1e-9, time.monotonic() - self._started)
        return {
            "embed_seconds": round(seconds, 3),
            "first_chunk_seconds": round(self._first_seconds or 0.0, 3),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "padding_waste": round(padding_waste(self.tokens, self.padded_tokens), 4),
        }

    def line(self) -> str:
        """The state as one line, with the time left from the second chunk on."""
        seconds = max(1e-9, time.monotonic() - self._started)
        # the first chunk is small, and its time is mostly the start of encoders
        since, done = seconds - (self._first_seconds or 0.0), self.done_tokens - self._first_tokens
        left = self.tokens_left * since / done if done else None
        return (
            f"embed: {self.texts:,} of {self.expected_texts:,} texts"
            f" | {self.texts / seconds:,.1f} texts/s | {self.tokens / seconds:,.0f} tokens/s"
            f" | padding {padding_waste(self.tokens, self.padded_tokens):.1%}"
            f" | {self.rejected:,} rejected{'' if left is None else f' | {duration(left)} left'}"
        )


def padding_waste(tokens: int, padded_tokens: int) -> float:
    """Share of the work that was padding, 0 to 1."""
    return 1 - tokens / padded_tokens if padded_tokens else 0.0


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 7 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
