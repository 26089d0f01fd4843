import threading
import time

import pytest

from pipelines.runtime.threads import made_ahead


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
