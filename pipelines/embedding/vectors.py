"""Chunks of texts to chunks of vectors: tokenizer tasks feed a pool of encoder actors.

In: ``texts/`` with a segment a chunk. Out: ``vectors/CHUNK.arrow``, one row a text in the chunk's
order, null where a text's vector was not finite. The two kinds of workers overlap and scale
apart: tokens of the next chunks wait in Ray's object store while the actors compute.

No torch here: what the workers run comes from :mod:`pipelines.embedding.chunk_encoder`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from pipelines.embedding.actor_plan import TOKENIZE_CPUS, ActorPlan
from pipelines.embedding.dedup import Chunk
from pipelines.embedding.progress import Progress
from pipelines.embedding.segments import bytes_to_table, table_to_bytes
from pipelines.embedding.stages import not_shared, unit_dataset
from pipelines.errors import InputError
from pipelines.storage import join, list_files, make_folder, read_bytes, write_bytes

_METADATA = ("tokens", "padded_tokens", "failed")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeSettings:
    """What every worker has to know beside its chunk; ``encoder`` is its description's JSON."""

    work: str
    encoder: str
    actors: ActorPlan
    float16: bool
    compile_model: bool = False


@dataclass(frozen=True)
class Workers:
    """What runs on the Ray cluster: a function of a chunk's name, a class of actors of its tokens.

    ``tokenize(batch, settings=...)`` gives ``name`` and ``tokens``; ``encoder(settings)`` is called
    with that, writes the vectors, and gives ``name``, ``texts``, ``tokens``, ``padded_tokens`` and
    ``failed``. Both see one chunk a batch.
    """

    tokenize: Callable[..., pa.Table]
    encoder: type


def find_done_chunks(work: str) -> set[str]:
    """Names of the chunks whose vectors are there."""
    names = list_files(join(work, "vectors"))
    return {n.removesuffix(".arrow") for n in names if n.endswith(".arrow") and n[0] != "."}


def embed_chunks(
    settings: EncodeSettings, workers: Workers, chunks: Sequence[Chunk], *, rejected: int
) -> dict[str, float]:
    """Encode every chunk that has no vectors yet; how fast that went."""
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
        for found in encode_chunks(settings, workers, missing):
            progress.add(found, missing[found["name"]].tokens)
        log.info("%s", progress.line())
    return progress.figures()


def encode_chunks(
    settings: EncodeSettings, workers: Workers, chunks: Mapping[str, Chunk]
) -> Iterator[dict[str, Any]]:
    """Encode chunks on Ray Data; yields what each was, as they finish."""
    plan = settings.actors
    units = {name: [chunk.partition, chunk.number] for name, chunk in chunks.items()}
    tokens = unit_dataset(units).map_batches(
        functools.partial(workers.tokenize, settings=settings),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=plan.tokenizers),
        num_cpus=TOKENIZE_CPUS,
    )
    vectors = tokens.map_batches(
        workers.encoder,
        fn_constructor_args=(settings,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(plan.smallest, len(chunks)), max_size=min(plan.largest, len(chunks))
        ),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus or None,
    )
    yield from vectors.iter_rows()


def write_vectors(
    work: str, chunk: str, vectors: np.ndarray, valid: np.ndarray, found: Mapping[str, int]
) -> None:
    """Write a chunk's vectors, float32 or float16 (n, d), those that are ``valid``, bool (n,).

    ``found`` has the number of tokens, padded tokens and failed texts.
    """
    flat = pa.array(np.where(valid[:, None], vectors, 0).reshape(-1).astype(vectors.dtype))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=pa.array(~valid))
    table = pa.table({"embedding": column})
    table = table.replace_schema_metadata({key: str(found[key]) for key in _METADATA})
    path = join(work, "vectors", f"{chunk}.arrow")
    try:
        write_bytes(path, table_to_bytes(table, compression=None), create_folder=False)
    except FileNotFoundError as error:
        raise InputError(not_shared(work)) from error


def read_vectors(work: str, chunk: str) -> tuple[pa.FixedSizeListArray, dict[str, int]]:
    """A chunk's vectors, null where not finite, and its numbers of tokens and failed texts."""
    table = bytes_to_table(read_bytes(join(work, "vectors", f"{chunk}.arrow")))
    found = {key: int(table.schema.metadata[key.encode()]) for key in _METADATA}
    return table["embedding"].combine_chunks(), found
