import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.runtime.machines import parse_resources

ROOT = Path(__file__).parents[2]
PATH = ROOT / "ray_cluster.yaml"


@pytest.fixture
def cluster_file():
    return yaml.safe_load(PATH.read_text())


def start_commands(cluster_file) -> dict[str, str]:
    return {
        kind: " ".join(cluster_file[f"{kind}_start_ray_commands"]) for kind in ("head", "worker")
    }


def test_ray_accepts_the_cluster_file(cluster_file):
    prepared = prepare_config(cluster_file)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "cpu_worker", "gpu_worker"}


def test_nothing_is_scheduled_on_the_head(cluster_file):
    assert cluster_file["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_every_kind_of_node_says_its_role(cluster_file):
    roles = {
        name: kind["labels"]["shoal-role"]
        for name, kind in cluster_file["available_node_types"].items()
    }
    assert roles == {"head": "head", "cpu_worker": "cpu", "gpu_worker": "accelerator"}


def test_workers_scale_from_zero_and_gpu_workers_are_spot(cluster_file):
    workers = [
        kind for name, kind in cluster_file["available_node_types"].items() if name != "head"
    ]
    assert [kind["min_workers"] for kind in workers] == [0, 0]
    gpu = cluster_file["available_node_types"]["gpu_worker"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert 0 < cluster_file["idle_timeout_minutes"] <= 30


def test_jobs_are_told_what_the_workers_add_up_to(cluster_file):
    workers = [
        kind for name, kind in cluster_file["available_node_types"].items() if name != "head"
    ]
    assert sum(kind["max_workers"] for kind in workers) <= cluster_file["max_workers"]
    found = {
        name: sum(kind["max_workers"] * kind["resources"].get(name, 0) for kind in workers)
        for name in ("CPU", "GPU")
    }
    for command in start_commands(cluster_file).values():
        assert parse_resources(re.search(r"SHOAL_MAX_RESOURCES=(\S+)", command)[1]) == found


def test_every_machine_installs_from_the_committed_constraints(cluster_file):
    assert any("constraints.txt" in command for command in cluster_file["setup_commands"])
    assert (ROOT / "constraints.txt").is_file()


def test_the_images_ray_is_the_locked_one(cluster_file):
    locked = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f":{locked}-py311" in cluster_file["docker"]["image"]


def test_the_dashboard_listens_on_loopback_only(cluster_file):
    assert "--dashboard-host=127.0.0.1" in start_commands(cluster_file)["head"]


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_machine_has_a_home_json_logs_and_time_to_stop(cluster_file, kind):
    command = start_commands(cluster_file)[kind]
    for setting in ("SHOAL_HOME=", "SHOAL_LOG_FORMAT=json", "RAY_JOB_STOP_WAIT_TIME_S="):
        assert setting in command
