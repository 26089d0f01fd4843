"""Score encoders with mteb: ``python jobs/evaluate_mteb.py --tasks clustering-eng-v2``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/evaluate_mteb.py …``. With no
option at all it scores the packaged model on the two packaged corpora, without a network.
"""

from pipelines.evaluation.evaluate import MAY_CHANGE, EvaluateConfig, evaluate_encoders
from pipelines.runtime.command import run_job

if __name__ == "__main__":
    run_job(
        "evaluate_mteb",
        EvaluateConfig,
        evaluate_encoders,
        may_change=MAY_CHANGE,
        keep_complete=True,
    )
