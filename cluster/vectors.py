"""Vectors on disk: what files hold, cut into shards of rows, read as blocks of checked arrays.

Enters: Parquet files or folders (ours or anyone's), one ``.npy`` matrix, or Lance datasets.
Leaves: :class:`Block`, a few thousand rows at a time, so memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cluster.distances import squared_lengths
from cluster.matrix_files import MATRIX_SUFFIXES
from cluster.vector_files import (
    ROWS_PER_SHARD,
    Columns,
    FileSummary,
    Piece,
    check_readable,
    describe_file,
    find_files,
    read_batches,
)
from pipelines.runtime.arrow import LONGEST_VECTOR, plain_column, plain_type
from pipelines.runtime.column_types import fit_column, unify_columns
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import check_store, first_line, open_filesystem, with_inner_path

BLOCK_BYTES = 32 << 20
_PARALLEL_READS = 16


@dataclass(frozen=True)
class Shard:
    """About 200,000 rows that one worker reads in one go."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """Number of rows in all pieces."""
        return sum(piece.rows for piece in self.pieces)


@dataclass(frozen=True)
class VectorSource:
    """Vectors that were found and whose schemas agree, but which are not read yet."""

    uri: str
    """The path as the user gave it; decides the filesystem."""
    columns: Columns
    dimension: int
    id_kind: str
    """'string', 'int64' or 'uint64'."""
    shards: tuple[Shard, ...]
    fingerprint: str | None = None
    """Fingerprint of the encoder that made the vectors, where the files carry one."""
    unit_norm: bool = False
    """Scale every vector to length 1 while reading."""
    drop_bad: bool = False
    """Leave out vectors that cannot be clustered instead of raising."""
    document_kind: str | None = None
    """'string' or 'int64', where rows are passages that name their documents."""
    kept: pa.Schema = pa.schema([])  # noqa: RUF009
    """The columns that are carried along, with types that hold those of all files."""

    @property
    def rows(self) -> int:
        """Number of rows in all shards."""
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class Block:
    """A few thousand consecutive rows of one shard."""

    ids: pa.Array
    vectors: np.ndarray
    """float32 (n, d), finite, C-contiguous."""
    texts: pa.Array | None
    labels: pa.Array | None
    """Strings; null where a document has no label."""
    rejected: pa.Table
    """id and reason of rows left out by ``drop_bad``."""
    kept: pa.Table | None = None
    """Columns that are carried along."""
    documents: pa.Array | None = None
    """Of which document each row is a passage: strings, or int64 where all are integers."""


def open_vectors(
    uri: str,
    columns: Columns,
    *,
    optional_text: str | None = None,
    optional_document: str | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    version: str = "",
) -> VectorSource:
    """Find the files of ``uri`` and check that their schemas can be clustered together.

    ``optional_text`` becomes the text column where every file has it, and ``optional_document``
    that of passages' documents where it holds strings or integers; ``version`` is that of a table.
    Ids of several kinds are read as strings.
    Raises :class:`InputError` for nothing found, unreadable files, missing columns, mixed
    dimensions and mixed encoder fingerprints, naming the file.
    """
    filesystem, files = open_filesystem(uri)[0], find_files(uri, version)
    numbered = [file.path for file in files if file.path.endswith(MATRIX_SUFFIXES)]
    if numbered and len(files) > 1:
        kind = "." + numbered[0].rpartition(".")[2]
        raise InputError(
            f"{uri} holds {len(files)} files with {kind} among them: an {kind} has no ids, so it "
            "must come alone; use Parquet with an id column for vectors in several files"
        )
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        described = list(pool.map(lambda file: describe_file(filesystem, file, columns), files))
    usable = [(f.path, about) for f, about in zip(files, described, strict=True) if about.pieces]
    if not usable:
        raise InputError(f"{uri} holds no rows: nothing to cluster")
    if not any(about.dimension for _, about in usable):
        raise InputError(f"{uri}: every vector is null or empty; nothing to cluster")
    usable.sort(key=lambda pair: pair[0])
    first = _require_one_encoder(usable)
    kinds = {about.id_kind for _, about in usable}
    id_kind = first.id_kind if len(kinds) == 1 else "string"
    if optional_text is not None and all(
        optional_text in about.schema.names for _, about in usable
    ):
        for path, about in usable:
            check_readable(about.schema, optional_text, path)
        columns = replace(columns, text=optional_text)
    schemas = [about.schema for _, about in usable]
    document_kind = _document_kind(schemas, optional_document)
    if document_kind is not None:
        columns = replace(columns, document=optional_document)
    pieces = [piece for _, about in usable for piece in about.pieces]
    shards = group_into_shards(pieces, rows_per_shard)
    return VectorSource(
        uri,
        columns,
        first.dimension,
        id_kind,
        shards,
        first.fingerprint,
        document_kind=document_kind,
        kept=unify_columns([path for path, _ in usable], [about.kept for _, about in usable]),
    )


def _require_one_encoder(files: Sequence[tuple[str, FileSummary]]) -> FileSummary:
    """The first of ``files`` that has a vector; an error where others are of another encoder."""
    first_path, first = next(pair for pair in files if pair[1].dimension)
    for path, about in files:
        if about.dimension not in (first.dimension, 0):
            raise InputError(
                f"mixed dimensions: {first_path} holds vectors of {first.dimension}, {path} of "
                f"{about.dimension}; cluster vectors of one encoder at a time"
            )
        if about.fingerprint != first.fingerprint:
            raise InputError(
                f"mixed encoders: {first_path} was embedded with fingerprint {first.fingerprint}, "
                f"{path} with {about.fingerprint}; embed the corpus with one encoder"
            )
    return first


def _document_kind(schemas: Sequence[pa.Schema], name: str | None) -> str | None:
    """What the ids of passages' documents are read as; None where not every file has them."""
    if name is None or not all(name in schema.names for schema in schemas):
        return None
    kinds = [schema.field(name).type for schema in schemas]
    if all(pa.types.is_integer(kind) and kind != pa.uint64() for kind in kinds):
        return "int64"
    plain = (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        for kind in kinds
    )
    return "string" if all(plain) else None


