"""What tokenizer tasks and encoder actors do with a chunk of texts.

In: a chunk's name and place. Out: its vectors, in the file that
:mod:`pipelines.embedding.vectors` names.
"""

from __future__ import annotations

import functools
import json
import logging
import time

import numpy as np
import pyarrow as pa
import torch

from pipelines.embedding.segments import bytes_to_table, read_segment, table_to_bytes
from pipelines.embedding.stages import blame, take_unit
from pipelines.embedding.vectors import EncodeSettings, write_vectors
from pipelines.encoder import Encoder
from pipelines.encoding.encoder_description import EncoderDescription
from pipelines.encoding.tokenization import PromptedTokenizer
from pipelines.storage import join

log = logging.getLogger(__name__)


def tokenize_chunk(batch: pa.Table, *, settings: EncodeSettings) -> pa.Table:
    """A chunk's name to its name and tokens, as one binary value."""
    name, (partition, number) = take_unit(batch)
    with blame("tokenize", name):
        path = join(settings.work, "texts", f"{partition}.texts")
        texts = read_segment(path, number)
        if texts is None:
            raise RuntimeError(f"{path} has no chunk {number}")
        ids = _tokenizer(settings.encoder).tokenize(texts["text"].to_pylist())
        tokens = pa.table({"tokens": pa.array(ids, pa.list_(pa.int32()))})
        return pa.table({"name": [name], "tokens": pa.array([table_to_bytes(tokens)], pa.binary())})


class ChunkEncoder:
    """An actor that has loaded the encoder and turns tokens into files of vectors."""

    def __init__(self, settings: EncodeSettings) -> None:
        started = time.monotonic()
        self.settings = settings
        device = _pick_device(settings.actors.gpus)
        self.encoder = Encoder.load(
            _description(settings.encoder),
            device=device,
            threads=settings.actors.threads,
            compile_model=settings.compile_model,
        )
        log.info("encoder loaded on %s in %.1f s", device, time.monotonic() - started)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A chunk's name and tokens to what it was; its vectors go to their file."""
        name = batch["name"][0].as_py()
        with blame("embed", name):
            tokens = bytes_to_table(batch["tokens"][0].as_py())["tokens"].to_pylist()
            stats = self.encoder.stats
            padded = stats.padded_tokens
            vectors, valid = self._encode(tokens)
            found = {
                "tokens": sum(map(len, tokens)),
                "padded_tokens": stats.padded_tokens - padded,
                "failed": int(len(valid) - valid.sum()),
            }
            write_vectors(self.settings.work, name, vectors, valid, found)
            row = {"name": name, "texts": len(tokens), **found}
            return pa.table({key: [value] for key, value in row.items()})

    def _encode(self, tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, d) in the output's type, and which of them are finite, bool (n,)."""
        dtype = np.float16 if self.settings.float16 else np.float32
        vectors = np.zeros((len(tokens), self.encoder.dimension), dtype)
        some = [index for index, ids in enumerate(tokens) if ids]
        found = self.encoder.encode_tokens([tokens[index] for index in some])
        with np.errstate(over="ignore"):
            vectors[some] = found
        valid = np.zeros(len(tokens), dtype=bool)
        valid[some] = np.isfinite(vectors[some]).all(axis=1)
        return vectors, valid


@functools.lru_cache(maxsize=1)
def _tokenizer(encoder: str) -> PromptedTokenizer:
    return PromptedTokenizer.load(_description(encoder))


def _description(encoder: str) -> EncoderDescription:
    return EncoderDescription.from_json(json.loads(encoder))


def _pick_device(gpus: float) -> str:
    """The GPU that Ray gave this actor, the CPU where it gave none."""
    if not gpus:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    log.warning("Ray gave this actor a GPU, but torch sees none here: encoding on the CPU")
    return "cpu"
