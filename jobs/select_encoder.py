"""Choose prompt, pooling and layer: ``python jobs/select_encoder.py --corpus docs.parquet``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/select_encoder.py …``. With no
option at all it chooses for the demo corpus, without a look at its labels.
"""

from pipelines.evaluation.config import SelectConfig
from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord


def select(config: SelectConfig, record: RunRecord) -> JobResult:
    """Try prompts, poolings and layers."""
    from pipelines.evaluation.select import select_encoder  # slow, and --help goes without it

    return select_encoder(config, record)


if __name__ == "__main__":
    run_job("select_encoder", SelectConfig, select)
