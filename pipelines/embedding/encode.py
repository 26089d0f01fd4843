"""Chunks of documents to vectors: tasks that read feed a pool of encoder actors.

One pipeline of documents on Ray Data: tasks read shards, check them, drop what is not to be
encoded and cut the rest into chunks; actors encode chunks and write them. The two kinds of workers
overlap and scale apart: the next chunks wait in Ray's object store while the actors compute. Tasks
also tokenize where the actors have GPUs, which must not wait for it; where they compute on the CPU
they tokenize themselves, a small part of their work, and no third kind of process loads the
tokenizer. Out: ``vectors/CHUNK.parquet``, a row a document in the chunk's order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipelines.corpus.given_vectors import GivenVectors
from pipelines.corpus.passages import Cuts, cut_texts
from pipelines.embedding.chunks import (
    Groups,
    ReadSettings,
    chunk_row,
    documents_of,
    left_to_read,
    read_chunks,
)
from pipelines.embedding.progress import Progress
from pipelines.embedding.write import Chunk, ResultSettings, find_chunks, write_chunk
from pipelines.encoder.description import EncoderDescription
from pipelines.runtime.files import join, make_folder, read_bytes, write_bytes
from pipelines.runtime.machines import (
    OFF_HEAD,
    TOKENIZE_CPUS,
    ActorPlan,
    is_ray_put_off,
    need_ray,
    usable_cpus,
)
from pipelines.runtime.threads import made_ahead
from pipelines.runtime.units import Loaded, blame, one_unit, unit_dataset

log = logging.getLogger(__name__)

# What is encoded in the job's own process before a Ray and its actors start: what takes it minutes,
# judged by what it did in some seconds. It reads one group after the other, and its threads share
# Python's lock: many groups and many cores want processes.
_MOST_SECONDS_HERE = 300.0
_TRIAL_SECONDS = 5.0
_MOST_GROUPS_HERE = 8
_MOST_CPUS_HERE = 8
_ADAPTER_EFFECT = "adapter_effect.json"
_TOKENIZERS: dict[str, Any] = {}
"""This process's tokenizer, by the JSON of its encoder's description."""


@dataclass(frozen=True)
class EncodeSettings:
    """What every worker has to know beside its chunk; ``encoder`` is its description's JSON."""

    results: ResultSettings
    encoder: str
    actors: ActorPlan
    compile_model: bool = False
    vectors: GivenVectors | None = None
    """Those that the corpus brings along."""


Tokenize = Callable[..., pa.Table]


@dataclass(frozen=True)
class Workers:
    """What runs on the Ray cluster: a function of a chunk of texts, a class of actors of tokens.

    ``tokenize(batch, settings=...)`` gives the chunk :func:`with_tokens`; ``encoder(settings)`` is
    called with that and gives what :func:`finish_chunk` does. Both see one chunk a batch.
    """

    tokenize: Tokenize
    encoder: type


def read_group(
    batch: pa.Table, *, reading: ReadSettings, settings: EncodeSettings, tokenize: Tokenize
) -> Iterator[pa.Table]:
    """A group of shards to its chunks, tokenized where actors do not do it themselves.

    One task does both. Ray Data would keep a reader's CPU while its chunks wait for a tokenizer's,
    which on a small Ray cluster is the same one.
    """
    name = batch["name"][0].as_py()
    with blame("read", name):
        for chunk in read_chunks(batch, settings=reading):
            yield tokenize(chunk, settings=settings) if settings.actors.gpus else chunk


