"""Find near-duplicates: ``python jobs/deduplicate_corpus.py --embeddings DIR --similarity 0.95``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/deduplicate_corpus.py …``. With
``--method text`` any Parquet with an id and a text column; with ``--write-clean`` the kept rows.
"""

from cluster.deduplication import DeduplicateConfig, deduplicate_corpus
from pipelines.runtime.command import run_job

if __name__ == "__main__":
    run_job(
        "deduplicate_corpus",
        DeduplicateConfig,
        deduplicate_corpus,
        inputs=("embeddings",),
        keep_complete=True,
    )
