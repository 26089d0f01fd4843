"""The corpus compared with the version before, by id and text hash; no process sees all ids.

Keys meet keys: digests of ids, texts and kept columns, in the partitions of
:mod:`pipelines.embedding.keys`. First by partitions of texts, where a document that has not changed
meets its own key: what is left on either side is new, changed or gone. Then by partitions of ids,
where those three are told apart. Out, under the work folder: ``changes/NAME.deleted`` (ids) and
``places/NAME.arrow`` (where the vectors of known texts are).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.corpus.given_vectors import GivenVectors
from pipelines.corpus.kept_columns import json_to_values
from pipelines.embedding.chunks import FOLDERS
from pipelines.embedding.keys import (
    ENCODE,
    KNOWN,
    LEAVE_OUT,
    RETOUCH,
    Selected,
)
from pipelines.embedding.write import read_rows
from pipelines.nightly.reuse import Leftover
from pipelines.runtime.arrow import column_to_vectors
from pipelines.runtime.column_types import can_become, cast_column
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    first_line,
    in_threads,
    join,
    list_files,
    make_folder,
    read_bytes,
    write_bytes,
)
from pipelines.runtime.segments import (
    bytes_to_table,
    digest_column,
    digest_ids,
    digest_matrix,
    partition_of,
    read_segment,
    split_by,
    table_to_bytes,
    write_segments,
)
from pipelines.runtime.units import Receipt, run_stage
from pipelines.store.columns import EMBEDDING
from pipelines.store.documents import FragmentRef, read_fragment
from pipelines.store.version import Version

STAGE = "known"
_CHUNKS_A_TASK = 100
KEYS = pa.schema(
    [
        ("text", pa.binary(16)),
        ("key", pa.binary(16)),
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

``text``, ``key`` and ``kept`` are digests of text, id and kept columns. ``version`` and ``id`` are
where the vector is in the store, null where it must not be used; ``work``, ``chunk`` and ``row``
where it is in the work of another night.
"""


@dataclass(frozen=True)
class KnownSettings:
    """What every task has to know beside its part."""

    work: str
    partitions: int
    kept: tuple[str, ...]
    vectors: GivenVectors | None = None
    """Those that the corpus brings along, and that are compared as texts are."""

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
        for start in range(0, len(leftover.chunks), _CHUNKS_A_TASK):
            chunks = leftover.chunks[start : start + _CHUNKS_A_TASK]
            units[f"work-{number}-{start:06d}"] = {"work": leftover.work, "chunks": chunks}
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
        found = _keys_of_work(unit) if "work" in unit else self._keys_of_store(unit)
        table = pa.concat_tables([KEYS.empty_table(), *found]).combine_chunks()
        partition = partition_of(digest_matrix(table["text"]), self.settings.partitions)
        write_segments(
            self.settings.path(name), split_by(table, partition, self.settings.partitions)
        )
        return {"rows": len(table)}

    def _keys_of_store(self, unit: dict[str, Any]) -> Iterator[pa.Table]:
        kept = self.settings.kept if unit["base"] else ()
        vectors = () if self.settings.vectors is None else (EMBEDDING,)
        names = ["id", "text_sha256", *kept, *vectors]
        for batch in read_fragment(FragmentRef(**unit["ref"]), names):
            rows = batch.num_rows
            ids = batch.column("id").cast(pa.large_string())
            texts = digest_hashes(batch.column("text_sha256"))
            if self.settings.vectors is not None:
                given = column_to_vectors(batch.column(EMBEDDING))
                hashes = _raw_hashes(batch.column("text_sha256"))
                digests = self.settings.vectors.digest(ids.to_pylist(), hashes, given)
                texts = digest_column(digests)
            columns = [pa.chunked_array([batch.column(column)]) for column in kept]
            yield _key_table(
                text=texts,
                key=digest_ids(ids.to_pylist()),
                id=ids,
                kept=digest_rows(columns, rows),
                base=[unit["base"]] * rows,
                version=[unit["version"]] * rows,
            )


