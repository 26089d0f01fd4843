"""Cluster embeddings and write assignments, centroids, scores and a report.

Run ``python jobs/cluster_corpus.py --embeddings DIR --num-clusters 20 --label-column label``, or
submit it to a Ray cluster with ``ray job submit --working-dir . -- python jobs/cluster_corpus.py``.
"""

from cluster.clustering import ClusterConfig, cluster_corpus
from pipelines.command_line import run_job

if __name__ == "__main__":
    run_job("cluster_corpus", ClusterConfig, cluster_corpus, inputs=("embeddings",))
