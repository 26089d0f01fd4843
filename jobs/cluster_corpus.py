"""Cluster embeddings and write assignments, centroids, scores and a report.

Run ``python jobs/cluster_corpus.py --embeddings DIR --num-clusters 20 --label-column label``, or
submit it to a Ray cluster with ``ray job submit --working-dir . -- python jobs/cluster_corpus.py``.
"""

from collections.abc import Sequence

from cluster.config import ClusterConfig
from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord


def cluster(config: ClusterConfig, record: RunRecord) -> JobResult:
    """Cluster the vectors."""
    from cluster.clustering import cluster_corpus  # slow, and --help goes without it
    from cluster.outcome import Brief

    def ask_model(model: str, levels: Sequence[Sequence[Brief]]) -> list[list[str | None]]:
        from pipelines.encoder.titles import name_levels  # torch: most runs ask for no names

        return name_levels(model, levels)

    return cluster_corpus(config, record, namer=ask_model)


if __name__ == "__main__":
    run_job("cluster_corpus", ClusterConfig, cluster, inputs=("embeddings",), keep_complete=True)