def _keys_of_work(unit: dict[str, Any]) -> Iterator[pa.Table]:
    for chunk in unit["chunks"]:
        hashes = read_rows(unit["work"], chunk, ("text_sha256",))["text_sha256"]
        count = len(hashes)
        yield _key_table(
            text=digest_hashes(hashes),
            base=[False] * count,
            work=[unit["work"]] * count,
            chunk=[chunk] * count,
            row=np.arange(count),
        )


def _key_table(text: pa.Array, **columns: Any) -> pa.Table:
    """Rows of :data:`KEYS`; columns that are not given are null."""
    nulls = {field.name: pa.nulls(len(text), field.type) for field in KEYS}
    return pa.table(nulls | {"text": text, **columns}, schema=KEYS)


def digest_hashes(hashes: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The digests of texts whose SHA-256 are given in hexadecimal digits."""
    return digest_column(_raw_hashes(hashes))


def _raw_hashes(hashes: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint8 (n, 32)."""
    raw = b"".join(bytes.fromhex(value) for value in hashes.to_pylist())
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class KeptDigest:
    """Digests the kept columns of checked documents in the ``types`` that the store has.

    ``are_json`` says that they come from the corpus as JSON text, but for a passage's numbers.
    """

    types: dict[str, pa.DataType]
    are_json: bool

    def __call__(self, documents: pa.Table) -> pa.Array:
        """binary(16) (n,)."""
        columns = []
        for name, kind in self.types.items():
            column = documents[f"kept.{name}"]
            try:
                if self.are_json and pa.types.is_large_string(column.type):
                    column = pa.chunked_array([json_to_values(column, kind)])
                columns.append(cast_column(column, kind))
            except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, TypeError) as error:
                raise InputError(
                    f"column {name!r} is {kind} in the store, and now holds something else "
                    f"({first_line(error)}): mend the corpus, or begin a new store"
                ) from error
        return digest_rows(columns, len(documents))


_SIDES = ("fresh", "left")


@dataclass(frozen=True)
class Comparison:
    """What the tasks of both stages have to know beside their partition.

    ``names`` are the files of keys. With ``rewrite`` every document is written again, changed or
    not.
    """

    known: KnownSettings
    names: tuple[str, ...]
    rewrite: bool

    def path(self, *parts: str) -> str:
        """A path below the work folder."""
        return join(self.known.work, *parts)

    def select(self, name: str, number: int, keys: pa.Table | None) -> Selected:
        """What becomes of the documents of a partition; leaves where vectors are known."""
        known = read_known(self.known, self.names, number)
        base = known.filter(known["base"]).combine_chunks()
        if keys is None:
            self._write_sides(name, base["key"].combine_chunks().slice(0, 0), base)
            return Selected(np.empty(0, dtype=np.int8))
        first = _first_of_each_id(keys)
        place = pc.index_in(keys["id"], value_set=base["key"])
        same_text = first & _equal_at(keys["text"], base["text"], place)
        retouched = same_text & ~_equal_at(keys["kept"], base["kept"], place)
        matched = place.to_numpy(zero_copy_only=False)[same_text].astype(np.int64)
        left = np.setdiff1d(np.arange(len(base)), matched)
        fresh = first & ~same_text
        fresh_ids = keys["id"].filter(pa.array(fresh)).combine_chunks()
        self._write_sides(name, fresh_ids, base.take(pa.array(left)))
        places = _vector_places(known)
        write_bytes(self.path("places", f"{name}.arrow"), table_to_bytes(places))
        has_vector = pc.is_in(keys["text"], value_set=places["text"]).to_numpy()
        chosen = first if self.rewrite else fresh
        fates = np.full(len(keys), LEAVE_OUT, dtype=np.int8)
        if not self.rewrite:
            fates[retouched] = RETOUCH
        fates[chosen & ~has_vector] = ENCODE
        fates[chosen & has_vector] = KNOWN
        counts = {
            "unchanged": int((same_text & ~retouched).sum()),
            "retouched": int(retouched.sum()),
            "repeats": int((~first).sum()),
        }
        return Selected(fates, counts)

    def _write_sides(self, name: str, fresh: pa.Array, left: pa.Table) -> None:
        sides = (pa.table({"key": fresh}), left.select(["key", "id"]))
        for side, table in zip(_SIDES, sides, strict=True):
            partition = partition_of(digest_matrix(table["key"]), self.partitions)
            path = self.path("compared", f"{name}.{side}")
            write_segments(path, split_by(table, partition, self.partitions))

    @property
    def partitions(self) -> int:
        """Number of partitions, of texts as of ids."""
        return self.known.partitions


