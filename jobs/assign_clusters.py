"""Give new embeddings to clusters that exist, and say which of them fit nowhere.

Run ``python jobs/assign_clusters.py --embeddings NEW --clusters CLUSTERED --output OUT``, or submit
it to a Ray cluster with ``ray job submit --working-dir . -- python jobs/assign_clusters.py …``.
"""

from cluster.config import AssignConfig
from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord


def assign(config: AssignConfig, record: RunRecord) -> JobResult:
    """Assign the vectors to the clusters of a folder or of a store."""
    # slow, and --help goes without them
    from cluster.known import KnownClusters, read_clustering
    from cluster.newcomers import assign_clusters
    from pipelines.nightly.clusters import is_store, read_published_clusters

    def read_clusters(config: AssignConfig) -> KnownClusters:
        version = config.clusters_version
        if is_store(config.clusters):
            return read_published_clusters(config.clusters, version, config.quantile)
        if version is not None:
            raise InputError(
                f"--clusters-version names a store's version, and {config.clusters} is no store"
            )
        return read_clustering(config.clusters, config.quantile)

    return assign_clusters(config, record, read=read_clusters)


if __name__ == "__main__":
    run_job(
        "assign_clusters",
        AssignConfig,
        assign,
        inputs=("embeddings", "clusters"),
        keep_complete=True,
    )
