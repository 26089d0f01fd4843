"""Workers without a model: a vector is a digest of the text, so every row can be checked."""

import hashlib
import json
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.embedding.chunks import documents_of
from pipelines.embedding.encode import EncodeSettings, Workers, finish_chunk, with_tokens

DIMENSION = 64
TOKENS = 64
CHUNK_SECONDS = 0.15


def tokens_of(text: str) -> list[int]:
    return list(text.encode()[:TOKENS])


def vector_of(tokens: list[int]) -> np.ndarray:
    """float32 (64,)."""
    digest = hashlib.sha512(bytes(tokens)).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32)


def tokenize(batch: pa.Table, *, settings: EncodeSettings) -> pa.Table:
    del settings
    return with_tokens(batch, [tokens_of(text) for text in documents_of(batch)["text"].to_pylist()])


def topic_vector_of(tokens: list[int], prompt: str = "") -> np.ndarray:
    """float32 (64,), unit length: texts that begin with the same letter lie together.

    Another prompt gives each text another vector, so that those of two encoders are never alike.
    """
    vector = np.zeros(DIMENSION, dtype=np.float32)
    vector[tokens[0] % DIMENSION] = 3.0
    noise = vector_of([*tokens, *prompt.encode()]) / 255 - 0.5
    vector += noise / np.linalg.norm(noise)
    return vector / np.linalg.norm(vector)


class DigestEncoder:
    """Takes its time, so that there is something to interrupt."""

    seconds = CHUNK_SECONDS

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings

    def __call__(self, batch: pa.Table) -> pa.Table:
        tokens = documents_of(batch)["tokens"].to_pylist()
        time.sleep(self.seconds)
        vectors = np.stack([self.vector(ids) for ids in tokens])
        valid = np.ones(len(tokens), dtype=bool)
        return finish_chunk(self.settings, batch, vectors, valid, sum(map(len, tokens)))

    def vector(self, tokens: list[int]) -> np.ndarray:
        return vector_of(tokens)


class CrampedEncoder(DigestEncoder):
    """May write only small files while a file named ``cramped`` lies beside the output."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        cramped = Path(self.settings.results.work).parent.with_name("cramped").exists()
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if cramped:
            resource.setrlimit(resource.RLIMIT_FSIZE, (256, old[1]))
        try:
            return super().__call__(batch)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)


class TopicEncoder(DigestEncoder):
    """Vectors that can be clustered, at once."""

    seconds = 0.0

    def vector(self, tokens: list[int]) -> np.ndarray:
        return topic_vector_of(tokens, json.loads(self.settings.encoder)["prompt"])


class SlowTopicEncoder(TopicEncoder):
    """The same, slowly."""

    seconds = CHUNK_SECONDS


WORKERS = Workers(tokenize, DigestEncoder)
TOPIC_WORKERS = Workers(tokenize, TopicEncoder)
SLOW_TOPIC_WORKERS = Workers(tokenize, SlowTopicEncoder)
CRAMPED_WORKERS = Workers(tokenize, CrampedEncoder)
