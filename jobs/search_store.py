"""Search a store: ``python jobs/search_store.py --store DIR --query "late goal" --limit 5``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/search_store.py …``.
"""

from pipelines.runtime.command import run_query
from pipelines.store.search import SEARCH

if __name__ == "__main__":
    run_query("search_store", SEARCH)
