import os
from pathlib import Path

import pytest

from pipelines.runtime.errors import InputError
from pipelines.runtime.machines import (
    OFF_ACCELERATORS,
    RayNodes,
    keep_sockets_short,
    parse_resources,
    usable_cpus,
    usable_memory_bytes,
)


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


def test_tasks_count_what_the_autoscaler_can_add_without_accelerators_or_the_drivers_cpu():
    assert RayNodes(LABELLED, {}, "h").cpus == 16
    assert RayNodes(LABELLED, {}, "c").cpus == 15
    assert RayNodes(LABELLED, {"CPU": 72}, "c").cpus == 64
    assert RayNodes([node("a", CPU=8, GPU=1)], {}).cpus == 8
    assert RayNodes([node("h", "head")], {}).cpus == 1


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, 64),
        ({"sys/fs/cgroup/memory.max": "max"}, 64),
        ({"sys/fs/cgroup/memory.max": "8"}, 8),
        (
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/memory.max": "16",
                "sys/fs/cgroup/pod/box/memory.max": "32",
            },
            16,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "4",
            },
            4,
        ),
    ],
)
def test_memory_is_what_the_control_group_lets_a_process_have(tmp_path, monkeypatch, files, memory):
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 8, "SC_PAGE_SIZE": 8}.get)
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert usable_memory_bytes(str(tmp_path)) == memory


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 64),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 64),
        ({"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "5000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            },
            3,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_a_containers_quota_of_cpus_is_kept(tmp_path, monkeypatch, files, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert usable_cpus(str(tmp_path)) == cpus


def test_a_folder_too_long_for_rays_sockets_is_replaced_by_a_short_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/r")
    keep_sockets_short()
    assert os.environ["RAY_TMPDIR"] == "/tmp/r"
    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 80)))
    keep_sockets_short()
    short = Path(os.environ["RAY_TMPDIR"])
    assert short.is_dir()
    assert len(str(short)) < 30
    short.rmdir()


def test_where_there_is_no_short_folder_one_line_says_so(monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 80)
    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(InputError, match=r"set RAY_TMPDIR to a folder of at most 3\d bytes"):
        keep_sockets_short()
