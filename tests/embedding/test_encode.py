"""Where a chunk is tokenized."""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipelines.embedding import encode
from pipelines.embedding.chunks import chunk_row, documents_of
from pipelines.embedding.encode import ChunkActor, Workers, read_group, with_tokens
from pipelines.runtime.machines import ActorPlan

TEXTS = ["a", "bcd"]


def tokenize(batch, *, settings):
    return with_tokens(batch, [list(t.encode()) for t in documents_of(batch)["text"].to_pylist()])


class Reached:
    """What arrives at the encoder."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, batch):
        return documents_of(batch)


@pytest.mark.parametrize(("gpus", "tokenized_by_reader"), [(0.0, False), (1.0, True)])
def test_readers_tokenize_for_gpus_and_actors_on_cpus_for_themselves(
    monkeypatch, gpus, tokenized_by_reader
):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    settings = SimpleNamespace(actors=ActorPlan(1, 1, 2.0, gpus))
    chunk = chunk_row("0-0", 4, pa.table({"id": ["x", "y"], "text": TEXTS}))
    monkeypatch.setattr(encode, "read_chunks", lambda batch, settings: [chunk])
    group = pa.table({"name": ["0"], "unit": ["{}"]})
    (read,) = read_group(group, reading=None, settings=settings, tokenize=tokenize)
    assert ("tokens" in documents_of(read).column_names) == tokenized_by_reader
    reached = ChunkActor(settings, Workers(tokenize, Reached))(read)
    assert reached["tokens"].to_pylist() == [[97], [98, 99, 100]]
    assert reached.column_names == ["id", "tokens"]
