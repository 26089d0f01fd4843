"""Choose prompt, pooling and layer: ``python jobs/select_encoder.py --corpus docs.parquet``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/select_encoder.py …``. With no
option at all it chooses for the demo corpus, without a look at its labels.
"""

from pipelines.evaluation.select import MAY_CHANGE, SelectConfig, select_encoder
from pipelines.runtime.command import run_job

if __name__ == "__main__":
    run_job("select_encoder", SelectConfig, select_encoder, may_change=MAY_CHANGE)
