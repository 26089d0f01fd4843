"""The corpus compared with the version before, by id and text hash; no process sees all ids.

First by partitions of texts, where a document that has not changed meets its own key: what is left
on either side is new, changed or gone. Then by partitions of ids, where those three are told
apart. Out, under the work folder: ``changes/NAME.deleted`` (ids) and ``retouched/NAME.arrow``
(documents whose text is the same but not their kept columns).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.kept_columns import json_to_values
from pipelines.embedding.encode import read_vectors
from pipelines.embedding.keys import Selected, digest_matrix, fill_ids, partition_of, split_by
from pipelines.nightly.reuse import Leftover
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import in_threads, join, make_folder, read_bytes, write_bytes
from pipelines.runtime.segments import (
    bytes_to_table,
    read_segment,
    table_to_bytes,
    write_segments,
)
from pipelines.runtime.units import Receipt, run_stage
from pipelines.store.documents import FragmentRef, read_fragment
from pipelines.store.version import Version

STAGE = "known"
KEYS = pa.schema(
    [
        ("text_sha256", pa.binary(32)),
        ("id", pa.large_string()),
        ("kept", pa.binary(16)),
        ("base", pa.bool_()),
        ("version", pa.int64()),
        ("work", pa.large_string()),
        ("chunk", pa.large_string()),
        ("row", pa.int64()),
    ]
)
"""A document of the version before (``base``), or the place of a text's vector, or both.

