"""The rows that a deduplication keeps, with all their columns, as Parquet.

Each row stands as its own file or table has it; of a CSV, where all is text, every column is text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster.duplicate_search import Part
from cluster.line_files import is_lines, read_lines
from cluster.matrix_files import MATRIX_SUFFIXES
from cluster.vector_files import Piece, read_batches
from cluster.vectors import VectorSource
from cluster.work import remove_stale
from pipelines.runtime.arrow import id_column, open_parquet, parquet_columns, read_parquet
from pipelines.runtime.files import (
    atomic_output,
    join,
    make_folder,
    open_filesystem,
    read_bytes,
    split_options,
)
from pipelines.runtime.segments import bytes_to_table
from pipelines.runtime.table_folders import LANCE_SUFFIX
from pipelines.runtime.table_view import TableView
from pipelines.runtime.tables import open_lance
from pipelines.runtime.units import Receipt, run_stage

CLEAN_FOLDER = "clean"
_ROWS_AT_A_TIME = 4_096


def write_clean(
    parts: Sequence[Part], source: VectorSource, output: str, work: str, *, wanted: bool
) -> None:
    """The kept rows with all their columns, by shard; where they are not ``wanted`` none are left.

    The ids that stay lie in ``work/kept``, by part.
    """
    folder = join(output, CLEAN_FOLDER)
    written: set[str] = set()
    if wanted:
        make_folder(folder)
        units = {part.name: part.shard for part in parts if not part.source}
        done = run_stage(work, "clean", units, partial(_clean_shard, source, folder, work)).values()
        written = {name for receipt in done for name in receipt["files"]}
    remove_stale(folder, r"part-\d+(-\d+)?\.parquet", written)


def _clean_shard(source: VectorSource, folder: str, work: str, name: str, number: int) -> Receipt:
    """Write a shard's kept rows, one file for each schema that follows another in it."""
    kept = bytes_to_table(read_bytes(join(work, "kept", name)))["id"].combine_chunks()
    batches = (b for piece in source.shards[number].pieces for b in whole_rows(source, piece))
    files, rows = [], 0
    for place, (schema, alike) in enumerate(groupby(batches, key=lambda batch: batch.schema)):
        files.append(f"{name}-{place}.parquet" if place else f"{name}.parquet")
        with (
            atomic_output(join(folder, files[-1])) as stream,
            pq.ParquetWriter(stream, schema) as writer,
        ):
            for batch in alike:
                ids = id_column(batch.column(source.columns.id)).cast(source.id_kind)
                chosen = batch.filter(pc.is_in(ids, value_set=kept))
                writer.write_batch(chosen)
                rows += len(chosen)
    return {"rows": rows, "files": files}


def whole_rows(source: VectorSource, piece: Piece) -> Iterator[pa.RecordBatch]:
    """All columns of a piece's rows; of a matrix ids and vectors."""
    filesystem, columns = open_filesystem(source.uri)[0], source.columns
    if piece.path.endswith(MATRIX_SUFFIXES):
        yield from read_batches(filesystem, piece, columns, _ROWS_AT_A_TIME)
    elif split_options(piece.path)[0].endswith(LANCE_SUFFIX):
        dataset = open_lance(piece.path, piece.version or "")
        for batch in dataset.get_fragment(piece.part).to_batches(batch_size=_ROWS_AT_A_TIME):
            yield batch.replace_schema_metadata(dataset.schema.metadata)
    elif is_lines(piece.path):
        read = partial(read_lines, filesystem, piece.path, embedding=columns.embedding)
        yield from read(next(read(columns.names())).schema.names)
    else:
        yield from _whole_parquet(filesystem, source, piece)


def _whole_parquet(
    filesystem: pafs.FileSystem, source: VectorSource, piece: Piece
) -> Iterator[pa.RecordBatch]:
    with filesystem.open_input_file(piece.path) as stream:
        file = open_parquet(stream, buffer_size=4 << 20)
        own, about = file.schema_arrow, parquet_columns(file, piece.view)
        if piece.view in (None, TableView()) and source.columns.id in own.names:
            yield from file.iter_batches(_ROWS_AT_A_TIME, [piece.part])
            return
    names = about.schema.names
    part = range(piece.part, piece.part + 1)
    for table in read_parquet(filesystem, piece.path, piece.view, names, part, _ROWS_AT_A_TIME):
        yield from table.replace_schema_metadata(own.metadata).combine_chunks().to_batches()
