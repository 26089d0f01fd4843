"""Every invariant of a store, checked by reading it whole; nothing is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.encoder.description import EncoderDescription
from pipelines.runtime.arrow import column_to_vectors, fingerprint_of
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import exists, first_line, join, read_bytes
from pipelines.runtime.tables import PUBLISHED
from pipelines.store.columns import EMBEDDING, OWN_COLUMNS
from pipelines.store.edits import (
    active_edits,
    entry_of,
    home_of,
    known_edits,
    merged_into,
    pinned_rows,
    read_applied,
    read_edits,
)
from pipelines.store.index import LEAST_RECALL
from pipelines.store.records import VERSION_TAG, read_record, sealed_numbers
from pipelines.store.store import Store
from pipelines.store.version import Version

_UNIT_TOLERANCE = {"float": 1e-3, "halffloat": 5e-3}


def verify_store(store: Store) -> list[str]:
    """The problems found, one line each; none where the store is sound."""
    problems = list(_check_tags(store))
    for number in sealed_numbers(store.uri):
        try:
            version = store.version(number)
        except (FileNotFoundError, InputError, OSError, KeyError, TypeError) as error:
            problems.append(f"version {number} cannot be opened: {first_line(error)}")
            continue
        problems += [f"version {number}: {problem}" for problem in verify_version(version)]
    return problems


def verify_version(version: Version) -> list[str]:
    """The problems of one version."""
    checks = (
        _check_record,
        _check_artifacts,
        _check_encoder,
        _check_index,
        _check_documents,
        _check_clusters,
        _check_roll_up,
        _check_lineage,
        _check_edits,
    )
    problems: list[str] = []
    for check in checks:
        try:
            problems += check(version)
        except (OSError, ValueError) as error:
            problems.append(f"it cannot be read: {first_line(error)}")
    return problems


def _check_tags(store: Store) -> Iterator[str]:
    """The tag names a sealed version, and every sealed version is safe from cleaning."""
    sealed = sealed_numbers(store.uri)
    tags = store.lance_tags()
    for number in sealed:
        if f"{VERSION_TAG}{number}" not in tags:
            yield f"version {number} has no tag: cleaning would remove its documents"
        elif tags[f"{VERSION_TAG}{number}"] != read_record(store.uri, number).lance_version:
            yield f"tag '{VERSION_TAG}{number}' names other documents than the version's record"
    numbers = {tags[f"{VERSION_TAG}{n}"]: n for n in sealed if f"{VERSION_TAG}{n}" in tags}
    for name, lance_version in tags.items():
        if not name.startswith(VERSION_TAG) and lance_version not in numbers:
            yield f"tag {name!r} names Lance version {lance_version}, which belongs to no version"
    publications = store.publications()
    if PUBLISHED in tags and tags[PUBLISHED] in numbers:
        current = numbers[tags[PUBLISHED]]
        # a crash may leave the last move of the tag recorded and not made
        last = [*publications[-1:], None]
        if last[0] is None or current not in (last[0].version, last[0].previous):
            told = "none" if last[0] is None else str(last[0].version)
            yield f"version {current} is published, the last publication recorded is of {told}"


def _check_record(version: Version) -> Iterator[str]:
    """The record, the documents and the encoder agree about the version."""
    record, documents = version.record, version.documents
    if documents.number != record.version:
        yield f"its documents say that they are version {documents.number}"
    rows = documents.count()
    told = record.counts.get("passages", record.counts.get("documents"))
    if rows != told:
        yield f"it has {rows} documents, its record says {told}"
    if fingerprint_of(documents.schema) != record.fingerprint:
        yield "its documents name another encoder than its record"
    try:
        documents.check()
    except (ValueError, OSError) as error:
        yield f"Lance finds its files unsound: {first_line(error)}"
    if record.base is not None and record.base >= record.version:
        yield f"it claims to be built from version {record.base}"


def _check_artifacts(version: Version) -> Iterator[str]:
    """Every artifact is there, as long as it was and unchanged."""
    for name, artifact in version.record.artifacts.items():
        try:
            data = read_bytes(join(version.store, artifact.path))
        except FileNotFoundError:
            yield f"artifact {name} is missing ({artifact.path})"
            continue
        if len(data) != artifact.bytes or hashlib.sha256(data).hexdigest() != artifact.sha256:
            yield f"artifact {name} was changed ({artifact.path})"


def _check_encoder(version: Version) -> Iterator[str]:
    """The encoder that comes with the version is the one of its vectors."""
    try:
        encoder = _encoder_of(version)
    except (InputError, ValueError, KeyError) as error:
        yield f"encoder.json cannot be read: {first_line(error)}"
        return
    if encoder is not None and encoder.fingerprint != version.record.fingerprint:
        yield "encoder.json is of another encoder than its vectors"


def _encoder_of(version: Version) -> EncoderDescription | None:
    """The version's encoder; None where the file is missing, which another check tells."""
    name = "encoder.json"
    if name not in version.record.artifacts or not exists(version.path(name)):
        return None
    return EncoderDescription.from_json(version.read_json(name))


