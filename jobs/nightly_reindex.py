"""Bring a store up to date: ``python jobs/nightly_reindex.py --corpus DIR --store DIR``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/nightly_reindex.py …``. Exit
codes: 0 published, or nothing had changed; 3 refused by a check, the candidate is kept; 75 another
run has the store; 2 bad input; 1 anything else.
"""

from collections.abc import Callable

from pipelines.nightly.config import NightConfig
from pipelines.runtime.command import JobResult, run_unrecorded_job


def reindex_store(config: NightConfig, connect: Callable[[], None]) -> JobResult:
    """Bring the store up to date."""
    from pipelines.nightly.job import reindex  # slow, and --help goes without it

    return reindex(config, connect)


if __name__ == "__main__":
    run_unrecorded_job("nightly_reindex", NightConfig, reindex_store)
