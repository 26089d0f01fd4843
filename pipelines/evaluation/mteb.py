"""Encoders as mteb wants them: ours, a sentence-transformers peer, TF-IDF.

``mteb.evaluate(MtebEncoder.load(EncoderConfig(...)), tasks)`` works in any mteb script. The
revision that mteb files scores under is the encoder's fingerprint, so a retrained adapter or
another prompt never finds the scores of what was before it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import TOKENIZATION, EncoderConfig, EncoderDescription
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.prompts import PLACEHOLDER, PROMPTS, PromptTemplate
from pipelines.encoder.sources import digest_folder
from pipelines.encoder.tokenization import text_limits
from pipelines.encoder.usage import read_usage
from pipelines.runtime.errors import InputError

TFIDF_WORDS = 2048


class TextEmbedder(Protocol):
    """What makes vectors of texts, and what mteb files its scores under."""

    name: str
    revision: str
    dimension: int | None
    max_tokens: int | None

    def embed(self, texts: list[str], task: Any, prompt_type: str | None) -> np.ndarray:
        """One vector a text, float32 (n, d), for a task with this mteb metadata."""


class MtebEncoder:
    """An encoder that any mteb task which only needs ``encode`` can be run with."""

    def __init__(self, embedder: TextEmbedder) -> None:
        self.embedder = embedder
        self.mteb_model_meta = ModelMeta.create_empty().model_copy(
            update={
                "name": embedder.name,
                "revision": embedder.revision,
                "embed_dim": embedder.dimension,
                "max_tokens": embedder.max_tokens,
                "similarity_fn_name": ScoringFunction.COSINE,
                "framework": ["PyTorch"],
            }
        )

    @classmethod
    def load(
        cls,
        encoder: EncoderConfig | EncoderDescription,
        *,
        prompts: Mapping[str, str] | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> MtebEncoder:
        """One of our encoders; its weights are loaded when the first text comes.

        Args:
            encoder: a configuration, or a description made elsewhere.
            prompts: prompts for some tasks in place of the encoder's own, by task name
                (``STS12``), by task type and side (``Retrieval-query``, ``Retrieval-document``)
                or by task type (``Clustering``); the first of these that is there counts, and
                after them those that a sentence-transformers folder has for its tasks.
            device: as :meth:`pipelines.encoder.encoder.Encoder.load` takes it.
            threads: CPU threads for this whole process; None leaves them as they are.

        Raises :class:`pipelines.runtime.errors.InputError` for an encoder that cannot be described.
        """
        if isinstance(encoder, EncoderConfig):
            encoder = describe_encoder(encoder, device=device)
        return cls(PromptedEmbedder(encoder, prompts or {}, device, threads))

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """One vector a text, float32 (n, d), in the order of ``inputs``.

        ``inputs`` gives batches with a list of strings under ``text``. How mteb cuts them into
        batches, and ``batch_size`` among ``options``, have no effect: batches are made anew.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        side = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
        return self.embedder.embed(texts, task_metadata, side)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of every pair."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of each row with the row of the same place."""
        return pairwise_cos_sim(embeddings1, embeddings2)


