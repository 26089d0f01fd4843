"""Find near-duplicates: ``python jobs/deduplicate_corpus.py --embeddings DIR --similarity 0.95``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/deduplicate_corpus.py …``. With
``--method text`` any Parquet with an id and a text column; with ``--write-clean`` the kept rows.
"""

from cluster.config import DeduplicateConfig
from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord


def deduplicate(config: DeduplicateConfig, record: RunRecord) -> JobResult:
    """Find what is to be removed."""
    from cluster.deduplication import deduplicate_corpus  # slow, and --help goes without it

    return deduplicate_corpus(config, record)


if __name__ == "__main__":
    run_job(
        "deduplicate_corpus",
        DeduplicateConfig,
        deduplicate,
        inputs=("embeddings",),
        keep_complete=True,
    )
