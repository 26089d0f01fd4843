"""New vectors into clusters that exist: nothing is fitted again, and what fits nowhere is told.

In: vectors, and a finished clustering. Out: ``assignments/*.parquet`` with ``id``, ``cluster_id``
(-1 for noise, where the clustering has any), ``distance`` and ``novel``, and
``novel_clusters.parquet``: what the novel documents have in common.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.assign import NearestCentroids
from cluster.clustering import digest_of, open_documents, pool_of
from cluster.config import AssignConfig
from cluster.describe import find_keywords
from cluster.distances import squared_distances_to
from cluster.document_map import table_writer
from cluster.kmeans import FitOptions, fit_in_memory
from cluster.known import ASSIGNMENTS, KnownClusters, describe_encoder_of
from cluster.noise import NoiseFinder, mark_noise
from cluster.num_clusters import choose_num_clusters
from cluster.roll_up import DOCUMENT, roll_up_passages
from cluster.vectors import (
    Block,
    Columns,
    Shard,
    VectorSource,
    hash_ids,
    read_blocks,
    shorten_texts,
)
from cluster.work import Work, remove_stale
from pipelines.runtime.arrow import column_to_vectors, vectors_to_column
from pipelines.runtime.command import JobResult
from pipelines.runtime.files import (
    join,
    make_folder,
    write_table,
)
from pipelines.runtime.run_record import RunRecord, deciding_settings

SAMPLED = 5_000
"""Novel documents that are looked at together, and others that their words are compared with."""
_FEWEST_TO_CLUSTER = 30
_MOST_CLUSTERS = 12
_REPRESENTATIVES = 5
_TEXT_CHARACTERS = 2_000


Reader = Callable[[AssignConfig], KnownClusters]


def assign_clusters(
    config: AssignConfig, record: RunRecord | None = None, *, read: Reader
) -> JobResult:
    """Give every vector of ``config.embeddings`` to its nearest cluster.

    ``read`` reads the clusters. Needs a running Ray; ``record`` is the open run record. Raises
    :class:`InputError` for vectors that do not belong to the clusters.
    """
    known = read(config)
    columns = Columns(config.id_column, config.embedding_column)
    source = open_documents(config, columns)
    known.check(source, describe_encoder_of(config.embeddings))
    source = replace(source, unit_norm=known.unit_norm, drop_bad=config.drop_bad_vectors)
    digest = hashlib.sha256((digest_of(source) + known.digest()).encode()).hexdigest()
    if done := Work.confirm(record, config.output, "inputs_digest", digest):
        return done
    work = Work.begin(config.output, {"inputs": digest, "settings": deciding_settings(config)})
    assigned = assign_all(source, known, config, work)
    summary = describe_novel(assigned, known, config.seed)
    write_table(join(config.output, "novel_clusters.parquet"), summary)
    _write_rejected(config.output, assigned.rejected)
    noise = {} if known.regions is None else {"noise": assigned.noise}
    result = JobResult(
        noise
        | {
            "documents": int(assigned.sizes.sum()) + assigned.noise + len(assigned.rejected),
            "assigned": int(assigned.sizes.sum()),
            "novel": int(assigned.novel.sum()),
            "rejected": len(assigned.rejected),
        },
        {"inputs_digest": digest, "quantile": config.quantile, "novel_share": assigned.novel_share},
        _table_for_people(assigned, summary, known, config),
    )
    result = roll_up_passages(result, config.output, source, work, **pool_of(config))
    if record is not None:
        record.complete(result.counts, result.metrics)
    work.end()
    return result


@dataclass(frozen=True)
class Assigned:
    """Documents of a shard, or of all, given to their clusters."""

    sizes: np.ndarray
    """int64 (k,), documents given to each cluster."""
    noise: int
    """Documents in no dense region."""
    novel: np.ndarray
    """int64 (k,), novel documents by the cluster whose centroid is nearest."""
    rejected: pa.Table
    """id and reason of vectors that were left out."""
    sample: pa.Table
    """id, order, novel, place, distance, vector and text of documents drawn by their hash."""

    @property
    def novel_share(self) -> float:
        """Share of the documents that are novel."""
        return float(self.novel.sum() / max(1, self.sizes.sum() + self.noise))

    def to_tables(self) -> dict[str, pa.Table]:
        """The same as Arrow tables, to travel between workers and driver."""
        counts = pa.table({"sizes": self.sizes, "novel": self.novel})
        noise = pa.table({"noise": [self.noise]})
        return {"counts": counts, "noise": noise, "rejected": self.rejected, "sample": self.sample}


def assign_all(
    source: VectorSource, known: KnownClusters, config: AssignConfig, work: Work
) -> Assigned:
    """Assign every document, one file of ``assignments/`` a shard."""
    folder = join(config.output, "assignments")
    make_folder(folder)
    assign = partial(_assign_to_file, source, known, folder, config.seed)
    tables = work.on_shards("assign", assign, source.shards, **pool_of(config))
    assigned = merge_assigned([_from_tables(table) for table in tables])
    remove_stale(folder, ASSIGNMENTS, {f"{shard.name}.parquet" for shard in source.shards})
    return assigned


def _assign_to_file(
    source: VectorSource, known: KnownClusters, folder: str, seed: int, shard: Shard
) -> Assigned:
    return assign_newcomers(source, shard, known, join(folder, f"{shard.name}.parquet"), seed=seed)


def assign_newcomers(
    source: VectorSource, shard: Shard, known: KnownClusters, path: str, *, seed: int
) -> Assigned:
    """Assign the documents of one shard, write them to ``path``, and count them."""
    index, finder = NearestCentroids(known.centroids, count=1), NoiseFinder(known.regions)
    parts = []
    with table_writer(path) as write:
        for block in read_blocks(source, shard):
            assigned = index.assign(block.vectors)
            places, distances = assigned.cluster_ids, assigned.distances.astype(np.float32)
            novel = distances >= known.limits[places]
            noise = finder.find(block.vectors, hash_ids(block.ids, known.seed))
            own = {} if block.documents is None else {DOCUMENT: block.documents}
            given = {
                "cluster_id": pa.array(mark_noise(known.ids[places], noise)),
                "distance": distances,
                "novel": novel,
            }
            write(pa.table({"id": block.ids, **own, **given}))
            parts.append(_count(block, places, distances, novel, noise, len(known.ids), seed))
    return merge_assigned(parts)


def _count(
    block: Block,
    places: np.ndarray,
    distances: np.ndarray,
    novel: np.ndarray,
    noise: np.ndarray,
    k: int,
    seed: int,
) -> Assigned:
    orders = hash_ids(block.ids, seed)
    rows = np.concatenate([_lowest(orders, novel), _lowest(orders, ~novel)])
    chosen = pa.array(rows)
    columns: dict[str, Any] = {
        "id": block.ids.take(chosen),
        "order": orders[rows],
        "novel": novel[rows],
        "place": places[rows].astype(np.int32),
        "vector": vectors_to_column(block.vectors[rows]),
    }
    if block.texts is not None:
        columns["text"] = shorten_texts(block.texts.take(chosen), _TEXT_CHARACTERS)
    return Assigned(
        np.bincount(places[~noise], minlength=k),
        int(noise.sum()),
        np.bincount(places[novel], minlength=k),
        block.rejected,
        pa.table(columns),
    )


def _lowest(orders: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The rows ``among``, bool (n,), with the lowest ``orders``, uint64 (n,): at most 5,000."""
    rows = np.flatnonzero(among)
    return rows[np.argsort(orders[rows], kind="stable")[:SAMPLED]]


