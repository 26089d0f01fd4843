"""What a run would do and how long it would take: counted where cheap, measured on a sample."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray

from pipelines.corpus.documents import check_text
from pipelines.corpus.files import Columns, CorpusFile
from pipelines.corpus.passages import Cutter
from pipelines.corpus.readers import read_shard
from pipelines.embedding.progress import duration
from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.machines import ActorPlan, is_ray_put_off

SAMPLE_FILES = 8
SAMPLE_TEXTS_A_FILE = 32
MEASURE_SECONDS = 5.0
_MEASURED_TEXTS = 16


@dataclass(frozen=True)
class Estimate:
    """A plan in figures; seconds are those of embedding, start-up included."""

    files: int
    documents: int
    tokens: int
    tokens_per_second: float
    seconds: float
    passages: int | None = None
    """None where documents are not cut."""

    @property
    def texts(self) -> int:
        """What is encoded: passages, or whole documents."""
        return self.documents if self.passages is None else self.passages


def estimate_run(
    files: Sequence[CorpusFile],
    columns: Columns,
    description: EncoderDescription,
    actors: ActorPlan,
    cut: Cutter | None = None,
) -> Estimate:
    """Estimate a run from a sample of its documents; encodes some of them as an actor would.

    ``cut`` cuts them into passages.
    """
    tokenizer = PromptedTokenizer.load(description)
    readable = [file for file in files if not file.problem]
    sampled = readable[:: max(1, len(readable) // SAMPLE_FILES)][:SAMPLE_FILES]
    texts: list[str] = []
    text_bytes = 0
    for file in sampled:
        for text, size in itertools.islice(_texts_of(file, columns), SAMPLE_TEXTS_A_FILE):
            texts.append(tokenizer.clip(text) if cut is None else text)
            text_bytes += size
    row_bytes = text_bytes / max(1, len(texts))
    documents = sum(
        file.rows if file.rows is not None else round(file.text_bytes / max(1.0, row_bytes))
        for file in readable
    )
    sampled_documents = max(1, len(texts))
    if cut is not None:
        pairs = zip(texts, cut(texts), strict=True)
        texts = [text[a:b] for text, places in pairs for a, b in places.tolist()]
    passages = None if cut is None else round(documents * len(texts) / sampled_documents)
    tokens = round(documents * sum(map(len, tokenizer.tokenize(texts))) / sampled_documents)
    load_seconds, speed = 0.0, 1.0
    if texts and is_ray_put_off():
        load_seconds, speed = measure_encoder(description, actors, texts)
    elif texts:
        measure = ray.remote(num_cpus=actors.cpus, num_gpus=actors.gpus)(measure_encoder)
        load_seconds, speed = ray.get(measure.remote(description, actors, texts))
    seconds = load_seconds + tokens / (speed * actors.largest)
    return Estimate(len(files), documents, tokens, speed, seconds, passages)


def measure_encoder(
    description: EncoderDescription, actors: ActorPlan, texts: Sequence[str]
) -> tuple[float, float]:
    """Seconds to load the encoder, and tokens a second of one actor on these texts."""
    started = time.monotonic()
    device = "auto" if actors.gpus else "cpu"
    encoder = Encoder.load(description, device=device, threads=actors.threads)
    encoder.encode(list(texts[:1]))
    loaded = time.monotonic()
    encoder.stats.tokens = 0
    for start in itertools.count(0, _MEASURED_TEXTS):
        some = [texts[n % len(texts)] for n in range(start, start + _MEASURED_TEXTS)]
        encoder.encode(some)
        if time.monotonic() - loaded > MEASURE_SECONDS:
            break
    return loaded - started, encoder.stats.tokens / (time.monotonic() - loaded)


def estimate_table(estimate: Estimate, actors: ActorPlan, output: str) -> dict[str, str]:
    """An estimate as the table that a person sees."""
    cut = estimate.passages is not None
    return {
        "files": f"{estimate.files:,}",
        "documents": f"about {estimate.documents:,}",
        **({"passages": f"about {estimate.passages:,}"} if cut else {}),
        "tokens": f"about {estimate.tokens:,}, prompts included",
        "actors": str(actors),
        "tokens a second": f"{estimate.tokens_per_second:,.0f} an actor, measured on a sample",
        "time": f"about {duration(estimate.seconds)}",
        "output": f"{output} (dry run: nothing was written)",
    }


def _texts_of(file: CorpusFile, columns: Columns) -> Iterator[tuple[str, int]]:
    """The good texts of a file's first shard, each with the size of its row."""
    for batch in itertools.chain.from_iterable(
        read_shard(shard, columns) for shard in file.shards()[:1]
    ):
        size = batch.size_bytes // max(1, len(batch.texts))
        for found in batch.texts:
            text, _, reason = check_text(found)
            if reason is None:
                yield text, size