@dataclass(frozen=True)
class EncoderCuts:
    """Cuts texts by an encoder's own tokens; ``encoder`` is its description's JSON.

    Travels to workers, which load the tokenizer once each.
    """

    cuts: Cuts
    encoder: str

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Passages of each text, int64 (p, 2)."""
        return cut_texts(texts, self.cuts, _tokenizer(self.encoder))


def tokenize_chunk(batch: pa.Table, *, settings: EncodeSettings) -> pa.Table:
    """A chunk with tokens in place of its texts."""
    texts = documents_of(batch)["text"].to_pylist()
    return with_tokens(batch, _tokenizer(settings.encoder).tokenize(texts))


def with_tokens(batch: pa.Table, ids: Sequence[Sequence[int]]) -> pa.Table:
    """A chunk with these token ids in place of its texts."""
    documents = documents_of(batch).drop_columns("text")
    documents = documents.append_column("tokens", pa.array(ids, pa.list_(pa.int32())))
    return chunk_row(batch["name"][0].as_py(), batch["expected"][0].as_py(), documents)


def token_arrays(column: pa.ListArray) -> list[np.ndarray]:
    """Each text's token ids, int32 (t,), without a Python object for each."""
    ids, offsets = column.values.to_numpy(), column.offsets.to_pylist()
    return [ids[start:stop] for start, stop in itertools.pairwise(offsets)]