def merge_assigned(parts: list[Assigned]) -> Assigned:
    """The documents of all ``parts``, in whatever order those come."""
    sample = pa.concat_tables([part.sample for part in parts])
    orders, novel = sample.column("order").to_numpy(), sample.column("novel").to_numpy()
    rows = np.concatenate([_lowest(orders, novel), _lowest(orders, ~novel)])
    return Assigned(
        np.sum([part.sizes for part in parts], axis=0),
        sum(part.noise for part in parts),
        np.sum([part.novel for part in parts], axis=0),
        pa.concat_tables([part.rejected for part in parts]).sort_by("id"),
        sample.take(pa.array(rows)).combine_chunks(),
    )


def _from_tables(tables: Mapping[str, pa.Table]) -> Assigned:
    sizes, novel = (column.to_numpy() for column in tables["counts"].columns)
    noise = tables["noise"]["noise"][0].as_py()
    return Assigned(sizes, noise, novel, tables["rejected"], tables["sample"])


def describe_novel(assigned: Assigned, known: KnownClusters, seed: int) -> pa.Table:
    """What the novel documents have in common: their own few clusters, the largest first.

    ``novel_cluster_id``, ``size`` (of the sample), ``share`` of the novel documents, ``keywords``
    that set them apart from each other and from other documents, ``representative_ids`` and
    ``nearest_cluster_id``, the known cluster that most of them were given to.
    """
    sample = assigned.sample.filter(assigned.sample.column("novel"))
    ids, cluster_of = np.unique(known.ids, return_inverse=True)
    vectors = column_to_vectors(sample.column("vector"))
    places = cluster_of[sample.column("place").to_numpy()]
    groups, centroids = _group(vectors, seed)
    k = len(centroids)
    keywords: list[list[str]] = [[] for _ in range(k)]
    if "text" in sample.column_names and k:
        others = assigned.sample.filter(pa.compute.invert(assigned.sample.column("novel")))
        texts = pa.concat_tables([sample, others]).column("text").to_pylist()
        everyone = np.concatenate([groups, np.full(len(others), k, dtype=groups.dtype)])
        among = k + bool(len(others))
        keywords = find_keywords([text or "" for text in texts], everyone, among)[:k]
    rows = []
    for group in range(k):
        members = np.flatnonzero(groups == group)
        distances = squared_distances_to(vectors[members], centroids, groups[members])
        nearest = members[np.argsort(distances, kind="stable")[:_REPRESENTATIVES]]
        rows.append(
            {
                "novel_cluster_id": group,
                "size": len(members),
                "share": len(members) / len(sample),
                "keywords": keywords[group],
                "representative_ids": sample.column("id").take(pa.array(nearest)).to_pylist(),
                "nearest_cluster_id": int(ids[np.bincount(places[members]).argmax()]),
            }
        )
    return pa.Table.from_pylist(
        rows,
        pa.schema(
            [
                ("novel_cluster_id", pa.int32()),
                ("size", pa.int64()),
                ("share", pa.float64()),
                ("keywords", pa.list_(pa.string())),
                ("representative_ids", pa.list_(sample.schema.field("id").type)),
                ("nearest_cluster_id", pa.int32()),
            ]
        ),
    )