def _check_index(version: Version) -> Iterator[str]:
    """The index holds every document, and its measured recall is enough."""
    report = version.record.index
    held = version.documents.index_rows()
    if report is None or report["kind"] == "exact":
        return
    if held is None:
        yield "its record speaks of a vector index, and there is none"
    elif held[1]:
        yield f"its vector index lacks {held[1]} of {sum(held)} documents"
    if report["recall_at_10"] < LEAST_RECALL:
        yield f"its vector index has recall {report['recall_at_10']}, required is {LEAST_RECALL}"


def _check_documents(version: Version) -> Iterator[str]:
    """Unique ids, hashes of their texts, finite vectors, of length 1 where so made."""
    digests = []
    wrong = {"hash": 0, "vector": 0, "length": 0}
    nulls = dict.fromkeys(("id", "text_sha256", EMBEDDING, *OWN_COLUMNS), 0)
    normalized = _is_normalized(version)
    tolerance = _UNIT_TOLERANCE.get(str(version.schema.field(EMBEDDING).type.value_type), 1e-3)
    for batch in version.batches([*nulls, "text"]):
        for name in nulls:
            nulls[name] += batch.column(name).null_count
        digests.append(_id_digests(batch.column("id")))
        wrong["hash"] += _wrong_hashes(batch)
        vectors = column_to_vectors(batch.column(EMBEDDING))
        finite = np.isfinite(vectors).all(axis=1)
        wrong["vector"] += int(np.count_nonzero(~finite))
        if normalized:
            lengths = np.linalg.norm(vectors[finite], axis=1)
            wrong["length"] += int(np.count_nonzero(np.abs(lengths - 1) > tolerance))
    yield from (f"{count} documents have no {name}" for name, count in nulls.items() if count)
    if digests and len(np.unique(np.concatenate(digests))) < sum(map(len, digests)):
        yield "an id is there more than once"
    if wrong["hash"]:
        yield f"{wrong['hash']} documents have a text_sha256 that is not their text's"
    if wrong["vector"]:
        yield f"{wrong['vector']} vectors hold numbers that are not finite"
    if wrong["length"]:
        yield f"{wrong['length']} vectors are not of length 1, as the encoder makes them"


def _id_digests(ids: pa.Array) -> np.ndarray:
    """16 bytes an id: what is kept of ids while looking for repeated ones."""
    texts = ids.cast(pa.string()).to_pylist()
    joined = b"".join(hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts)
    return np.frombuffer(joined, dtype=[("first", "<u8"), ("second", "<u8")])


def _wrong_hashes(batch: pa.RecordBatch) -> int:
    """Documents whose hash is not their text's; a text that was not kept cannot tell."""
    pairs = zip(
        batch.column("text").to_pylist(), batch.column("text_sha256").to_pylist(), strict=True
    )
    return sum(
        hashlib.sha256(text.encode()).hexdigest() != digest
        for text, digest in pairs
        if text is not None
    )


def _is_normalized(version: Version) -> bool:
    try:
        encoder = _encoder_of(version)
    except (InputError, ValueError, KeyError):
        return False  # told by _check_encoder
    return encoder is not None and encoder.normalize


def _check_clusters(version: Version) -> Iterator[str]:
    """Every cluster of a document has a centroid, whose size is the number of its documents."""
    name = "centroids.parquet"
    if name not in version.record.artifacts or not exists(version.path(name)):
        return
    centroids = version.read_table(name)
    counts: dict[int, int] = dict.fromkeys(centroids["cluster_id"].to_pylist(), 0)
    for batch in version.batches(["cluster_id"]):
        for entry in pc.value_counts(batch.column("cluster_id").drop_null()).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    known = set(centroids["cluster_id"].to_pylist())
    strange = sorted(set(counts) - known)
    if strange:
        yield f"documents are in clusters without a centroid: {strange[:5]}"
    if "size" in centroids.column_names:
        sizes = dict.fromkeys(counts, 0)  # a cluster that people merged has several centroids
        for cluster, size in zip(centroids["cluster_id"].to_pylist(), centroids["size"].to_pylist(),
                                 strict=True):  # fmt: skip
            sizes[cluster] += size
        off = [cluster for cluster, size in sizes.items() if counts[cluster] != size]
        if off:
            yield f"clusters {off[:5]} have another number of documents than centroids.parquet says"
    if centroids["centroid"].type.list_size != version.schema.field(EMBEDDING).type.list_size:
        yield "centroids and vectors differ in length"


