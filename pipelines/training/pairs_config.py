"""The options of making pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pipelines.corpus import Columns
from pipelines.errors import InputError
from pipelines.model_sources import PACKAGED_MODEL
from pipelines.storage import default_output
from pipelines.training.rewriting import RewriterSettings

Method = Literal["crop", "noise", "dropout", "paraphrase", "backtranslate"]


@dataclass(frozen=True)
class PairsConfig:
    """Make training pairs from a corpus."""

    corpus: str = ""
    """File, folder or glob of documents, local or remote; empty is a packaged corpus."""
    output: str = field(default_factory=lambda: default_output("generate_pairs"))
    """Folder of the result, local or remote; an unfinished run in it is gone on with."""
    text_column: str = "text"
    """Column of the text."""
    id_column: str | None = None
    """Column of the id; by default `id` where a file has it, else the text's SHA-256 is the id."""
    label_column: str | None = None
    """Column to carry along as `label`, for measuring only."""
    method: Method = "crop"
    """How the two sides of a pair are made."""
    crop_words: tuple[int, int] = (16, 32)
    """Fewest and most words of a crop."""
    noise_rate: float = 0.1
    """Share of words that are deleted, of those swapped, and of those mistyped."""
    pairs_per_document: int = 1
    """Pairs made of each document, each with new random numbers."""
    model: str = PACKAGED_MODEL
    """Instruct LLM for paraphrase; seq2seq model for backtranslate, into the other language."""
    back_model: str | None = None
    """Seq2seq model for backtranslate, back into the corpus's language."""
    most_tokens: int = 96
    """Tokens of a text that a model reads, and that it writes at most."""
    batch_texts: int = 16
    """Texts that a model rewrites together."""
    num_actors: int = 1
    """Actors that each load the models of paraphrase or backtranslate."""
    seed: int = 0
    """Decides everything random."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"unknown method {self.method!r}; known are {get_args(Method)}")
        fewest, most = self.crop_words
        if not 1 <= fewest <= most:
            raise InputError(f"crop_words is {self.crop_words}; 1 <= fewest <= most is required")
        if not 0 < self.noise_rate <= 0.3:
            raise InputError(f"noise_rate is {self.noise_rate}; above 0 and at most 0.3 required")
        for name in ("pairs_per_document", "most_tokens", "batch_texts", "num_actors"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (self.method == "backtranslate") != (self.back_model is not None):
            raise InputError(
                "method backtranslate needs --model and --back-model, two translation models; no "
                f"other method takes --back-model (found method {self.method})"
            )

    @property
    def columns(self) -> Columns:
        """The columns to read."""
        return Columns(
            self.text_column, self.id_column, (self.label_column,) if self.label_column else ()
        )

    @property
    def rewriter(self) -> RewriterSettings:
        """What the models are told."""
        return RewriterSettings(
            self.method, self.model, self.back_model, self.most_tokens, self.batch_texts, self.seed
        )