def _group(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of ``vectors``, float32 (n, d): ids, int32 (n,), and centroids, largest first."""
    if not len(vectors):
        return np.empty(0, dtype=np.int32), vectors
    options = FitOptions(seed=seed, restarts=2)
    k = 1
    if len(vectors) >= _FEWEST_TO_CLUSTER:
        k = choose_num_clusters(vectors, options, most=_MOST_CLUSTERS).k
    centroids = fit_in_memory(vectors, k, options).centroids
    return NearestCentroids(centroids).nearest(vectors)[:, 0], centroids


def _write_rejected(folder: str, rejected: pa.Table) -> None:
    path = join(folder, "rejected.parquet")
    if len(rejected):
        write_table(path, rejected)
    else:
        remove_stale(folder, r"rejected\.parquet", set())


def _table_for_people(
    assigned: Assigned, novel: pa.Table, known: KnownClusters, config: AssignConfig
) -> dict[str, str]:
    # A cluster that people merged has several centroids.
    cluster_of = np.unique(known.ids, return_inverse=True)[1]
    sizes = np.bincount(cluster_of, weights=assigned.sizes)
    noise = {"noise": f"{assigned.noise:,} in no dense region"} if assigned.noise else {}
    rows = {
        "documents": f"{int(sizes.sum()) + assigned.noise:,}",
        **noise,
        "clusters that got some": f"{int((sizes > 0).sum()):,} of {len(sizes):,}",
        "novel": f"{int(assigned.novel.sum()):,} ({assigned.novel_share:.1%}), beyond the "
        f"{config.quantile:g} quantile of their cluster's distances",
    }
    for row in novel.to_pylist():
        words = ", ".join(row["keywords"][:5]) or f"such as {row['representative_ids'][0]}"
        rows[f"novel group {row['novel_cluster_id']}"] = f"{row['share']:.0%}: {words}"
    return rows | {"output": config.output}
