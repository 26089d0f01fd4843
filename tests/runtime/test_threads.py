import threading
import time

import pytest
import torch

from pipelines.runtime.threads import made_ahead, side_by_side


def test_one_item_is_made_ahead_in_another_thread():
    made, here = [], threading.get_ident()

    def make(number):
        assert threading.get_ident() != here
        made.append(number)
        return number

    items = made_ahead(map(make, range(4)))
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while made != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [0, 1]
    assert list(items) == [1, 2, 3]


def test_an_error_comes_in_its_turn_and_none_is_an_item():
    items = made_ahead(map((1).__floordiv__, [1, 0]))
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert list(made_ahead(iter([None, None]))) == [None, None]


def test_who_stops_waits_for_the_item_that_is_being_made():
    busy = threading.Event()

    def slowly():
        yield 1
        time.sleep(0.05)
        busy.set()
        yield 2

    items = made_ahead(slowly())
    assert next(items) == 1
    items.close()
    assert busy.is_set()


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_side_by_side_results_come_in_order_and_threads_are_shared(at_once):
    threads = torch.get_num_threads()
    together = threading.Barrier(at_once, timeout=10)
    torch.set_num_threads(4)

    def work(number):
        together.wait()
        return number, torch.get_num_threads()

    try:
        found = list(side_by_side(work, range(2 * at_once), at_once))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert found == [(number, max(1, 4 // at_once)) for number in range(2 * at_once)]


def test_what_one_of_several_raises_is_raised():
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(side_by_side((1).__floordiv__, [1, 0, 1], 2))
    assert torch.get_num_threads() == threads
