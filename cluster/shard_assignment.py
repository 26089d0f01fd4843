"""Assign one shard: blocks of vectors in, a Parquet file of assignments and a census out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.assign import Assignment, NearestCentroids
from cluster.census import Census, CensusPlan, count_block, empty_census, merge_censuses
from cluster.storage import written_whole
from cluster.vectors import Block, Shard, VectorSource, hash_ids, read_blocks

_MERGED_AT_A_TIME = 8


def assign_shard(
    source: VectorSource,
    shard: Shard,
    levels: Mapping[int, np.ndarray],
    plan: CensusPlan,
    path: str,
    *,
    seed: int,
) -> Census:
    """Assign the documents of one shard, write them to ``path``, and count them.

    ``levels`` maps a number of clusters to its centroids, float32 (k, d). ``cluster_id``, distance,
    second cluster and margin are those of the largest; of several, each has a ``cluster_id_K``.
    """
    indexes = {k: NearestCentroids(centroids) for k, centroids in levels.items()}
    censuses = [empty_census(plan)]
    writer = None
    with written_whole(path) as stream:
        for block in read_blocks(source, shard):
            assignments = {k: index.assign(block.vectors) for k, index in indexes.items()}
            table = _to_table(block, assignments, plan.k)
            writer = writer or pq.ParquetWriter(stream, table.schema)
            writer.write_table(table)
            orders = hash_ids(block.ids, seed)
            censuses.append(count_block(block, orders, assignments, plan))
            if len(censuses) == _MERGED_AT_A_TIME:
                censuses = [merge_censuses(censuses)]
        if writer is not None:
            writer.close()
    return merge_censuses(censuses)


def _to_table(block: Block, assignments: Mapping[int, Assignment], finest: int) -> pa.Table:
    assignment = assignments[finest]
    columns = {
        "id": block.ids,
        "cluster_id": assignment.cluster_ids,
        "distance": assignment.distances.astype(np.float32),
        "second_cluster_id": assignment.second_cluster_ids,
        "margin": assignment.margins.astype(np.float32),
    }
    if len(assignments) > 1:
        columns |= {f"cluster_id_{k}": assignments[k].cluster_ids for k in sorted(assignments)}
    return pa.table(columns)
