"""Make training pairs: ``python jobs/generate_pairs.py --corpus docs.parquet --output pairs``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/generate_pairs.py …``. With no
option at all it crops the packaged training corpus.
"""

from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord
from pipelines.training.config import PairsConfig


def generate(config: PairsConfig, record: RunRecord) -> JobResult:
    """Make the pairs."""
    from pipelines.training.pairs import generate_pairs  # slow, and --help goes without it

    return generate_pairs(config, record)


if __name__ == "__main__":
    run_job("generate_pairs", PairsConfig, generate, keep_complete=True)
