"""Passages back to documents: in which clusters the passages of each lie.

In: tables such as ``assignments/*.parquet`` with ``document_id``. Out: ``documents.parquet``, a row
a document. No process sees all documents: counts go to partitions by a hash of the document's id.
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

from cluster.document_map import join_maps
from cluster.vectors import Shard, VectorSource, hash_ids
from cluster.work import Work
from pipelines.runtime.command import JobResult
from pipelines.runtime.files import join, make_folder, read_table, write_table
from pipelines.runtime.segments import read_segment, write_segments

DOCUMENT = "document_id"
FILE_NAME = "documents.parquet"
ASSIGNED = (DOCUMENT, "cluster_id", "distance")
"""What is read of a passage."""
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
    partitions = partitions_of(passages)
    count = partial(_count_shard, join(output, "assignments"), folder, partitions)
    list(work.on_shards("passages", count, shards, **pool))
    names = tuple(shard.name for shard in shards)
    parts = [Shard(f"part-{number:05d}", ()) for number in range(partitions)]
    results = list(work.on_shards("rolled", partial(_join_shard, folder, names), parts, **pool))
    join_maps([part_of(folder, number) for number in range(partitions)], join(output, FILE_NAME))
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


def partitions_of(passages: int) -> int:
    """Into how many partitions the documents of so many passages go."""
    return max(1, -(-passages // _PASSAGES_A_PARTITION))


def part_of(folder: str, partition: int) -> str:
    """The file of the documents of one partition."""
    return join(folder, f"part-{partition:05d}.parquet")


def count_passages(assigned: pa.Table, folder: str, partitions: int, name: str) -> int:
    """Write passages by document and cluster, by partition of documents; how many such counts.

    ``assigned`` has :data:`ASSIGNED` of a shard of this ``name``, whose passages count under no
    other.
    """
    table = assigned.filter(assigned[DOCUMENT].is_valid())
    counts = _added(table.append_column("passages", pa.array(np.ones(len(table), np.int64))))
    partition = hash_ids(counts[DOCUMENT].combine_chunks(), 0) % np.uint64(partitions)
    order = np.argsort(partition, kind="stable")
    bounds = np.searchsorted(partition[order], np.arange(partitions + 1, dtype=np.uint64))
    counts = counts.take(pa.array(order))
    segments = [counts.slice(a, b - a) for a, b in pairwise(bounds)]
    write_segments(join(folder, f"{name}.counts"), segments)
    return len(counts)


def join_counts(folder: str, names: Sequence[str], partition: int) -> int:
    """Write the documents of one partition by the counts of all shards; how many."""
    found = (read_segment(join(folder, f"{name}.counts"), partition) for name in names)
    tables = [table for table in found if table is not None]
    table = _documents(_added(pa.concat_tables(tables)) if tables else None)
    write_table(part_of(folder, partition), table)
    return len(table)


def _count_shard(assignments: str, folder: str, partitions: int, shard: Shard) -> _Done:
    table = read_table(join(assignments, f"{shard.name}.parquet"), ASSIGNED)
    return _Done(count_passages(table, folder, partitions, shard.name))


def _join_shard(folder: str, names: Sequence[str], part: Shard) -> _Done:
    return _Done(join_counts(folder, names, int(part.name.rpartition("-")[2])))


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