def _check_roll_up(version: Version) -> Iterator[str]:
    """Every passage is counted in its document's row."""
    name, counts = "documents.parquet", version.record.counts
    if name not in version.record.artifacts or not exists(version.path(name)):
        return
    table = version.read_table(name)
    found = len(table), pc.sum(table["passages"]).as_py() or 0
    told = counts.get("documents"), counts.get("passages")
    if found != told:
        there = f"{found[0]} documents of {found[1]} passages"
        yield f"{name} has {there}, the version {told[0]} of {told[1]}"


def _check_lineage(version: Version) -> Iterator[str]:
    """The events since the first night lead to the clusters that there are."""
    if not {"lineage.parquet", "centroids.parquet"} <= set(version.record.artifacts):
        return
    alive: set[int] = set()
    for event in _rows(version, "lineage.parquet"):
        cluster, what = event["cluster_id"], event["event"]
        begins = what in ("born", "split")
        if begins == (cluster in alive):
            yield f"its lineage has cluster {cluster} {what}{' again' if begins else ', not there'}"
        if begins:
            alive.add(cluster)
        elif what in ("died", "merged"):
            alive.discard(cluster)
    there = {row["cluster_id"] for row in _rows(version, "centroids.parquet")}
    if alive != there:
        yield f"its lineage leads to other clusters than it has: {sorted(alive ^ there)[:5]}"


def _check_edits(version: Version) -> Iterator[str]:
    """The journal says what the version says of people's edits, and its clusters are so."""
    edits = read_edits(version.store)
    journal = [edit for edit in edits if edit.number <= known_edits(version)]
    told = {row["edit"]: row for row in read_applied(version).to_pylist()}
    said = {edit.number: edit for edit in journal if edit.action != "undo"}
    for number in sorted(told.keys() | said.keys()):
        if number not in told:
            yield f"edits.parquet lacks edit {number} of the journal"
        elif number not in said or any(
            told[number].get(name, value) != value for name, value in entry_of(said[number]).items()
        ):
            yield f"edits.parquet speaks of edit {number}, of which the journal says otherwise"
    active = active_edits(journal)
    holds = {edit.number for edit in active}
    for number in told.keys() & said.keys():
        if (told[number]["status"] == "undone") == (number in holds):
            yield f"edit {number} is {told[number]['status']}, the journal says otherwise"
    applied = [row for row in told.values() if row["status"] == "applied"]
    yield from _check_applied(version, applied, merged_into(active))


def _check_applied(
    version: Version, applied: Sequence[Mapping[str, Any]], merged: Mapping[int, int]
) -> Iterator[str]:
    """Clusters and documents are as the edits have it that were applied; ``merged`` by people."""
    parts, names = {}, {}
    if "centroids.parquet" in version.record.artifacts:
        rows = _rows(version, "centroids.parquet")
        parts = {row.get("part_id", row["cluster_id"]): row["cluster_id"] for row in rows}
    if "clusters.parquet" in version.record.artifacts:
        names = {row["cluster_id"]: row["name"] for row in _rows(version, "clusters.parquet")}
    pins = pinned_rows(
        [r["document_id"] for r in applied if r["action"] == "pin"], version.documents
    )
    placed = version.take([i for rows in pins.values() for i in rows], ["id", "cluster_id"])
    cluster_of = dict(zip(*(placed[n].to_pylist() for n in ("id", "cluster_id")), strict=True))
    for row in applied:
        number, clusters, action = row["edit"], row["cluster_ids"], row["action"]
        homes = [home_of(cluster, merged, parts) for cluster in clusters]
        are_one = len(homes) == 2 and homes[0] == homes[1] and homes[0] is not None
        if action == "name" and names.get(clusters[0]) != row["text"]:
            yield f"cluster {clusters[0]} is not named as edit {number} says"
        if action == "merge" and not are_one:
            yield f"cluster {clusters[1]} is not part of another, as edit {number} says"
        if action == "forbid" and are_one:
            yield f"clusters {clusters} are one, though edit {number} keeps them apart"
        if action == "pin" and {cluster_of[i] for i in pins[row["document_id"]]} != {*homes}:
            yield f"document {row['document_id']!r} is not where edit {number} put it"


def _rows(version: Version, name: str) -> list[dict[str, Any]]:
    return version.read_table(name).to_pylist()
