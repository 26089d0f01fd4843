"""Work that goes on in another thread meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def made_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items, each made in another thread while the one before it is used.

    One is made ahead of those asked for. What making one raises is raised in its turn.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Iterator[Result]:
    """What a function of torch gives for the items, in their order, ``at_once`` of them at a time.

    Each has its share of torch's threads. Threads that take an item each do not wait for one
    another after every operation, as those of one operation do. What one raises is raised.
    """
    import torch  # where it is used it is there already; jobs' drivers do without it

    if at_once <= 1:
        yield from map(function, items)
        return
    all_threads = torch.get_num_threads()
    share = max(1, all_threads // at_once)
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(share,))
    try:
        with pool:
            yield from pool.map(function, items)
    finally:  # what a thread sets holds for those that begin later too
        torch.set_num_threads(all_threads)
