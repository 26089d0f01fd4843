"""Search a store: ``python jobs/search_store.py --store DIR --query "late goal" --limit 5``.

On a Ray cluster: ``ray job submit --working-dir . -- python jobs/search_store.py …``.
"""

from pipelines.runtime.command import Answer, leaving_at_once, run_query
from pipelines.store.config import SearchConfig


def search(config: SearchConfig) -> Answer:
    """Answer the question."""
    from pipelines.store.search import search_store  # slow, and --help goes without it

    return search_store(config)


if __name__ == "__main__":
    with leaving_at_once():
        run_query("search_store", SearchConfig, search)