``version`` and ``id`` are where the vector is in the store, null where it must not be used;
``work``, ``chunk`` and ``row`` where it is in the work of another night. ``kept`` is a digest of
the kept columns.
"""


@dataclass(frozen=True)
class KnownSettings:
    """What every task has to know beside its part."""

    work: str
    partitions: int
    kept: tuple[str, ...]

    def path(self, name: str) -> str:
        """The file of one task."""
        return join(self.work, STAGE, f"{name}.keys")


def collect_known(
    settings: KnownSettings,
    base: Version | None,
    others: Sequence[Version],
    leftovers: Sequence[Leftover],
    *,
    same_encoder: bool,
) -> list[str]:
    """Write the keys of all that is known; names of the files.

    Args:
        settings: as every task needs them.
        base: the version that the corpus is compared with, if any.
        others: versions that only vectors are taken from.
        leftovers: unfinished nights of the same encoder.
        same_encoder: whether vectors of ``base`` may be used.
    """
    units: dict[str, Any] = {}
    compared = [] if base is None else [(base, same_encoder)]
    for version, usable in [*compared, *((other, True) for other in others)]:
        for ref in version.fragments():
            units[f"version-{version.number}-{ref.fragment:06d}"] = {
                "ref": asdict(ref),
                "version": version.number if usable else None,
                "base": version is base,
            }
    for number, leftover in enumerate(leftovers):
        for partition, chunks in leftover.chunks.items():
            units[f"work-{number}-{partition}"] = {"work": leftover.work, "chunks": chunks}
    run_stage(settings.work, STAGE, units, _WriteKeys(settings))
    return list(units)


def read_known(settings: KnownSettings, names: Sequence[str], partition: int) -> pa.Table:
    """All keys of one partition, those of the base first."""
    tables = in_threads(lambda name: read_segment(settings.path(name), partition), list(names))
    return pa.concat_tables([KEYS.empty_table(), *(t for t in tables if t is not None)])


def digest_rows(columns: Sequence[pa.ChunkedArray], rows: int) -> pa.Array:
    """A digest of each row of some columns."""
    if not columns:
        return pa.array([b"\0" * 16] * rows, pa.binary(16))
    values = zip(*(column.to_pylist() for column in columns), strict=True)
    return pa.array(
        [
            hashlib.blake2b(json.dumps(row, default=str).encode(), digest_size=16).digest()
            for row in values
        ],
        pa.binary(16),
    )


@dataclass(frozen=True)
class _WriteKeys:
    settings: KnownSettings

    def __call__(self, name: str, unit: dict[str, Any]) -> Receipt:
        found = _keys_of_work(name, unit) if "work" in unit else self._keys_of_store(unit)
        table = pa.concat_tables([KEYS.empty_table(), *found]).combine_chunks()
        partition = partition_of(digest_matrix(table["text_sha256"]), self.settings.partitions)
        write_segments(
            self.settings.path(name), split_by(table, partition, self.settings.partitions)
        )
        return {"rows": len(table)}

    def _keys_of_store(self, unit: dict[str, Any]) -> Iterator[pa.Table]:
        kept = self.settings.kept if unit["base"] else ()
        for batch in read_fragment(FragmentRef(**unit["ref"]), ["id", "text_sha256", *kept]):
            rows = batch.num_rows
            digests = [bytes.fromhex(value) for value in batch.column("text_sha256").to_pylist()]
            columns = [pa.chunked_array([batch.column(column)]) for column in kept]
            yield pa.table(
                {
                    "text_sha256": pa.array(digests, pa.binary(32)),
                    "id": batch.column("id").cast(pa.large_string()),
                    "kept": digest_rows(columns, rows) if kept else _nulls(rows, pa.binary(16)),
                    "base": pa.array([unit["base"]] * rows),
                    "version": pa.array([unit["version"]] * rows, pa.int64()),
                    "work": _nulls(rows, pa.large_string()),
                    "chunk": _nulls(rows, pa.large_string()),
                    "row": _nulls(rows, pa.int64()),
                },
                schema=KEYS,
            )


def _keys_of_work(name: str, unit: dict[str, Any]) -> Iterator[pa.Table]:
    partition = name.rsplit("-", 1)[1]
    for number in unit["chunks"]:
        chunk = f"{partition}-{number:05d}"
        texts = read_segment(join(unit["work"], "texts", f"{partition}.texts"), number)
        vectors, _ = read_vectors(unit["work"], chunk)
        if texts is None:
            continue
        rows = np.flatnonzero(vectors.is_valid().to_numpy(zero_copy_only=False))
        count = len(rows)
        yield pa.table(
            {
                "text_sha256": texts["text_sha256"].take(pa.array(rows)),
                "id": _nulls(count, pa.large_string()),
                "kept": _nulls(count, pa.binary(16)),
                "base": pa.array([False] * count, pa.bool_()),
                "version": _nulls(count, pa.int64()),
                "work": pa.array([unit["work"]] * count, pa.large_string()),
                "chunk": pa.array([chunk] * count, pa.large_string()),
                "row": pa.array(rows, pa.int64()),
            },
            schema=KEYS,
        )


def _nulls(count: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(count, kind)


_SIDES = ("fresh", "left")


@dataclass(frozen=True)
class Comparison:
    """What the tasks of both stages have to know beside their partition.

    ``names`` are the files of keys. ``base_types`` are the types of kept columns in the store, the
    text's not among them; ``json_columns`` those that come from the corpus as JSON text. With
    ``rewrite`` every document is written again, changed or not.
    """

    known: KnownSettings
    names: tuple[str, ...]
    base_types: dict[str, pa.DataType]
    json_columns: tuple[str, ...]
    rewrite: bool

    def path(self, *parts: str) -> str:
        """A path below the work folder."""
        return join(self.known.work, *parts)

    def select(self, name: str, number: int, documents: pa.Table | None) -> Selected:
        """The documents of a partition that have to be written, and where vectors are known."""
        keys = read_known(self.known, self.names, number)
        base = keys.filter(keys["base"]).combine_chunks()
        if documents is None:
            self._write_sides(name, pa.array([], pa.large_string()), base["id"].combine_chunks())
            return Selected(None)
        documents, repeats = _first_of_each_id(documents)
        place = pc.index_in(documents["id"], value_set=base["id"])
        same_text = _equal_at(documents["text_sha256"], base["text_sha256"], place)
        retouched = same_text & ~self._equal_kept(documents, base, place, same_text)
        matched = pa.array(place.to_numpy(zero_copy_only=False)[same_text].astype(np.int64))
        left = np.setdiff1d(np.arange(len(base)), matched.to_numpy())
        fresh = documents.filter(pa.array(~same_text))
        self._write_sides(
            name, fresh["id"].combine_chunks(), base["id"].combine_chunks().take(pa.array(left))
        )
        if retouched.any() and not self.rewrite:
            self._write_retouched(name, documents.filter(pa.array(retouched)))
        counts = {
            "unchanged": int((same_text & ~retouched).sum()),
            "retouched": int(retouched.sum()),
            "repeats": repeats,
        }
        chosen = documents if self.rewrite else fresh
        return Selected(chosen if len(chosen) else None, _vector_places(keys), counts)

    def _equal_kept(
        self, documents: pa.Table, base: pa.Table, place: pa.Array, same_text: np.ndarray
    ) -> np.ndarray:
        """bool (n,): whether kept columns are as in the store, looked at where the text is."""
        equal = np.ones(len(documents), dtype=bool)
        if not self.base_types or not same_text.any():
            return equal
        rows = pa.array(np.flatnonzero(same_text))
        columns = list(self._kept_values(documents.take(rows)).values())
        found = _equal_at(
            pa.chunked_array([digest_rows(columns, len(rows))]), base["kept"], place.take(rows)
        )
        equal[rows.to_numpy()] = found
        return equal

    def _kept_values(self, documents: pa.Table) -> dict[str, pa.ChunkedArray]:
        """Kept columns with the types that they have in the store."""
        found = {}
        for name, kind in self.base_types.items():
            column = documents[f"kept.{name}"]
            try:
                if name in self.json_columns:
                    column = pa.chunked_array([json_to_values(column, kind)])
                found[name] = column.cast(kind)
            except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, TypeError) as error:
                raise InputError(
                    f"column {name!r} is {kind} in the store, and now holds something else "
                    f"({str(error).splitlines()[0]}): mend the corpus, or begin a new store"
                ) from error
        return found

    def _write_sides(self, name: str, fresh: pa.Array, left: pa.Array) -> None:
        for side, ids in zip(_SIDES, (fresh, left), strict=True):
            table = pa.table({"id": ids})
            parts = split_by(table, _partition_of_ids(ids, self.known.partitions), self.partitions)
            write_segments(self.path("compared", f"{name}.{side}"), parts)

    def _write_retouched(self, name: str, documents: pa.Table) -> None:
        table = pa.table({"id": documents["id"], **self._kept_values(documents)})
        write_bytes(self.path("retouched", f"{name}.arrow"), table_to_bytes(table))

    @property
    def partitions(self) -> int:
        """Number of partitions, of texts as of ids."""
        return self.known.partitions


def prepare_comparison(comparison: Comparison) -> None:
    """Make the folders that tasks write to."""
    for folder in ("compared", "retouched"):
        make_folder(comparison.path(folder))


def settle_ids(comparison: Comparison) -> dict[str, int]:
    """Tell new, changed and deleted documents apart; how many there are of each."""
    units = {f"{number:05d}": number for number in range(comparison.partitions)}
    receipts = run_stage(comparison.known.work, "changes", units, _SettleIds(comparison))
    return {
        kind: sum(receipt[kind] for receipt in receipts.values())
        for kind in ("new", "changed", "deleted")
    }


def deleted_ids(comparison: Comparison, id_type: pa.DataType) -> Iterator[pa.Array]:
    """Ids of the documents that the corpus no longer has, a partition at a time."""
    for number in range(comparison.partitions):
        table = bytes_to_table(read_bytes(comparison.path("changes", f"{number:05d}.deleted")))
        if len(table):
            yield table["id"].combine_chunks().cast(id_type)


def retouched_documents(comparison: Comparison, id_type: pa.DataType) -> Iterator[pa.Table]:
    """Id and kept columns of documents whose text is as it was, a partition at a time."""
    for number in range(comparison.partitions):
        try:
            data = read_bytes(comparison.path("retouched", f"{number:05d}.arrow"))
        except FileNotFoundError:
            continue
        table = bytes_to_table(data)
        yield table.set_column(0, "id", table["id"].cast(id_type))


def settled_types(
    found: Mapping[str, pa.DataType], stored: Mapping[str, pa.DataType]
) -> dict[str, pa.DataType]:
    """The types that kept columns have in the store, where the corpus's can become them.

    Raises :class:`InputError` where they cannot.
    """
    for name, kind in stored.items():
        if name in found and not _becomes(found[name], kind):
            raise InputError(
                f"column {name!r} is {found[name]} in the corpus and {kind} in the store: mend the "
                "corpus, or begin a new store"
            )
    return dict(stored)


def _becomes(found: pa.DataType, stored: pa.DataType) -> bool:
    strings = (pa.string(), pa.large_string())
    if found == stored or pa.types.is_null(found) or (found in strings and stored in strings):
        return True
    numbers = pa.types.is_integer(found) or pa.types.is_floating(found)
    return numbers and (pa.types.is_floating(stored) or pa.types.is_integer(stored))


@dataclass(frozen=True)
class _SettleIds:
    comparison: Comparison

    def __call__(self, name: str, unit: int) -> Receipt:
        fresh, left = (self._read(side, unit) for side in _SIDES)
        in_both = pc.is_in(left, value_set=fresh)
        deleted = left.filter(pc.invert(in_both))
        path = self.comparison.path("changes", f"{name}.deleted")
        write_bytes(path, table_to_bytes(pa.table({"id": deleted})), create_folder=False)
        changed = len(left) - len(deleted)
        return {"new": len(fresh) - changed, "changed": changed, "deleted": len(deleted)}

    def _read(self, side: str, unit: int) -> pa.Array:
        names = [f"{number:05d}.{side}" for number in range(self.comparison.partitions)]
        paths = [self.comparison.path("compared", name) for name in names]
        tables = in_threads(lambda path: read_segment(path, unit), paths)
        empty = pa.table({"id": pa.array([], pa.large_string())})
        return pa.concat_tables([empty, *(t for t in tables if t is not None)])[
            "id"
        ].combine_chunks()


def _first_of_each_id(documents: pa.Table) -> tuple[pa.Table, int]:
    """Documents with their ids filled in; of texts that are their own id, the first of each."""
    own = documents["id"].is_valid().to_numpy()
    documents = documents.set_column(
        documents.schema.get_field_index("id"), "id", pa.chunked_array([fill_ids(documents)])
    )
    if own.all():
        return documents, 0
    codes = pc.dictionary_encode(documents["id"].combine_chunks()).indices.to_numpy()
    first = np.zeros(len(documents), dtype=bool)
    first[np.unique(codes, return_index=True)[1]] = True
    keep = own | first
    return documents.filter(pa.array(keep)), int((~keep).sum())


def _equal_at(values: pa.ChunkedArray, others: pa.ChunkedArray, place: pa.Array) -> np.ndarray:
    """bool (n,): whether a value equals the one of ``others`` at its place; False without one."""
    place = place.combine_chunks() if isinstance(place, pa.ChunkedArray) else place
    there = others.combine_chunks().take(place)
    return pc.fill_null(pc.equal(values, there), False).to_numpy().astype(bool)


def _vector_places(keys: pa.Table) -> pa.Table:
    """Where the vector of a text is, each text once."""
    usable = keys.filter(pc.or_(pc.is_valid(keys["version"]), pc.is_valid(keys["work"])))
    codes = pc.dictionary_encode(usable["text_sha256"].combine_chunks()).indices.to_numpy()
    first = np.sort(np.unique(codes, return_index=True)[1])
    names = ["text_sha256", "version", "id", "work", "chunk", "row"]
    return usable.select(names).take(pa.array(first)).combine_chunks()


def _partition_of_ids(ids: pa.Array, partitions: int) -> np.ndarray:
    texts: Sequence[str] = ids.to_numpy(zero_copy_only=False)
    hashes = pd.util.hash_array(np.asarray(texts, dtype=object), categorize=False)
    return (hashes % np.uint64(partitions)).astype(np.int64)
