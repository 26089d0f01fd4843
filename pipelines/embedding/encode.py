"""Chunks of texts to chunks of vectors: tokenizer tasks feed a pool of encoder actors.

In: ``texts/`` with a segment a chunk. Out: ``vectors/CHUNK.arrow``, one row a text in the chunk's
order, null where a text's vector was not finite. The two kinds of workers overlap and scale
apart: tokens of the next chunks wait in Ray's object store while the actors compute.

No torch here: what the workers run comes from :mod:`pipelines.embedding.encode`.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.util.metrics import Counter, Gauge

from pipelines.embedding.keys import Chunk
from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, list_files, make_folder, read_bytes, write_bytes
from pipelines.runtime.machines import OFF_HEAD, TOKENIZE_CPUS, ActorPlan
from pipelines.runtime.segments import bytes_to_table, read_segment, table_to_bytes
from pipelines.runtime.units import Loaded, blame, not_shared, take_unit, unit_dataset

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
_ADAPTER_EFFECT = "adapter_effect.json"


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

    def add(self, chunk: Mapping[str, Any], expected_tokens: int) -> None:
        """Count a finished chunk, whose work was estimated at ``expected_tokens``."""
        self.texts += chunk["texts"]
        self.tokens += chunk["tokens"]
        self.padded_tokens += chunk["padded_tokens"]
        self.rejected += chunk["failed"]
        self.done_tokens += expected_tokens
        if self._first_seconds is None:
            self._first_seconds = time.monotonic() - self._started
        for metric, name in (
            (self._texts_metric, "texts"),
            (self._tokens_metric, "tokens"),
            (self._padded_metric, "padded_tokens"),
        ):
            if chunk[name]:
                metric.inc(chunk[name])
        self._left_metric.set(self.expected_texts - self.texts)
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
        """The state as one line."""
        seconds = max(1e-9, time.monotonic() - self._started)
        left = seconds * (self.expected_tokens / max(1, self.done_tokens) - 1)
        return (
            f"embed: {self.texts:,} of {self.expected_texts:,} texts"
            f" | {self.texts / seconds:,.1f} texts/s | {self.tokens / seconds:,.0f} tokens/s"
            f" | padding {padding_waste(self.tokens, self.padded_tokens):.1%}"
            f" | {self.rejected:,} rejected | {duration(max(0.0, left))} left"
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
        self.settings = settings
        self._loaded = Loaded(functools.partial(_load_encoder, settings))

    @property
    def encoder(self) -> Encoder:
        """The encoder; :class:`InputError` where it could not be loaded."""
        return self._loaded.get()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A chunk's name and tokens to what it was; its vectors go to their file."""
        name = batch["name"][0].as_py()
        with blame("embed", name):
            tokens = bytes_to_table(batch["tokens"][0].as_py())["tokens"].to_pylist()
            encoder = self.encoder
            stats = encoder.stats
            padded = stats.padded_tokens
            vectors, valid = self._encode(encoder, tokens)
            found = {
                "tokens": sum(map(len, tokens)),
                "padded_tokens": stats.padded_tokens - padded,
                "failed": int(len(valid) - valid.sum()),
            }
            write_vectors(self.settings.work, name, vectors, valid, found)
            row = {"name": name, "texts": len(tokens), **found}
            return pa.table({key: [value] for key, value in row.items()})

    def _encode(self, encoder: Encoder, tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (n, d) in the output's type, and which of them are finite, bool (n,)."""
        dtype = np.float16 if self.settings.float16 else np.float32
        vectors = np.zeros((len(tokens), encoder.dimension), dtype)
        some = [index for index, ids in enumerate(tokens) if ids]
        found = encoder.encode_tokens([tokens[index] for index in some])
        with np.errstate(over="ignore"):
            vectors[some] = found
        valid = np.zeros(len(tokens), dtype=bool)
        valid[some] = np.isfinite(vectors[some]).all(axis=1)
        return vectors, valid


def _load_encoder(settings: EncodeSettings) -> Encoder:
    started = time.monotonic()
    device = _pick_device(settings.actors.gpus)
    encoder = Encoder.load(
        _description(settings.encoder),
        device=device,
        threads=settings.actors.threads,
        compile_model=settings.compile_model,
    )
    log.info("encoder loaded on %s in %.1f s", device, time.monotonic() - started)
    if encoder.adapter_effect is not None:
        content = json.dumps(dict(encoder.adapter_effect))
        write_bytes(join(settings.work, _ADAPTER_EFFECT), content.encode())
    return encoder


def read_adapter_effect(work: str) -> dict[str, float] | None:
    """What an adapter was seen to do where an encoder was loaded; None where none was."""
    try:
        return json.loads(read_bytes(join(work, _ADAPTER_EFFECT)))
    except FileNotFoundError:
        return None


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


_METADATA = ("tokens", "padded_tokens", "failed")


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
    where = OFF_HEAD if plan.gpus else None  # beside the accelerators too
    units = {name: [chunk.partition, chunk.number] for name, chunk in chunks.items()}
    tokens = unit_dataset(units).map_batches(
        functools.partial(workers.tokenize, settings=settings),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=plan.tokenizers),
        num_cpus=TOKENIZE_CPUS,
        label_selector=where,
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
        label_selector=where,
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
