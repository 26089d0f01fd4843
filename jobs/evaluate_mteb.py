"""Score encoders with mteb: ``python jobs/evaluate_mteb.py --tasks clustering-eng-v2``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/evaluate_mteb.py …``. With no
option at all it scores the packaged model on the two packaged corpora, without a network.
"""

from pipelines.evaluation.config import EvaluateConfig
from pipelines.runtime.command import JobResult, run_job
from pipelines.runtime.run_record import RunRecord


def evaluate(config: EvaluateConfig, record: RunRecord) -> JobResult:
    """Score the encoders."""
    from pipelines.evaluation.evaluate import evaluate_encoders  # slow, and --help goes without it

    return evaluate_encoders(config, record)


if __name__ == "__main__":
    run_job("evaluate_mteb", EvaluateConfig, evaluate, keep_complete=True)
