"""Tune an adapter: ``python jobs/finetune_adapter.py --corpus docs.parquet --output adapter``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/finetune_adapter.py …``. With no
option at all it tunes the packaged model on crops of the packaged training corpus.
"""

from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord
from pipelines.training.config import FinetuneConfig


def finetune(config: FinetuneConfig, record: RunRecord) -> JobResult:
    """Tune the adapter."""
    from pipelines.training.job import finetune_adapter  # slow, and --help goes without it

    return finetune_adapter(config, record)


if __name__ == "__main__":
    run_job("finetune_adapter", FinetuneConfig, finetune, keep_complete=True)
