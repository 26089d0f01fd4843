"""Embed a corpus: ``python jobs/embed_corpus.py --corpus docs.parquet --output out``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/embed_corpus.py …``. With no
option at all it embeds the demo corpus with the packaged model, and keeps its text and label.
"""

from pipelines.embedding.config import EmbedConfig
from pipelines.runtime.command import JobResult, connect_ray, run_job
from pipelines.runtime.run_record import RunRecord


def embed(config: EmbedConfig, record: RunRecord) -> JobResult:
    """Embed the corpus."""
    from pipelines.embedding.job import embed_corpus  # slow, and --help goes without it

    return embed_corpus(config, record, connect_ray)


if __name__ == "__main__":
    run_job("embed_corpus", EmbedConfig, embed, keep_complete=True, connects=True)
