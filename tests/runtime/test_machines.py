import pytest

from pipelines.runtime.errors import InputError
from pipelines.runtime.machines import OFF_ACCELERATORS, RayNodes, parse_resources


def node(name, role=None, **resources):
    return {
        "NodeID": name,
        "Labels": {"shoal-role": role} if role else {},
        "Resources": {kind: float(amount) for kind, amount in resources.items()},
    }


LABELLED = [
    node("h", "head"),
    node("c", "cpu", CPU=16),
    node("g", "accelerator", CPU=8, GPU=1),
]


def test_work_keeps_off_accelerators_where_a_node_is_made_for_it():
    assert RayNodes(LABELLED, {}).cpu_selector == OFF_ACCELERATORS


@pytest.mark.parametrize(
    "nodes", [[node("a", CPU=8, GPU=1)], [node("h", "head"), node("g", "accelerator", CPU=8)]]
)
def test_work_runs_anywhere_else(nodes):
    assert RayNodes(nodes, {}).cpu_selector is None


def test_resources_are_those_of_all_nodes():
    assert RayNodes(LABELLED, {}, "h").resources() == {"CPU": 24, "GPU": 1}


def test_a_driver_on_a_cpu_node_holds_one_of_its_cpus():
    assert RayNodes(LABELLED, {}, "c").resources() == {"CPU": 23, "GPU": 1}


def test_what_the_autoscaler_may_add_counts():
    nodes = RayNodes([node("h", "head")], {"CPU": 64.0, "GPU": 8.0}, "h")
    assert nodes.resources() == {"CPU": 64, "GPU": 8}
    assert nodes.count > 1


def test_growth_never_hides_what_is_there():
    assert RayNodes(LABELLED, {"CPU": 4.0}).resources() == {"CPU": 24, "GPU": 1}


def test_max_resources_are_read():
    assert parse_resources("CPU=64, GPU=8") == {"CPU": 64, "GPU": 8}
    assert parse_resources("") == {}


@pytest.mark.parametrize("text", ["CPU", "CPU=many", "TPU=4", "GPU=-1"])
def test_bad_max_resources_are_an_error(text):
    with pytest.raises(InputError, match="SHOAL_MAX_RESOURCES is"):
        parse_resources(text)
