"""Cluster embeddings and write assignments, centroids, scores and a report.

Run ``python jobs/cluster_corpus.py --embeddings DIR --num-clusters 20 --label-column label``, or
submit it to a Ray cluster with ``ray job submit --working-dir . -- python jobs/cluster_corpus.py``.
"""

from cluster.config import ClusterConfig
from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord


def cluster(config: ClusterConfig, record: RunRecord) -> JobResult:
    """Cluster the vectors."""
    from cluster.clustering import cluster_corpus  # slow, and --help goes without it
    from pipelines.encoder.titles import TitleWriter

    model = config.name_model
    writer = None if model is None else TitleWriter(model, config.name_url)
    return cluster_corpus(config, record, namer=writer)


if __name__ == "__main__":
    run_job("cluster_corpus", ClusterConfig, cluster, inputs=("embeddings",), keep_complete=True)