def read_blocks(source: VectorSource, shard: Shard, *, with_text: bool = True) -> Iterator[Block]:
    """The rows of ``shard`` in order, as blocks of about 32 MiB of vectors; at least one block.

    Raises :class:`InputError` naming the file and the first bad row for vectors that are null,
    of another length, not finite, or (where they are scaled to unit length) zero, and naming a
    file that is damaged.
    """
    filesystem, _ = open_filesystem(source.uri)
    columns = source.columns
    if not with_text:
        columns = replace(columns, text=None, keep=(), document=None)
    block_rows, found = max(1, BLOCK_BYTES // (4 * source.dimension)), False
    for piece in shard.pieces:
        try:
            for batch in read_batches(filesystem, piece, columns, block_rows):
                found = True
                yield _checked_block(batch, piece.path, source, columns)
        except (OSError, pa.ArrowException) as error:
            if piece.read is not None:
                raise
            check_store(with_inner_path(source.uri, piece.path), error)
            raise InputError(
                f"{piece.path} cannot be read to its end: {first_line(error)}"
            ) from error
    if not found:  # a table may have deleted every row of its file
        yield _empty_block(source, columns)


def _empty_block(source: VectorSource, columns: Columns) -> Block:
    ids, strings = pa.array([], source.id_kind), pa.array([], pa.string())
    return Block(
        ids,
        np.empty((0, source.dimension), np.float32),
        strings if columns.text else None,
        strings if columns.label else None,
        pa.table({"id": ids, "reason": strings}),
        pa.table({f.name: pa.array([], plain_type(f.type)) for f in source.kept})
        if columns.keep
        else None,
        pa.array([], source.document_kind) if columns.document is not None else None,
    )


def read_centroids(uri: str) -> tuple[np.ndarray, str | None]:
    """Centroids, float32 (k, d), from ``centroids.parquet`` or an ``.npy``, in their order.

    With them the fingerprint of the encoder whose vectors they are of, where the file carries one.

    Raises :class:`InputError` for a file that holds none.
    """
    columns = Columns("cluster_id", "centroid")
    source = open_vectors(uri, columns)
    blocks = [block for shard in source.shards for block in read_blocks(source, shard)]
    ids = np.concatenate([block.ids.to_numpy(zero_copy_only=False) for block in blocks])
    if not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise InputError(f"{uri}: cluster_id must number the centroids from 0 to {len(ids) - 1}")
    return np.concatenate([block.vectors for block in blocks])[np.argsort(ids)], source.fingerprint


def hash_ids(ids: pa.Array, seed: int) -> np.ndarray:
    """uint64 (n,): a hash of each id that orders rows at random, whatever file they lie in."""
    text = ids.cast(pa.string()).to_numpy(zero_copy_only=False)
    return pd.util.hash_array(text, hash_key=f"shoal{seed % 10**11:011d}", categorize=False)


def shorten_texts(texts: pa.Array, characters: int, wanted: np.ndarray | None = None) -> pa.Array:
    """The first ``characters`` of each text as strings; null where not ``wanted``, bool (n,).

    Bytes that are no UTF-8, which Parquet files may hold, become replacement characters.
    """
    if wanted is not None:
        texts = pc.if_else(pa.array(wanted), texts, pa.scalar(None, texts.type))
    if not pa.types.is_string(texts.type) and not pa.types.is_binary(texts.type):
        texts = texts.cast(pa.string())
    buffers = (value.as_buffer() for value in texts)
    return pa.array(
        [
            # A character has at most 4 bytes, so a long text need not be decoded whole.
            None if text is None else text[: 4 * characters].to_pybytes()
            .decode("utf-8", errors="replace")[:characters]
            for text in buffers
        ],
        pa.string(),
    )  # fmt: skip


def group_into_shards(
    pieces: Iterable[Piece], rows_per_shard: int = ROWS_PER_SHARD
) -> tuple[Shard, ...]:
    """Neighbouring pieces as shards of at most ``rows_per_shard``, or of one larger piece."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if piece.rows > room:
            groups.append([])
            room = max(rows_per_shard, piece.rows)
        groups[-1].append(piece)
        room -= piece.rows
    return tuple(Shard(f"part-{i:05d}", tuple(group)) for i, group in enumerate(groups))


def _checked_block(
    batch: pa.RecordBatch, path: str, source: VectorSource, columns: Columns
) -> Block:
    ids = _to_ids(batch.column(columns.id), source.id_kind, path)
    if ids.null_count:
        raise InputError(
            f"{path}: {ids.null_count} rows have a null {columns.id!r}; ids must be set"
        )
    vectors, reasons = _to_matrix(plain_column(batch.column(columns.embedding)), source.dimension)
    squared = squared_lengths(vectors)
    reasons[~np.isfinite(squared) & (reasons == "")] = "not finite (NaN or infinite)"
    reasons[(squared > LONGEST_VECTOR**2) & (reasons == "")] = f"longer than {LONGEST_VECTOR:g}"
    if source.unit_norm:
        reasons[(squared == 0) & (reasons == "")] = "zero, so it has no direction"
    bad = np.flatnonzero(reasons != "")
    rejected = pa.table(
        {"id": ids.take(pa.array(bad)), "reason": pa.array(reasons[bad].tolist(), pa.string())}
    )
    if len(bad) and not source.drop_bad:
        raise InputError(
            f"{path}: {len(bad)} of {len(ids)} vectors read cannot be clustered; the first, "
            f"{columns.id}={ids[int(bad[0])].as_py()!r}, is {reasons[bad[0]]}. Remove them, or "
            "leave them out with --drop-bad-vectors"
        )
    texts = plain_column(batch.column(columns.text)) if columns.text else None
    labels = _to_labels(batch.column(columns.label)) if columns.label else None
    kept = None
    if columns.keep:
        found = {f.name: plain_column(batch.column(f.name)) for f in source.kept}
        kinds = {f.name: plain_type(f.type) for f in source.kept}
        kept = pa.table(
            {n: fit_column(n, pa.chunked_array([found[n]]), kind) for n, kind in kinds.items()}
        )
    documents = None
    if columns.document is not None:
        documents = plain_column(batch.column(columns.document)).cast(source.document_kind)
    if len(bad):
        keep = np.flatnonzero(reasons == "")
        vectors, squared, ids = vectors[keep], squared[keep], ids.take(pa.array(keep))
        texts = None if texts is None else texts.take(pa.array(keep))
        labels = None if labels is None else labels.take(pa.array(keep))
        kept = None if kept is None else kept.take(pa.array(keep))
        documents = None if documents is None else documents.take(pa.array(keep))
    if source.unit_norm:
        vectors = vectors / np.sqrt(squared)[:, None].astype(np.float32)
    return Block(ids, np.ascontiguousarray(vectors), texts, labels, rejected, kept, documents)


def _to_ids(column: pa.Array, kind: str, path: str) -> pa.Array:
    """Ids as the one type that all files of the source share."""
    try:
        return plain_column(column).cast(kind)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: an id cannot be read as {kind}: {error}") from error


def _to_matrix(column: pa.Array, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (n, d), and for each row why it is unusable, or ''. Unusable rows are NaN."""
    reasons = np.full(len(column), "", dtype=object)
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    reasons[lengths < 0] = "null"
    wrong = (lengths >= 0) & (lengths != dimension)
    reasons[wrong] = [f"of {length} numbers, not {dimension}" for length in lengths[wrong]]
    good = np.flatnonzero(reasons == "")
    kept = column if len(good) == len(column) else column.take(pa.array(good))
    values = kept.flatten().cast(pa.float32(), safe=False)
    numbers = pc.fill_null(values, float("nan")).to_numpy(zero_copy_only=False)
    if len(good) == len(column):
        return numbers.reshape(-1, dimension), reasons
    vectors = np.full((len(column), dimension), np.nan, dtype=np.float32)
    vectors[good] = numbers.reshape(-1, dimension)
    return vectors, reasons


def _to_labels(column: pa.Array) -> pa.Array:
    """Labels as strings, null where there is none (a float NaN counts as none)."""
    column = plain_column(column)
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        values = column.to_pylist()
        return pa.array([None if v is None else v.decode("utf-8", "replace") for v in values])
    labels = column.cast(pa.string())
    missing = pc.is_null(column, nan_is_null=True)
    return pc.if_else(missing, pa.scalar(None, pa.string()), labels)
