from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PATH = Path(__file__).parent.parent / "ray_cluster.yaml"


@pytest.fixture
def cluster_file():
    return yaml.safe_load(PATH.read_text())


def test_ray_accepts_the_cluster_file(cluster_file):
    prepared = prepare_config(cluster_file)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "cpu_worker", "gpu_worker"}


def test_nothing_is_scheduled_on_the_head(cluster_file):
    assert cluster_file["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_gpu_workers_scale_from_zero_on_the_spot_market(cluster_file):
    gpu = cluster_file["available_node_types"]["gpu_worker"]
    assert gpu["min_workers"] == 0
    assert gpu["resources"]["GPU"] == 1
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_every_machine_installs_from_the_committed_constraints(cluster_file):
    assert any("constraints.txt" in command for command in cluster_file["setup_commands"])
    assert (PATH.parent / "constraints.txt").is_file()


def test_the_dashboard_listens_on_loopback_only(cluster_file):
    start = " ".join(cluster_file["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
