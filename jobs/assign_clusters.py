"""Give new embeddings to clusters that exist, and say which of them fit nowhere.

Run ``python jobs/assign_clusters.py --embeddings NEW --clusters CLUSTERED --output OUT``, or submit
it to a Ray cluster with ``ray job submit --working-dir . -- python jobs/assign_clusters.py …``.
"""

from functools import partial

from cluster.config import MAY_CHANGE
from cluster.known import KnownClusters, read_clustering
from cluster.newcomers import AssignConfig, assign_clusters
from pipelines.nightly.clusters import is_store, read_published_clusters
from pipelines.runtime.command import run_job
from pipelines.runtime.errors import InputError


def read_clusters(config: AssignConfig) -> KnownClusters:
    """The clusters of a folder or of a store."""
    if is_store(config.clusters):
        return read_published_clusters(config.clusters, config.clusters_version, config.quantile)
    if config.clusters_version is not None:
        raise InputError(
            f"--clusters-version names a store's version, and {config.clusters} is no store"
        )
    return read_clustering(config.clusters, config.quantile)


if __name__ == "__main__":
    run_job(
        "assign_clusters",
        AssignConfig,
        partial(assign_clusters, read=read_clusters),
        inputs=("embeddings", "clusters"),
        may_change=MAY_CHANGE,
        keep_complete=True,
    )
