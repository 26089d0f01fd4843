"""Passages back to documents: in which clusters the passages of each lie.

In: ``assignments/*.parquet`` with ``document_id``. Out: ``documents.parquet``, a row a document. No
process sees all documents: counts go to partitions by a hash of the document's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.document_map import join_maps
from cluster.vectors import Shard, VectorSource, hash_ids
from cluster.work import Work
from pipelines.runtime.command import JobResult
from pipelines.runtime.files import atomic_output, join, make_folder, open_filesystem
from pipelines.runtime.segments import read_segment, write_segments

DOCUMENT = "document_id"
FILE_NAME = "documents.parquet"
_PASSAGES_A_PARTITION = 2_000_000
_COUNTS = ("document_id", "cluster_id", "passages", "distance")


@dataclass(frozen=True)
class _Done:
    rows: int

    def to_tables(self) -> dict[str, pa.Table]:
        return {"rows": pa.table({"rows": [self.rows]})}


def roll_up(output: str, shards: Sequence[Shard], passages: int, work: Work, **pool: Any) -> int:
    """Write ``documents.parquet`` beside the assignments in ``output``; how many documents.

    Columns are ``document_id``; ``passages``, their number; ``cluster_id``, where most of them lie
    (of several, where they lie nearer to the centroid on average, then the lowest); ``share`` of
    them that do; ``cluster_ids`` and ``shares`` of all their clusters, largest share first.

    Args:
        output: the clustering's folder.
        shards: whose assignments are there.
        passages: how many they are together.
        work: keeps what is done.
        pool: workers, as :func:`cluster.on_ray.run_on_shards` takes them.
    """
    assert work.folder is not None
    folder = join(work.folder, "documents")
    make_folder(folder)
    partitions = max(1, -(-passages // _PASSAGES_A_PARTITION))
    count = partial(_count_shard, join(output, "assignments"), folder, partitions)
    list(work.on_shards("passages", count, shards, **pool))
    names = tuple(shard.name for shard in shards)
    parts = [Shard(f"part-{number:05d}", ()) for number in range(partitions)]
    results = list(work.on_shards("rolled", partial(_join_partition, folder, names), parts, **pool))
    join_maps([join(folder, f"{part.name}.parquet") for part in parts], join(output, FILE_NAME))
    return sum(tables["rows"]["rows"][0].as_py() for tables in results)


def roll_up_passages(
    result: JobResult, output: str, source: VectorSource, work: Work, **pool: Any
) -> JobResult:
    """:func:`roll_up` where rows are passages; ``documents`` of the result are then documents."""
    if source.columns.document is None:
        return result
    documents = roll_up(output, source.shards, source.rows, work, **pool)
    passages = result.counts["documents"]
    counts = {**result.counts, "documents": documents, "passages": passages}
    shown = {"documents": f"{documents:,}, of {passages:,} passages; {join(output, FILE_NAME)}"}
    return replace(result, counts=counts, summary={**result.summary, **shown})


def _count_shard(assignments: str, folder: str, partitions: int, shard: Shard) -> _Done:
    """Passages by document and cluster of one shard, by partition of documents."""
    filesystem, path = open_filesystem(join(assignments, f"{shard.name}.parquet"))
    table = pq.read_table(path, columns=[DOCUMENT, "cluster_id", "distance"], filesystem=filesystem)
    table = table.filter(table[DOCUMENT].is_valid())
    counts = _added(table.append_column("passages", pa.array(np.ones(len(table), np.int64))))
    partition = hash_ids(counts[DOCUMENT].combine_chunks(), 0) % np.uint64(partitions)
    order = np.argsort(partition, kind="stable")
    bounds = np.searchsorted(partition[order], np.arange(partitions + 1, dtype=np.uint64))
    counts = counts.take(pa.array(order))
    segments = [counts.slice(a, b - a) for a, b in pairwise(bounds)]
    write_segments(join(folder, f"{shard.name}.counts"), segments)
    return _Done(len(counts))


def _join_partition(folder: str, shards: Sequence[str], part: Shard) -> _Done:
    """The documents of one partition, as a file."""
    number = int(part.name.rpartition("-")[2])
    found = (read_segment(join(folder, f"{name}.counts"), number) for name in shards)
    tables = [table for table in found if table is not None]
    with atomic_output(join(folder, f"{part.name}.parquet")) as stream:
        table = _documents(_added(pa.concat_tables(tables))) if tables else _documents(None)
        pq.write_table(table, stream)
    return _Done(len(table))


def _added(table: pa.Table) -> pa.Table:
    """Passages by document and cluster; ``distance`` is the sum of theirs."""
    grouped = table.group_by([DOCUMENT, "cluster_id"]).aggregate(
        [("passages", "sum"), ("distance", "sum")]
    )
    return grouped.rename_columns([DOCUMENT, "cluster_id", "passages", "distance"])


def _documents(counts: pa.Table | None) -> pa.Table:
    """A row a document, by rising id."""
    if counts is None:
        counts = pa.table({name: pa.array([], pa.int64()) for name in _COUNTS})
    ids = counts[DOCUMENT].combine_chunks()
    ordered = ids.unique().sort()
    document = pc.index_in(ids, value_set=ordered).to_numpy(zero_copy_only=False)
    cluster = counts["cluster_id"].to_numpy()
    passages = counts["passages"].to_numpy()
    order = np.lexsort((cluster, counts["distance"].to_numpy() / passages, -passages, document))
    document, cluster, passages = document[order], cluster[order], passages[order]
    firsts = np.searchsorted(document, np.arange(len(ordered)))
    bounds = pa.array(np.append(firsts, len(document)), pa.int32())
    totals = np.bincount(document, passages, len(ordered)).astype(np.int64)
    shares = passages / totals[document]
    return pa.table(
        {
            DOCUMENT: ordered,
            "passages": totals,
            "cluster_id": pa.array(cluster[firsts], pa.int32()),
            "share": shares[firsts],
            "cluster_ids": pa.ListArray.from_arrays(bounds, pa.array(cluster, pa.int32())),
            "shares": pa.ListArray.from_arrays(bounds, pa.array(shares)),
        }
    )
