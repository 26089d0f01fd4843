"""Chunks of texts to chunks of vectors: tokenizer tasks feed a pool of encoder actors.

In: ``texts/`` with a segment a chunk. Out: ``vectors/CHUNK.arrow``, one row a text in the chunk's
order, null where a text's vector was not finite. The two kinds of workers overlap: tokens of the
next chunks wait in Ray's object store while the actors compute.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from pipelines.actor_plan import TOKENIZE_CPUS, ActorPlan
from pipelines.dedup import Chunk
from pipelines.encoder import Encoder
from pipelines.encoder_description import EncoderDescription
from pipelines.errors import InputError
from pipelines.progress import Progress, padding_waste
from pipelines.segments import bytes_to_table, read_segment, table_to_bytes
from pipelines.stages import blame, not_shared, take_unit, unit_dataset
from pipelines.storage import join, list_files, make_folder, read_bytes, write_bytes
from pipelines.tokenization import PromptedTokenizer

_METADATA = ("tokens", "padded_tokens", "failed")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeSettings:
    """What every worker has to know beside its chunk; ``encoder`` is its description's JSON."""

    work: str
    encoder: str
    actors: ActorPlan
    float16: bool


def find_done_chunks(work: str) -> set[str]:
    """Names of the chunks whose vectors are there."""
    names = list_files(join(work, "vectors"))
    return {n.removesuffix(".arrow") for n in names if n.endswith(".arrow") and n[0] != "."}


def embed_chunks(
    settings: EncodeSettings, chunks: Sequence[Chunk], *, rejected: int
) -> dict[str, Any]:
    """Encode every chunk that has no vectors yet; how fast that went."""
    started = time.monotonic()
    make_folder(join(settings.work, "vectors"))
    done = find_done_chunks(settings.work)
    missing = {chunk.name: chunk for chunk in chunks if chunk.name not in done}
    log.info("embed: %d of %d chunks to do, actors: %s", len(missing), len(chunks), settings.actors)
    progress = Progress(
        sum(chunk.texts for chunk in missing.values()),
        sum(chunk.tokens for chunk in missing.values()),
        rejected,
    )
    if missing:
        for found in encode_chunks(settings, missing):
            progress.add(found, missing[found["name"]].tokens)
        log.info("%s", progress.line())
    seconds = time.monotonic() - started
    return {
        "embed_seconds": round(seconds, 3),
        "texts_per_second": round(progress.texts / seconds, 2),
        "tokens_per_second": round(progress.tokens / seconds, 1),
        "padding_waste": round(padding_waste(progress.tokens, progress.padded_tokens), 4),
    }


def encode_chunks(
    settings: EncodeSettings, chunks: Mapping[str, Chunk]
) -> Iterator[dict[str, Any]]:
    """Encode chunks on Ray Data; yields what each was, as they finish."""
    plan = settings.actors
    units = {name: [chunk.partition, chunk.number] for name, chunk in chunks.items()}
    tokens = unit_dataset(units).map_batches(
        functools.partial(tokenize_chunk, settings=settings),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=TOKENIZE_CPUS,
    )
    vectors = tokens.map_batches(
        ChunkEncoder,
        fn_constructor_args=(settings,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=plan.smallest, max_size=plan.largest),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
    )
    yield from vectors.iter_rows()


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
            _description(settings.encoder), device=device, threads=settings.actors.threads
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
            self._write(name, vectors, valid, found)
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

    def _write(
        self, name: str, vectors: np.ndarray, valid: np.ndarray, found: Mapping[str, int]
    ) -> None:
        flat = pa.array(np.where(valid[:, None], vectors, 0).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=pa.array(~valid))
        table = pa.table({"embedding": column})
        table = table.replace_schema_metadata({key: str(found[key]) for key in _METADATA})
        path = join(self.settings.work, "vectors", f"{name}.arrow")
        try:
            write_bytes(path, table_to_bytes(table, compression=None), create_folder=False)
        except FileNotFoundError as error:
            raise InputError(not_shared(self.settings.work)) from error


def read_vectors(work: str, chunk: str) -> tuple[pa.FixedSizeListArray, dict[str, int]]:
    """A chunk's vectors, null where not finite, and its numbers of tokens and failed texts."""
    table = bytes_to_table(read_bytes(join(work, "vectors", f"{chunk}.arrow")))
    found = {key: int(table.schema.metadata[key.encode()]) for key in _METADATA}
    return table["embedding"].combine_chunks(), found


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
