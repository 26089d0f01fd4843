"""Cluster embeddings and write assignments, centroids, scores and a report.

Run ``python jobs/cluster_corpus.py --embeddings DIR --num-clusters 20 --label-column label``, or
submit it to a Ray cluster with ``ray job submit --working-dir . -- python jobs/cluster_corpus.py``.
"""

from collections.abc import Sequence
from functools import partial

from cluster.clustering import cluster_corpus
from cluster.config import MAY_CHANGE, ClusterConfig
from cluster.outcome import Brief
from pipelines.runtime.command import run_job


def ask_model(model: str, levels: Sequence[Sequence[Brief]]) -> list[list[str | None]]:
    """Names for the clusters of each level by an instruct LLM."""
    # Here, because torch is large and most runs ask for no names.
    from pipelines.encoder.titles import name_levels

    return name_levels(model, levels)


if __name__ == "__main__":
    run_job(
        "cluster_corpus",
        ClusterConfig,
        partial(cluster_corpus, namer=ask_model),
        inputs=("embeddings",),
        may_change=MAY_CHANGE,
        keep_complete=True,
    )
