"""A question to a store: the nearest documents to a text, or to a document that it holds."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.encoder.description import EncoderDescription
from pipelines.runtime.arrow import column_to_vectors
from pipelines.runtime.command import Answer
from pipelines.runtime.errors import InputError
from pipelines.store.columns import EMBEDDING, PASSAGE_COLUMNS
from pipelines.store.config import SearchConfig
from pipelines.store.store import Store
from pipelines.store.version import Version

_TEXT_CHARACTERS = 300


def search_store(config: SearchConfig) -> Answer:
    """The nearest documents, best first, with text, cluster and score."""
    version = Store.open(config.store).version(config.version)
    if config.query:
        vector = embed_query(version, config.query, config.query_prompt)
        own = None
    else:
        vector, own = find_document(version, config.similar_to)
    if config.per_document and not _holds_passages(version):
        raise InputError(
            f"--per-document: version {version.number} holds whole documents, no passages"
        )
    version.load()
    started = time.perf_counter()
    hits = _best(config, version, vector, own)
    seconds = time.perf_counter() - started
    return _answer(config, version, hits, seconds)


def _holds_passages(version: Version) -> bool:
    return {*PASSAGE_COLUMNS} <= {*version.schema.names}


def _best(
    config: SearchConfig, version: Version, vector: np.ndarray, own_id: Any
) -> list[dict[str, Any]]:
    """The hits asked for, best first; ``own`` is the id of what they are to be like."""
    wanted = config.limit + (own_id is not None)
    condition = config.filter or None
    while True:
        if config.hybrid:
            table = version.search_hybrid(vector, config.query, wanted, filter=condition)
        else:
            table = version.search(vector, wanted, filter=condition, exact=config.exact)
        hits = table.to_pylist()
        others = [hit for hit in hits if own_id is None or hit["id"] != own_id]
        if not config.per_document:
            return others[: config.limit]
        best: dict[str, dict[str, Any]] = {}
        for hit in others:  # the id of a passage is its document's, # and its number
            best.setdefault(hit["id"].rpartition("#")[0], hit)
        if own_id is not None:
            best.pop(own_id.rpartition("#")[0], None)
        if len(best) >= config.limit or len(hits) < wanted:
            return list(best.values())[: config.limit]
        wanted *= 4


def embed_query(version: Version, text: str, prompt: str = "") -> np.ndarray:
    """float32 (d,): the vector of a text by the encoder whose vectors the version holds.

    Raises :class:`InputError` where that encoder cannot be had here.
    """
    if "encoder.json" not in version.record.artifacts:
        raise InputError(
            f"version {version.number} of {version.store} has no encoder.json: its vectors were "
            "made elsewhere, so only --similar-to can be searched for"
        )
    description = EncoderDescription.from_json(version.read_json("encoder.json"))
    if description.fingerprint != version.record.fingerprint:
        raise InputError(
            f"version {version.number}: encoder.json is of another encoder than its vectors; "
            "`manage_store.py verify` says more"
        )
    from pipelines.encoder.encoder import Encoder  # torch, which other verbs do without

    description = description.for_queries(prompt or None)
    device = "cpu" if description.dtype == "int8" else "auto"
    return Encoder.load(description, device=device).encode([text])[0]


def find_document(version: Version, wanted: str) -> tuple[np.ndarray, Any]:
    """The vector, float32 (d,), of a document and its id, in the id's own type.

    Raises :class:`InputError` for an id that there is not, and for a vector of zeros.
    """
    kind = version.schema.field("id").type
    own: Any = wanted
    if pa.types.is_integer(kind):
        try:
            own = int(wanted)
        except ValueError as error:
            raise InputError(f"--similar-to {wanted!r}: the store's ids are integers") from error
    table = version.take([own], ["id", EMBEDDING])
    if not len(table):
        raise InputError(f"version {version.number} has no document with id {wanted!r}")
    vector = column_to_vectors(table[EMBEDDING])[0]
    if not vector.any():
        raise InputError(
            f"document {wanted!r} of version {version.number} has a vector of zeros: search goes "
            "by cosine, and zeros have no direction, so nothing is similar to it. Name another"
        )
    return vector, own


def _answer(
    config: SearchConfig, version: Version, hits: list[dict[str, Any]], seconds: float
) -> Answer:
    title = f"{config.store}: version {version.number}, {len(hits)} hits in {seconds * 1000:.1f} ms"
    notes = [title] if config.json else []
    columns = ("score", "document" if _holds_passages(version) else "id", "cluster", "text")
    if config.group_by == "none":
        return Answer(
            hits, title, columns, [_row(hit, str(hit["cluster_id"])) for hit in hits], notes
        )
    names = cluster_names(version)
    groups: dict[int, dict[str, Any]] = {}
    for hit in hits:
        cluster = hit["cluster_id"]
        group = {"cluster_id": cluster, "name": names.get(cluster), "hits": []}
        groups.setdefault(cluster, group)["hits"].append(hit)
    rows = [
        _row(hit, f"{cluster} {group['name'] or ''}".strip() if hit is group["hits"][0] else "")
        for cluster, group in groups.items()
        for hit in group["hits"]
    ]
    return Answer(list(groups.values()), title, columns, rows, notes)


def cluster_names(version: Version) -> dict[int, str]:
    """The names of a version's clusters; none where it has no ``clusters.parquet``."""
    if "clusters.parquet" not in version.record.artifacts:
        return {}
    table = version.read_table("clusters.parquet")
    return dict(zip(table["cluster_id"].to_pylist(), table["name"].to_pylist(), strict=True))


def _row(hit: dict[str, Any], cluster: str) -> list[str]:
    where = str(hit["id"])
    if {*PASSAGE_COLUMNS} <= hit.keys():
        document, number, start, stop = (hit[name] for name in PASSAGE_COLUMNS)
        where = f"{document}, passage {number}: {start:,} to {stop:,}"
    return [f"{hit['score']:.4f}", where, cluster, _shorten(hit["text"])]


def _shorten(text: str | None) -> str:
    words = " ".join((text or "").split())
    return words if len(words) <= _TEXT_CHARACTERS else words[: _TEXT_CHARACTERS - 1] + "…"
