"""Embed a corpus: ``python jobs/embed_corpus.py --corpus docs.parquet --output out``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/embed_corpus.py …``. With no
option at all it embeds the demo corpus with the packaged model, and keeps its text and label.
"""

from pipelines.embedding.job import MAY_CHANGE, EmbedConfig, embed_corpus
from pipelines.runtime.command import run_job

if __name__ == "__main__":
    run_job("embed_corpus", EmbedConfig, embed_corpus, may_change=MAY_CHANGE, keep_complete=True)
