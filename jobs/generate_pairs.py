"""Make training pairs: ``python jobs/generate_pairs.py --corpus docs.parquet --output pairs``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/generate_pairs.py …``. With no
option at all it crops the packaged training corpus.
"""

from pipelines.command_line import run_job
from pipelines.pairs import generate_pairs
from pipelines.training.pairs_config import PairsConfig

if __name__ == "__main__":
    run_job("generate_pairs", PairsConfig, generate_pairs, keep_complete=True)