class PromptedEmbedder:
    """One of our encoders, with a prompt for each task where asked for."""

    def __init__(
        self,
        description: EncoderDescription,
        prompts: Mapping[str, str],
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.description = description
        self.prompts = {key: str(PromptTemplate.parse(value)) for key, value in prompts.items()}
        self.own_prompts = folder_prompts(description)
        self.name = f"shoal/{label_of(description)}"
        self.revision = combined_fingerprint(description, self.prompts)
        self.dimension: int | None = description.dimension
        self.max_tokens: int | None = description.max_tokens
        self._device = device
        self._threads = threads
        self._loaded: Encoder | None = None

    def embed(self, texts: list[str], task: Any, prompt_type: str | None) -> np.ndarray:
        """One vector a text, float32 (n, d), with the prompt of this task."""
        return self._encoder(self.encoder_of(task, prompt_type)).encode(texts)

    def encoder_of(self, task: Any, prompt_type: str | None) -> EncoderDescription:
        """The encoder for a task and side: with the prompt asked for, else as its folder says.

        Where neither names the task or its type, queries are those of a search.
        """
        keys = [f"{task.name}-{prompt_type}", task.name, f"{task.type}-{prompt_type}", task.type]
        if prompt_type == "document":
            keys.append("document")
        for key in keys:
            if key in self.prompts:
                return replace(self.description, prompt=self.prompts[key])
        for key in keys:
            if key in self.own_prompts:
                return with_own_prompt(self.description, self.own_prompts[key])
        return self.description.for_queries() if prompt_type == "query" else self.description

    def _encoder(self, description: EncoderDescription) -> Encoder:
        if self._loaded is None or self._loaded.description != description:
            self._loaded = None  # the weights of two prompts are never held at once
            self._loaded = Encoder.load(description, device=self._device, threads=self._threads)
        return self._loaded


def folder_prompts(description: EncoderDescription) -> dict[str, str]:
    """Templates of a sentence-transformers folder for its tasks; none where others are asked for.

    Its default prompt and that of queries are part of the description.
    """
    if description.adapter is not None:
        return {}
    usage = read_usage(description.fetch()[0].folder, description.model)
    if usage is None or description.prompt != f"{usage.default_prompt}{PLACEHOLDER}":
        return {}
    found = {
        name: str(PromptTemplate.parse(f"{words}{PLACEHOLDER}"))
        for name, words in usage.prompts.items()
        if words and name != "query"
    }
    if usage.document_prompt or usage.default_prompt:  # which is for neither side of a search
        found["document"] = str(PromptTemplate.parse(f"{usage.document_prompt}{PLACEHOLDER}"))
    return found


def with_own_prompt(description: EncoderDescription, prompt: str) -> EncoderDescription:
    """An encoder with another of its folder's prompts, within the folder's limit of all tokens."""
    other = replace(description, prompt=prompt, tokenization=TOKENIZATION)
    room = description.max_tokens + text_limits(description)[1] - text_limits(other)[1]
    return replace(other, max_tokens=max(1, room))


def load_peer(folder: Path, label: str, device: str = "auto") -> Any:
    """A sentence-transformers model as mteb itself runs it, its own prompts by task and side."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device=None if device == "auto" else device)
    peer = SentenceTransformerEncoderWrapper(model)
    names = {
        "name": f"sentence-transformers/{slug(label)}",
        "revision": f"sha256-{digest_folder(folder)}",
    }
    peer.mteb_model_meta = peer.mteb_model_meta.model_copy(update=names)
    return peer


class TfidfEmbedder:
    """TF-IDF over the words of the very texts that are embedded: no training, no model."""

    def __init__(self, words: int = TFIDF_WORDS) -> None:
        self.name = "baseline/tf-idf"
        self.revision = f"words-{words}"
        self.dimension: int | None = words
        self.max_tokens: int | None = None
        self._words = words

    def embed(self, texts: list[str], task: Any, prompt_type: str | None) -> np.ndarray:
        """One vector a text, float32 (n, at most ``words``), rows of length 1.

        Raises :class:`InputError` for a task that embeds its texts in several calls, whose vectors
        would count other words each.
        """
        if task.type != "Clustering":
            raise InputError(
                f"tf-idf has no score on {task.name}, a task of type {task.type}: it learns its "
                "words from the texts of one call, and only Clustering has one call for all of "
                "them; leave tf-idf or this task out"
            )
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(
            stop_words="english", min_df=2, sublinear_tf=True, max_features=self._words,
            dtype=np.float32,
        )  # fmt: skip
        return vectorizer.fit_transform(texts).toarray()


def combined_fingerprint(description: EncoderDescription, prompts: Mapping[str, str]) -> str:
    """The encoder's fingerprint, or a hash of it and of the prompts that some tasks get."""
    prompts = {**folder_prompts(description), **prompts}
    queries = description.query_prompt
    if not prompts and queries is None:
        return description.fingerprint
    text = json.dumps(
        [description.fingerprint, sorted(prompts.items()), *([queries] if queries else [])]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def label_of(description: EncoderDescription) -> str:
    """A short name that a person recognises an encoder by, of letters that paths may have."""
    known = {str(PromptTemplate.parse(template)): name for name, template in PROMPTS.items()}
    prompt = known.get(description.prompt)
    if prompt is None:
        prompt = f"prompt-{hashlib.sha256(description.prompt.encode()).hexdigest()[:6]}"
    parts = [stem(description.model)]
    if description.adapter is not None:
        parts.append(stem(description.adapter))
    layers = "+".join(map(str, description.layers))
    return slug("-".join([*parts, prompt, description.pooling, f"layer{layers}"]))


def stem(name: str) -> str:
    """The last part of a path or hub id."""
    return name.rstrip("/").rpartition("/")[2]


def slug(label: str) -> str:
    """``label`` with what a path may not hold replaced by dashes."""
    return re.sub(r"[^\w.+-]+", "-", label).strip("-")
