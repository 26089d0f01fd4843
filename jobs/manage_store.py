"""Manage a store: ``python jobs/manage_store.py list --store DIR``.

Verbs: list, show, publish, rollback, prune, verify, export, tag, untag, edit, backfill,
compare. On a Ray cluster:
``ray job submit --working-dir . -- python jobs/manage_store.py rollback --store s3://BUCKET/store``.
"""

from typing import Any

from pipelines.runtime.command import Answer, leaving_at_once, run_verbs
from pipelines.store.config import VERBS


def answer(config: Any) -> Answer:
    """Do what one of the verbs asks for."""
    from pipelines.store.manage import manage_store  # slow, and --help goes without it

    return manage_store(config)


if __name__ == "__main__":
    with leaving_at_once():
        run_verbs("manage_store", VERBS, answer)
