"""Small stores of made-up documents, without a model or Ray."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.encoder.description import EncoderDescription
from pipelines.store.columns import document_schema
from pipelines.store.documents import assign_fragment
from pipelines.store.store import Store

DIMENSION = 16
CLUSTERS = 3
FIRST_NIGHT = datetime(2026, 1, 1, 3, tzinfo=UTC)
CENTROIDS = np.eye(CLUSTERS, DIMENSION, dtype=np.float32)
ENCODER = EncoderDescription(
    model="made-up",
    model_revision="sha256:00",
    adapter=None,
    adapter_revision=None,
    prompt="{text}",
    pooling="last",
    layers=(2,),
    max_tokens=64,
    normalize=True,
    dtype="float32",
    append_eos=False,
    dimension=DIMENSION,
)
SCHEMA = document_schema(
    pa.string(), {"label": pa.string()}, DIMENSION, pa.float32(), ENCODER.fingerprint
)


def when(night: int) -> datetime:
    return FIRST_NIGHT + timedelta(days=night)


def vector_of(text: str, dimension: int = DIMENSION) -> np.ndarray:
    """float32 (d,), unit length, decided by the text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).normal(size=dimension).astype(np.float32)
    return vector / np.linalg.norm(vector)


def table_of(texts: dict, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Documents as an embedding job writes them; labels are the texts' first words."""
    field = schema.field("embedding")
    width = field.type.list_size
    vectors = [vector_of(text, width) for text in texts.values()]
    flat = pa.array(np.concatenate(vectors) if vectors else np.empty(0, np.float32))
    values = flat.cast(field.type.value_type)
    return pa.table(
        {
            "id": pa.array(list(texts), schema.field("id").type),
            "text": pa.array(list(texts.values()), pa.string()),
            "label": pa.array([text.split()[0] for text in texts.values()], pa.string()),
            "text_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts.values()],
            "embedding": pa.FixedSizeListArray.from_arrays(values, width),
        }
    )


def numbered(numbers, word: str = "first") -> dict:
    return {f"d{number}": f"{word} text {number}" for number in numbers}


def nearest(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distances = np.linalg.norm(vectors[:, None] - CENTROIDS[None, :, : vectors.shape[1]], axis=2)
    return distances.argmin(axis=1).astype(np.int32), distances.min(axis=1)


def centroids_of(candidate) -> pa.Table:
    sizes = [candidate.count(f"cluster_id = {number}") for number in range(CLUSTERS)]
    flat = pa.array(CENTROIDS.ravel())
    return pa.table(
        {
            "cluster_id": pa.array(range(CLUSTERS), pa.int32()),
            "size": pa.array(sizes, pa.int64()),
            "centroid": pa.FixedSizeListArray.from_arrays(flat, DIMENSION),
        }
    )


def finish(candidate, encoder=ENCODER, **settings):
    """Assignments, artifacts, index and record of a candidate whose documents are written."""
    candidate.set_assignments([assign_fragment(ref, nearest) for ref in candidate.fragments()])
    candidate.put("encoder.json", json.dumps(encoder.to_json()).encode())
    candidate.put_table("centroids.parquet", centroids_of(candidate))
    candidate.put("scores.json", b'{"imbalance": 0.1}')
    return candidate.seal(counts={"embedded": 1}, scores={"imbalance": 0.1}, **settings)


def publish_first(store: Store, folder: Path, texts: dict, schema=SCHEMA, encoder=ENCODER):
    """Publish the first version, written from two files."""
    files = write_files(folder, texts, schema)
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        candidate.replace(files, schema=schema, when=when(0))
        version = finish(candidate, encoder)
        store.publish(version.number, lease, expected=None)
    return version


def write_files(folder: Path, texts: dict, schema: pa.Schema = SCHEMA) -> list[str]:
    table = table_of(texts, schema)
    half = len(table) // 2
    files = []
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        path = folder / f"documents-{len(list(folder.glob('*')))}-{number}.parquet"
        pq.write_table(part, path)
        files.append(str(path))
    return files


def publish_night(store: Store, changed: dict, deleted=(), night: int = 1, **settings):
    """Publish a version with some documents changed, new or deleted."""
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        change(candidate, changed, deleted, night)
        version = finish(candidate, **settings)
        store.publish(version.number, lease, expected=candidate.base.number)
    return version


def change(candidate, changed: dict, deleted=(), night: int = 1) -> None:
    if changed:
        batches = table_of(changed, candidate.schema).to_batches()
        candidate.upsert(batches, schema=candidate.schema, when=when(night))
    if deleted:
        candidate.delete([pa.array(list(deleted), candidate.schema.field("id").type)])


def texts_of(version) -> dict:
    return {
        row["id"]: row["text"]
        for batch in version.batches(["id", "text"])
        for row in batch.to_pylist()
    }
