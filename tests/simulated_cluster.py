"""The Ray cluster of ``ray_cluster.yaml`` on this machine, autoscaler included.

A head with its job server on loopback, and Ray's own autoscaler, which starts nodes of the file's
types as processes here (:mod:`simulated_nodes`) and ends them when idle. GPUs are
pretended: Ray schedules by them, torch sees none. CPUs are divided, for a small machine.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ports import free_port

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
HEAD_ID = "f" * 51 + "00000"
FEWER_CPUS = 4
WORKERS = {"cpu_worker": 1, "gpu_worker": 2}
IDLE_SECONDS = 20
STORE_BYTES = 100 << 20
PROVIDER = {
    "type": "external",
    "module": "simulated_nodes.ApartNodes",
    "launch_multiple": True,
    "head_node_id": HEAD_ID,
    "use_node_id_as_ip": True,
    "disable_node_updaters": True,
    "disable_launch_config_check": True,
}
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    # A killed node is noticed within seconds, a stopped job's processes get time to end.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_JOB_STOP_WAIT_TIME_S": "20",
}
_LISTS = ("initialization_commands", "setup_commands", "head_setup_commands")
_LISTS += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def cluster_file() -> dict[str, Any]:
    """The content of ``ray_cluster.yaml``."""
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def simulated_config(gcs_port: int) -> dict[str, Any]:
    """The autoscaler's configuration: the file's node types, started here."""
    types = cluster_file()["available_node_types"]
    found: dict[str, Any] = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    }
    for name, most in WORKERS.items():
        resources = dict(types[name]["resources"])
        resources["CPU"] //= FEWER_CPUS
        resources["object_store_memory"] = STORE_BYTES
        found[name] = {
            "resources": resources,
            "labels": types[name]["labels"],
            "node_config": {},
            "min_workers": types[name]["min_workers"],
            "max_workers": most,
        }
    return {
        "cluster_name": "simulated",
        "max_workers": sum(WORKERS.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": {**PROVIDER, "gcs_address": f"127.0.0.1:{gcs_port}"},
        "auth": {},
        "available_node_types": found,
        "head_node_type": "ray.head.default",
        "head_node": {},
        "worker_nodes": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in _LISTS},
    }


class SimulatedCluster:
    """Started on creation; :meth:`close` ends every process of it and no other."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.log = folder / "head.log"
        self.gcs, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        # Not below ``folder``: paths of sockets must be short.
        self.node_folders = Path(tempfile.mkdtemp(prefix="nodes-"))
        config = simulated_config(self.gcs)
        types = config["available_node_types"].values()
        cpus, gpus = (
            sum(kind["resources"].get(name, 0) * kind["max_workers"] for kind in types)
            for name in ("CPU", "GPU")
        )
        self.environment = {
            **environment,
            **ENVIRONMENT,
            "SHOAL_MAX_RESOURCES": f"CPU={cpus},GPU={gpus}",
        }
        path = folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        command = [RAY, "start", "--head", "--block", f"--port={self.gcs}", "--num-cpus=0"]
        command += ["--node-ip-address=127.0.0.1", f"--autoscaling-config={path}"]
        command += ["--labels=shoal-role=head", f"--metrics-export-port={free_port()}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        # A Ray of other tests may hold the agent's usual port, and no job is taken without one.
        command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
        command += [f"--object-store-memory={STORE_BYTES}"]
        with self.log.open("wb") as output:
            self.head = subprocess.Popen(
                command,
                env={
                    **self.environment,
                    "PYTHONPATH": str(ROOT / "tests"),  # for PROVIDER
                    "SIMULATED_NODES": str(self.node_folders),
                },
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.wait_for(self._answers, 120, "job server")

    def submit(
        self, entrypoint: Sequence[str], *, cwd: Path, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """``ray job submit`` and its output, as a person would run it."""
        command = [RAY, "job", "submit", "--address", self.address, *options, "--", *entrypoint]
        deadline = time.monotonic() + 120
        while True:
            done = subprocess.run(
                [str(part) for part in command], cwd=cwd, env=self.environment,
                capture_output=True, text=True, timeout=580, check=False,
            )  # fmt: skip
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(2)  # the head answers a little before its agent does

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """``ray …`` with the address of this Ray cluster in the environment."""
        environment = {**self.environment, "RAY_API_SERVER_ADDRESS": self.address}
        return subprocess.run(
            [RAY, *arguments], cwd=cwd, env=environment,
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    def state(self, what: str, **filters: str) -> list[dict[str, Any]]:
        """Rows of Ray's state API: ``nodes``, ``tasks``, ``actors``."""
        query = "&".join(
            f"filter_keys={key}&filter_predicates=%3D&filter_values={value}"
            for key, value in filters.items()
        )
        answer = self._get(f"/api/v0/{what}?detail=true&limit=10000&{query}")
        return json.loads(answer)["data"]["result"]["result"]

    def nodes(self) -> dict[str, str]:
        """Role of every node that is alive, by the node's id."""
        return {
            row["node_id"]: row["labels"]["shoal-role"]
            for row in self.state("nodes")
            if row["state"] == "ALIVE"
        }

    def count(self, role: str) -> int:
        """How many nodes of a role are alive."""
        return list(self.nodes().values()).count(role)

    def job_status(self, submission: str) -> str:
        """``RUNNING``, ``SUCCEEDED``, ``STOPPED``, ``FAILED`` …"""
        return json.loads(self._get(f"/api/jobs/{submission}"))["status"]

    def kill_node(self, role: str) -> None:
        """kill -9 of a node's raylet, as when its machine is taken away."""
        victim = next(node for node, found in self.nodes().items() if found == role)
        for pid, content in self._processes():
            if b"raylet/raylet" in content.split(b"\0")[0] and victim.encode() in _environment(pid):
                os.kill(pid, signal.SIGKILL)
                return
        raise AssertionError(f"no raylet of node {victim}")

    @property
    def session(self) -> Path:
        """Folder of the head."""
        found = re.search(r"(\S*/session_[^/\s]+)/logs", self.log.read_text())
        assert found
        return Path(re.sub(r"\x1b\[\d+m", "", found[1]))

    def logs(self) -> list[Path]:
        """Log files of the head and of all nodes that there were."""
        folders = [self.session, *self.node_folders.glob("*/session_*")]
        found = {path.resolve() for folder in folders for path in (folder / "logs").rglob("*")}
        return sorted(path for path in found if path.is_file())

    def driver_log(self, submission: str) -> str:
        """What a submitted job's driver printed, also on a node that has gone since."""
        return next(p for p in self.logs() if p.name == f"job-driver-{submission}.log").read_text()

    def metrics(self) -> str:
        """What Prometheus would read from all nodes, found as it would find them."""
        found = ""
        discovery = self.session / "prom_metrics_service_discovery.json"
        if not discovery.exists():
            discovery = self.session.parent / discovery.name
        for address in json.loads(discovery.read_text())[0]["targets"]:
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                    found += answer.read().decode()
            except OSError:  # of a node that has gone
                continue
        return found

    def wait_for(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until ``ready()``; fails with the head's log."""
        deadline = time.monotonic() + seconds
        while not ready():
            ended = self.head.poll() is not None
            assert not ended, f"the head ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} in {seconds} s: {self.log.read_text()}"
            time.sleep(0.5)

    def close(self) -> None:
        """End the head, then the nodes that its autoscaler had started."""
        self.head.send_signal(signal.SIGTERM)
        try:
            self.head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.head.pid, signal.SIGKILL)
        for pid, _ in self._processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.node_folders, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            self._get("/api/jobs/")
            return bool(self.nodes())
        except OSError:
            return False

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=20) as answer:
            return answer.read().decode()

    def _processes(self) -> list[tuple[int, bytes]]:
        """Processes whose command line names this Ray cluster's address."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    content = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if f"127.0.0.1:{self.gcs}".encode() in content:
                    found.append((int(entry.name), content))
        return found


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
