"""See what the last token attends to: ``python jobs/inspect_attention.py --text "A text."``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/inspect_attention.py …``. With no
text it averages over documents of the demo corpus; ``--adapters`` compares before and after tuning.
"""

from pipelines.evaluation.config import AttentionConfig
from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord


def inspect(config: AttentionConfig, record: RunRecord) -> JobResult:
    """Look at the last token."""
    from pipelines.evaluation.attention import inspect_attention  # slow, and --help goes without it

    return inspect_attention(config, record)


if __name__ == "__main__":
    run_job("inspect_attention", AttentionConfig, inspect)