def prepare_comparison(comparison: Comparison) -> None:
    """Make the folders that tasks write to."""
    for folder in ("compared", "places"):
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
    """Id and kept columns of documents whose text is as it was."""
    folder = comparison.path(FOLDERS[RETOUCH])
    for name in list_files(folder):
        table = bytes_to_table(read_bytes(join(folder, name)))
        kept = [column for column in table.column_names if column.startswith("kept.")]
        names = [column.removeprefix("kept.") for column in kept]
        found = table.select(["id", *kept]).rename_columns(["id", *names])
        yield found.set_column(0, "id", found["id"].cast(id_type))


def settled_types(
    found: Mapping[str, pa.DataType], stored: Mapping[str, pa.DataType], *, is_json: bool
) -> dict[str, pa.DataType]:
    """The types that kept columns have in the store, where the corpus's can become them.

    Values that come ``is_json`` can all become strings. Raises :class:`InputError` where a type
    cannot become the store's; whether each value can, :class:`KeptDigest` has seen.
    """
    for name, kind in stored.items():
        if is_json and pa.types.is_string(kind):
            continue
        if name in found and not can_become(found[name], kind):
            raise InputError(
                f"column {name!r} is {found[name]} in the corpus and {kind} in the store: mend the "
                "corpus, or begin a new store"
            )
    return dict(stored)


@dataclass(frozen=True)
class _SettleIds:
    comparison: Comparison

    def __call__(self, name: str, unit: int) -> Receipt:
        fresh, left = (self._read(side, unit) for side in _SIDES)
        in_both = pc.is_in(left["key"], value_set=fresh["key"])
        deleted = left.filter(pc.invert(in_both)).select(["id"])
        path = self.comparison.path("changes", f"{name}.deleted")
        write_bytes(path, table_to_bytes(deleted), create_folder=False)
        changed = len(left) - len(deleted)
        return {"new": len(fresh) - changed, "changed": changed, "deleted": len(deleted)}

    def _read(self, side: str, unit: int) -> pa.Table:
        names = [f"{number:05d}.{side}" for number in range(self.comparison.partitions)]
        paths = [self.comparison.path("compared", name) for name in names]
        tables = in_threads(lambda path: read_segment(path, unit), paths)
        columns = ["key"] if side == _SIDES[0] else ["key", "id"]
        return pa.concat_tables([KEYS.empty_table().select(columns), *(t for t in tables if t)])


def _first_of_each_id(keys: pa.Table) -> np.ndarray:
    """bool (n,): all documents with ids of their own, and of texts that are their id the first."""
    codes = pc.dictionary_encode(keys["id"].combine_chunks()).indices.to_numpy()
    first = np.zeros(len(keys), dtype=bool)
    first[np.unique(codes, return_index=True)[1]] = True
    return keys["own"].to_numpy() | first


def _equal_at(values: pa.ChunkedArray, others: pa.ChunkedArray, place: pa.Array) -> np.ndarray:
    """bool (n,): whether a value equals the one of ``others`` at its place; False without one."""
    place = place.combine_chunks() if isinstance(place, pa.ChunkedArray) else place
    there = others.combine_chunks().take(place)
    return pc.fill_null(pc.equal(values, there), False).to_numpy().astype(bool)


def _vector_places(keys: pa.Table) -> pa.Table:
    """Where the vector of a text is, each text once."""
    usable = keys.filter(pc.or_(pc.is_valid(keys["version"]), pc.is_valid(keys["work"])))
    codes = pc.dictionary_encode(usable["text"].combine_chunks()).indices.to_numpy()
    first = np.sort(np.unique(codes, return_index=True)[1])
    names = ["text", "version", "id", "work", "chunk", "row"]
    return usable.select(names).take(pa.array(first)).combine_chunks()
