"""Make training pairs: ``python jobs/generate_pairs.py --corpus docs.parquet --output pairs``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/generate_pairs.py …``. With no
option at all it crops the packaged training corpus.
"""

from pipelines.runtime.command import run_job
from pipelines.training.pairs import PairsConfig, generate_pairs

if __name__ == "__main__":
    run_job("generate_pairs", PairsConfig, generate_pairs, keep_complete=True)
