"""Small corpora of topics and nights over them, without a model."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import trivial_workers
from trivial_workers import tokens_of, topic_vector_of

from pipelines.nightly.config import NightConfig
from pipelines.nightly.job import reindex
from pipelines.store.store import Store

TOPICS = "abcde"
WORKERS = trivial_workers.TOPIC_WORKERS


def text_of(number: int, topic: str | None = None, version: int = 0) -> str:
    topic = topic or TOPICS[number % len(TOPICS)]
    return f"{topic}{topic}{topic} text {number} {version} of topic{topic}"


def write_corpus(path: Path, texts: dict, labels: dict | None = None) -> str:
    columns = {"id": list(texts), "text": list(texts.values())}
    if labels is not None:
        columns["label"] = [labels[row_id] for row_id in texts]
    path.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), path / "part.parquet", row_group_size=100)
    return str(path)


def config_for(corpus: str, store: str, model: Path | str, **settings) -> NightConfig:
    given = {
        "num_clusters": "5",
        "dtype": "float32",
        "map_documents": 10,
        "num_actors": "1",
        "max_deleted": 0.5,
        **settings,
    }
    return NightConfig(corpus=corpus, store=str(store), model=str(model), **given)


def night(corpus: str, store: str, model: Path | str, **settings):
    return reindex(config_for(corpus, store, model, **settings))


def rows_of(store: str, number: int | None = None) -> dict:
    """Every document of a version by id, vectors as bytes."""
    version = Store.open(str(store)).version(number)
    rows = {}
    for batch in version.batches():
        for row in batch.to_pylist():
            row["embedding"] = np.array(row["embedding"], np.float32)
            assert row["id"] not in rows
            rows[row["id"]] = row
    return rows


def check_rows(store: str, texts: dict, number: int | None = None) -> dict:
    """A version holds exactly these texts, each with its vector and the nearest centroid's id."""
    rows = rows_of(store, number)
    assert rows.keys() == texts.keys()
    prompt = prompt_of(store, number)
    centroids = centroids_of(store, number)
    ids = np.array(list(centroids))
    points = np.stack(list(centroids.values())).astype(np.float64)
    for row_id, text in texts.items():
        row = rows[row_id]
        assert row["text"] == text
        assert row["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert np.array_equal(row["embedding"], topic_vector_of(tokens_of(text), prompt))
        distances = np.linalg.norm(points - row["embedding"], axis=1)
        assert row["distance"] == np.float32(distances.min()) or np.isclose(
            row["distance"], distances.min(), atol=1e-5
        )
        assert np.isclose(distances[ids == row["cluster_id"]][0], distances.min(), atol=1e-5)
    return rows


def prompt_of(store: str, number: int | None = None) -> str:
    """The prompt of the encoder whose vectors a version holds."""
    return Store.open(str(store)).version(number).read_json("encoder.json")["prompt"]


def centroids_of(store: str, number: int | None = None) -> dict[int, np.ndarray]:
    version = Store.open(str(store)).version(number)
    table = pq.read_table(pa.BufferReader(version.read("centroids.parquet")))
    pairs = zip(table["cluster_id"].to_pylist(), table["centroid"].to_pylist(), strict=True)
    return {row_id: np.array(values, dtype=np.float32) for row_id, values in pairs}


def lineage_of(store: str, number: int | None = None) -> list[dict]:
    version = Store.open(str(store)).version(number)
    return pq.read_table(pa.BufferReader(version.read("lineage.parquet"))).to_pylist()
