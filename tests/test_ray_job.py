"""The two main jobs as users submit them: ``ray job submit`` against a head on loopback."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_models import tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
TOPICS = ["the fox jumps over the dog", "the court ruled on the contract", "two eggs and warm milk"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What a job on the cluster sees: its own SHOAL_HOME and this interpreter as ``python``."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    return {
        **kept,
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
        "SHOAL_HOME": str(tmp_path_factory.mktemp("home")),
        "RAY_AUTH_MODE": "disabled",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def head(environment, tmp_path_factory):
    """Address of a Ray head with its job server; ended with all it started."""
    dashboard = free_port()
    command = [RAY, "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=4"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # A Ray of other tests may hold the agent's usual port, and no job is taken without an agent.
    command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("head") / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, process, log)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the head ended: {log.read_text()}")
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"no job server at {address}: {log.read_text()}")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of the working directory, as a clone would have it."""
    folder = tmp_path_factory.mktemp("checkout") / "shoal"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "results", "outputs")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(ROOT / ".rayignore", folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "documents.parquet"
    texts = [f"{TOPICS[i % 3]}, {i} times over" for i in range(60)]
    labels = [str(i % 3) for i in range(60)]
    pq.write_table(pa.table({"id": list(range(60)), "text": texts, "label": labels}), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def submit(head, environment, entrypoint, *, cwd, options=()):
    command = [RAY, "job", "submit", "--address", head, *options, "--", *entrypoint]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400,
            check=False,
        )  # fmt: skip
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)  # the head answers a little before its agent does


def embed_and_cluster(head, environment, corpus, model, folder, *, jobs, **where):
    embed = ["python", f"{jobs}/embed_corpus.py", "--corpus", str(corpus), "--model", str(model)]
    embed += ["--output", str(folder / "embedded"), "--keep-columns", "text", "label"]
    done = submit(head, environment, embed, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    cluster = ["python", f"{jobs}/cluster_corpus.py", "--embeddings", str(folder / "embedded")]
    cluster += ["--output", str(folder / "clusters"), "--num-clusters", "3"]
    cluster += ["--label-column", "label"]
    done = submit(head, environment, cluster, **where)
    assert done.returncode == 0, done.stdout + done.stderr


def check_results(folder):
    embedded = pq.read_table(folder / "embedded" / "embeddings")
    assert sorted(embedded["id"].to_pylist()) == list(range(60))
    run = json.loads((folder / "embedded" / "run.json").read_text())
    assert run["status"] == "complete"
    assert run["counts"]["documents"] == 60
    assigned = pq.read_table(folder / "clusters" / "assignments")
    assert sorted(assigned["id"].to_pylist()) == list(range(60))
    scores = json.loads((folder / "clusters" / "scores.json").read_text())
    assert scores["num_clusters"] == 3
    assert 0 <= scores["labels"]["v_measure"] <= 1
    assert "<html" in (folder / "clusters" / "report.html").read_text()


def test_both_jobs_run_from_a_checkout(head, environment, checkout, corpus, model, tmp_path):
    # The package may be installed here too, so ask which one a job imports.
    where = {"cwd": checkout, "options": ["--working-dir", "."]}
    ask = ["python", "-c", "import pipelines; print(pipelines.__file__)"]
    origin = submit(head, environment, ask, **where)
    assert re.search(r"working_dir_files/\S+/pipelines/__init__\.py", origin.stdout), origin.stdout
    embed_and_cluster(head, environment, corpus, model, tmp_path, jobs="jobs", **where)
    check_results(tmp_path)


def test_both_jobs_run_where_the_package_is_installed(
    head, environment, corpus, model, checkout, tmp_path
):
    where = {"cwd": tmp_path}
    jobs = shutil.copytree(checkout / "jobs", tmp_path / "only" / "jobs")
    embed_and_cluster(head, environment, corpus, model, tmp_path, jobs=jobs, **where)
    check_results(tmp_path)


def test_a_users_mistake_fails_the_submitted_job_with_its_line(
    head, environment, checkout, tmp_path
):
    entrypoint = ["python", "jobs/embed_corpus.py", "--corpus", str(tmp_path / "nowhere")]
    entrypoint += ["--output", str(tmp_path / "out")]
    where = {"cwd": checkout, "options": ["--working-dir", "."]}
    done = submit(head, environment, entrypoint, **where)
    assert done.returncode != 0
    assert re.search(r"error: .*nowhere", done.stdout + done.stderr)
    assert "Traceback" not in done.stdout