class ChunkActor:
    """An actor of a pool: the encoder, and the tokenizer where its CPU does both."""

    def __init__(self, settings: EncodeSettings, workers: Workers) -> None:
        # as many as it computes with; by itself the tokenizer takes every core of the machine
        os.environ.setdefault("RAYON_NUM_THREADS", str(settings.actors.threads))
        self.settings, self.tokenize = settings, workers.tokenize
        self.encoder = workers.encoder(settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A chunk to what it was."""
        return self.encoder(self.tokenized(batch))

    def tokenized(self, batch: pa.Table) -> pa.Table:
        """A chunk with tokens, which on GPUs it comes with."""
        if self.settings.actors.gpus:
            return batch
        with blame("tokenize", batch["name"][0].as_py()):
            return self.tokenize(batch, settings=self.settings)


class ChunkEncoder:
    """An actor that has loaded the encoder and turns chunks with tokens into files of vectors."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings
        self._loaded = Loaded(functools.partial(_load_encoder, settings))

    @property
    def encoder(self) -> Any:
        """The encoder; :class:`InputError` where it could not be loaded."""
        return self._loaded.get()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A chunk to what it was; its documents go to their file with their vectors."""
        with blame("embed", batch["name"][0].as_py()):
            tokens = token_arrays(documents_of(batch)["tokens"].combine_chunks())
            encoder = self.encoder
            padded = encoder.stats.padded_tokens
            vectors, valid = self._encode(encoder, tokens)
            padded = encoder.stats.padded_tokens - padded
            return finish_chunk(self.settings, batch, vectors, valid, padded)

    def _encode(self, encoder: Any, tokens: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, d) in the output's type, and which of them are finite, bool (n,)."""
        dtype = self.settings.results.value_type.to_pandas_dtype()
        vectors = np.zeros((len(tokens), encoder.dimension), dtype)
        some = [index for index, ids in enumerate(tokens) if len(ids)]
        found = encoder.encode_tokens([tokens[index] for index in some])
        with np.errstate(over="ignore"):
            vectors[some] = found
        valid = np.zeros(len(tokens), dtype=bool)
        valid[some] = np.isfinite(vectors[some]).all(axis=1)
        return vectors, valid


def finish_chunk(
    settings: EncodeSettings,
    batch: pa.Table,
    vectors: np.ndarray,
    valid: np.ndarray,
    padded_tokens: int,
) -> pa.Table:
    """Write a chunk's file; what it was, as one row."""
    documents = documents_of(batch)
    chunk = write_chunk(
        settings.results,
        batch["name"][0].as_py(),
        documents,
        vectors,
        valid,
        texts=len(documents),
        tokens=len(pc.list_flatten(documents["tokens"])),
        padded_tokens=padded_tokens,
        expected=batch["expected"][0].as_py(),
    )
    return pa.table({key: [value] for key, value in asdict(chunk).items()})


def no_tokens(batch: pa.Table, *, settings: EncodeSettings) -> pa.Table:
    """A chunk of documents that bring their vectors along."""
    del settings
    return with_tokens(batch, [[]] * len(documents_of(batch)))


class VectorTaker:
    """In an encoder's place where documents bring their vectors along: takes them as they are."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A chunk to what it was; its documents go to their file with their vectors."""
        given, documents = self.settings.vectors, documents_of(batch)
        assert given is not None
        vectors = given.to_matrix(documents[f"kept.{given.column}"])
        return finish_chunk(self.settings, batch, vectors, np.ones(len(vectors), bool), 0)


def _load_encoder(settings: EncodeSettings) -> Any:
    from pipelines.encoder.encoder import Encoder  # torch: only where there is an encoder

    started = time.monotonic()
    device = _pick_device(settings.actors.gpus)
    encoder = Encoder.load(
        _description(settings.encoder),
        device=device,
        threads=settings.actors.threads,
        compile_model=settings.compile_model,
    )
    log.info("encoder loaded on %s in %.1f s", device, time.monotonic() - started)
    _TOKENIZERS[settings.encoder] = encoder.tokenizer
    if encoder.adapter_effect is not None:
        content = json.dumps(dict(encoder.adapter_effect))
        write_bytes(join(settings.results.work, _ADAPTER_EFFECT), content.encode())
    return encoder


def read_adapter_effect(work: str) -> dict[str, float] | None:
    """What an adapter was seen to do where an encoder was loaded; None where none was."""
    try:
        return json.loads(read_bytes(join(work, _ADAPTER_EFFECT)))
    except FileNotFoundError:
        return None


def _tokenizer(encoder: str) -> Any:
    if encoder not in _TOKENIZERS:
        from pipelines.encoder.tokenization import PromptedTokenizer

        _TOKENIZERS.clear()
        _TOKENIZERS[encoder] = PromptedTokenizer.load(_description(encoder))
    return _TOKENIZERS[encoder]


def _description(encoder: str) -> EncoderDescription:
    return EncoderDescription.from_json(json.loads(encoder))


def _pick_device(gpus: float) -> str:
    """The GPU that Ray gave this actor, the CPU where it gave none."""
    if not gpus:
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    log.warning("Ray gave this actor a GPU, but torch sees none here: encoding on the CPU")
    return "cpu"


TAKE_VECTORS = Workers(no_tokens, VectorTaker)


class EmbeddingStoppedError(RuntimeError):
    """The time that embedding may take is over; what is embedded stays for the next run."""

    def __init__(self, texts: int, added: int, figures: dict[str, float]) -> None:
        super().__init__(f"the time for embedding is over; {texts:,} texts have a vector")
        self.texts = texts
        """Texts that have a vector by now, and ``added`` those that this run embedded."""
        self.added, self.figures = added, figures


def embed_chunks(
    settings: EncodeSettings,
    reading: ReadSettings,
    workers: Workers,
    groups: Groups,
    *,
    texts: int,
    tokens: int,
    rejected: int,
    most_seconds: float = 0.0,
) -> tuple[dict[str, Chunk], dict[str, float]]:
    """Encode every chunk that has no vectors yet; all chunks by name, and how fast that went.

    ``texts`` and estimated ``tokens`` are what all chunks hold together. After ``most_seconds``,
    0 for no limit, it ends with the next chunk: :class:`EmbeddingStoppedError` if any is left.
    """
    began = time.monotonic()
    work = settings.results.work
    make_folder(join(work, "vectors"))
    chunks = {name: chunk for name, chunk in find_chunks(work).items() if chunk.texts}
    progress = Progress(
        texts - sum(chunk.texts for chunk in chunks.values()),
        tokens - sum(chunk.expected for chunk in chunks.values()),
        rejected,
    )
    encoding = encode_left(settings, reading, workers, groups, chunks, progress)
    with contextlib.closing(encoding):  # ends its actors where time is over
        for chunk in encoding:
            chunks[chunk.name] = chunk
            progress.add(asdict(chunk), chunk.expected)
            is_late = most_seconds and time.monotonic() - began >= most_seconds
            if is_late and progress.texts_left:
                texts_there = sum(chunk.texts for chunk in chunks.values())
                raise EmbeddingStoppedError(texts_there, progress.texts, progress.figures())
    if progress.expected_texts:
        log.info("%s", progress.line())
    there = sum(chunk.texts for chunk in chunks.values())
    if there != texts:
        raise RuntimeError(f"{texts:,} texts were to be embedded, and {there:,} were")
    return dict(sorted(chunks.items())), progress.figures()


def encode_left(
    settings: EncodeSettings,
    reading: ReadSettings,
    workers: Workers,
    groups: Groups,
    chunks: Mapping[str, Chunk],
    progress: Progress,
) -> Generator[Chunk, None, None]:
    """Encode what has no vectors yet, in this process while that is small work, then by actors.

    ``chunks`` are those that are done; to them and to ``progress`` the caller adds what it gets.
    """
    work = settings.results.work
    units = left_to_read(work, groups, set(chunks))
    if may_encode_here(settings.actors, len(units)):
        log.info("embed: %d chunks are done, in this process", len(chunks))
        if (yield from encode_here(settings, reading, workers, units, progress.tokens_left)):
            return
        units = left_to_read(work, groups, set(chunks))
    log.info("embed: %d chunks are done, actors: %s", len(chunks), settings.actors)
    if units:
        most = len(units) + progress.tokens_left // reading.chunk_tokens
        most_actors = most if progress.texts_left else 0
        yield from encode_chunks(settings, reading, workers, units, most_actors=most_actors)


def may_encode_here(actors: ActorPlan, groups: int) -> bool:
    """Whether this process may begin: it is there at once, and actors first have to start."""
    few = groups <= _MOST_GROUPS_HERE and usable_cpus() <= _MOST_CPUS_HERE
    return few and is_ray_put_off() and not actors.asked


def encode_here(
    settings: EncodeSettings,
    reading: ReadSettings,
    workers: Workers,
    units: Mapping[str, Any],
    tokens: int,
) -> Generator[Chunk, None, bool]:
    """Read and encode groups of shards in this process, with all its CPUs.

    Returns whether it did all. It stops after some seconds where, at its rate, the estimated
    ``tokens`` of all groups would take it more than minutes.
    """
    settings = replace(settings, actors=ActorPlan(1, 1, float(usable_cpus()), 0.0))
    chunks = itertools.chain.from_iterable(
        read_group(
            one_unit(name, unit), reading=reading, settings=settings, tokenize=workers.tokenize
        )
        for name, unit in units.items()
    )
    first = next(chunks, None)
    if first is None:
        return True
    actor = ChunkActor(settings, workers)
    tokenized = made_ahead(map(actor.tokenized, itertools.chain([first], chunks)))
    began, done = time.monotonic(), 0
    with contextlib.closing(tokenized):
        for chunk in tokenized:
            for row in actor.encoder(chunk).to_pylist():
                yield Chunk(**row)
                done += row["expected"]
            spent = time.monotonic() - began
            is_much = (tokens - done) * spent > done * _MOST_SECONDS_HERE
            if spent >= _TRIAL_SECONDS and is_much:
                return False
    return True


def encode_chunks(
    settings: EncodeSettings,
    reading: ReadSettings,
    workers: Workers,
    units: Mapping[str, Any],
    *,
    most_actors: int,
) -> Generator[Chunk, None, None]:
    """Read and encode groups of shards on Ray Data; yields their chunks as they finish.

    With ``most_actors`` 0 there is nothing to encode, and no actor starts.
    """
    need_ray()
    plan = settings.actors
    where = OFF_HEAD if plan.gpus else None  # beside the accelerators too
    context = ray.data.DataContext.get_current()
    block_bytes, context.target_max_block_size = context.target_max_block_size, 1
    try:  # a chunk is a block: none waits for its neighbours to fill one
        tokens = unit_dataset(units).map_batches(
            functools.partial(
                read_group, reading=reading, settings=settings, tokenize=workers.tokenize
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=plan.tokenizers),
            num_cpus=TOKENIZE_CPUS,
            label_selector=where,
        )
        vectors = (
            tokens
            if not most_actors
            else tokens.map_batches(
                ChunkActor,
                fn_constructor_args=(settings, workers),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=min(plan.smallest, most_actors),
                    max_size=min(plan.largest, most_actors),
                ),
                num_cpus=plan.cpus,
                num_gpus=plan.gpus or None,
                label_selector=where,
            )
        )
        for row in vectors.iter_rows():
            yield Chunk(**row)
    finally:
        context.target_max_block_size = block_bytes
