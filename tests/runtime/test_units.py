"""Units of work run by tasks and by actors, and their errors arrive as they were raised."""

import functools
import os

import pyarrow as pa
import pytest

from pipelines.runtime import machines, units
from pipelines.runtime.command import report_error
from pipelines.runtime.errors import InputError
from pipelines.runtime.units import map_on_ray, run_actor_stage, run_stage, stream_units


def double(name, unit):
    return {"name": name, "double": 2 * unit}


def refuse(name, *_):
    raise InputError(f"{name} cannot be used")


def refuse_all(*_):
    raise InputError("it cannot be used")


def process_of(*_):
    return {"process": os.getpid()}


def add(name, unit, loaded):
    return {"sum": unit + loaded}


def load_ten():
    return 10


def load_nothing():
    raise InputError("the adapter belongs to another model")


def as_table(name, unit):
    return pa.table({"name": [name], "square": [unit * unit]})


UNITS = {"a": 1, "b": 2, "c": 3}


@pytest.fixture
def work(tmp_path, local_ray):
    return str(tmp_path)


def test_units_are_done_once_and_their_receipts_come_in_order(work):
    receipts = run_stage(work, "doubles", UNITS, double)
    assert list(receipts) == ["a", "b", "c"]
    assert [receipt["double"] for receipt in receipts.values()] == [2, 4, 6]
    assert run_stage(work, "doubles", UNITS, refuse) == receipts


def test_a_single_unit_on_one_machine_is_done_in_this_process(work, monkeypatch):
    here = {"process": os.getpid()}
    assert list(run_stage(work, "one", {"a": 1}, process_of).values()) == [here]
    assert list(map_on_ray(process_of, [1])) == [here]
    assert here not in run_stage(work, "many", UNITS, process_of).values()
    monkeypatch.setattr(units, "is_one_machine", lambda: False)
    assert here not in run_stage(work, "elsewhere", {"a": 1}, process_of).values()
    assert here not in map_on_ray(process_of, [1])


def test_while_ray_is_put_off_units_are_done_here_for_a_time(work, monkeypatch):
    here = {"process": os.getpid()}
    monkeypatch.setattr(machines, "_start", lambda: started.append(1))
    started = []
    assert list(run_stage(work, "soon", UNITS, process_of).values()) == [here] * 3
    assert list(map_on_ray(process_of, UNITS)) == [here] * 3
    assert not started
    monkeypatch.setattr(units, "_SECONDS_HERE", 0.0)
    assert here not in run_stage(work, "late", UNITS, process_of).values()
    assert started == [1]
    assert here not in map_on_ray(process_of, UNITS)
    assert started == [1]


def test_actors_do_units_with_what_they_loaded_once(work):
    told = []
    receipts = run_actor_stage(
        work,
        "sums",
        UNITS,
        add,
        load_ten,
        num_actors=2,
        on_done=lambda name, receipt: told.append((name, receipt["sum"])),
    )
    assert [receipt["sum"] for receipt in receipts.values()] == [11, 12, 13]
    assert sorted(told) == [("a", 11), ("b", 12), ("c", 13)]


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (lambda work: run_stage(work, "tasks", UNITS, refuse_all), "it cannot be used"),
        (lambda work: run_stage(work, "here", {"a": 1}, refuse_all), "it cannot be used"),
        (
            lambda work: run_actor_stage(
                work, "calls", {"a": 1}, refuse_all, load_ten, num_actors=1
            ),
            "it cannot be used",
        ),
        (
            lambda work: run_actor_stage(work, "loads", {"a": 1}, add, load_nothing, num_actors=1),
            "the adapter belongs to another model",
        ),
        (lambda _: list(map_on_ray(refuse_all, ["a", "b", "c"])), "it cannot be used"),
    ],
    ids=["task", "this process", "actor's call", "actor's constructor", "map"],
)
def test_a_users_mistake_arrives_as_one_line_with_its_exit_code(work, capsys, run, line):
    with pytest.raises(Exception) as caught:
        run(work)
    assert report_error(caught.value) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_tables_of_units_come_as_they_are(local_ray):
    for actors in (0, 2):
        tables = stream_units("squares", UNITS, as_table, num_actors=actors)
        rows = [row for table in tables for row in table.to_pylist()]
        assert sorted(row["square"] for row in rows) == [1, 4, 9]


def test_items_come_back_in_order_and_only_a_few_are_submitted_ahead(local_ray, monkeypatch):
    import ray

    submitted = []
    remote = ray.remote

    def counting(**options):
        def decorate(function):
            task = remote(**options)(function)

            class Task:
                @staticmethod
                def remote(call, item):
                    submitted.append(item)
                    return task.remote(call, item)

            return Task

        return decorate

    monkeypatch.setattr(ray, "remote", counting)
    results = map_on_ray(functools.partial(pow, 2), list(range(40)))
    assert next(results) == 1
    assert len(submitted) < 20
    assert list(results) == [2**n for n in range(1, 40)]
