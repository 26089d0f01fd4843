"""Manage a store: ``python jobs/manage_store.py list --store DIR``.

Verbs: list, show, publish, rollback, prune, verify, export, tag, untag, edit,
compare. On a Ray cluster:
``ray job submit --working-dir . -- python jobs/manage_store.py rollback --store s3://BUCKET/store``.
"""

from pipelines.runtime.command import run_verbs
from pipelines.store.manage import VERBS

if __name__ == "__main__":
    run_verbs("manage_store", VERBS)
