"""See what the last token attends to: ``python jobs/inspect_attention.py --text "A text."``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/inspect_attention.py …``. With no
text it averages over documents of the demo corpus; ``--adapters`` compares before and after tuning.
"""

from pipelines.evaluation.attention import AttentionConfig, inspect_attention
from pipelines.runtime.command import run_job

if __name__ == "__main__":
    run_job("inspect_attention", AttentionConfig, inspect_attention)
