"""``jobs/cluster_corpus.py`` as a person runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import chat_server
from ports import free_port

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "jobs" / "cluster_corpus.py"), *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)


def test_bad_options_end_with_one_line_and_exit_code_2(tmp_path):
    done = run("--embeddings", tmp_path, "--output", tmp_path / "out", "--num-clusters", "few")
    assert done.returncode == 2
    assert "--num-clusters is 'few'; it must be a number" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_vectors_that_cannot_be_clustered_end_with_one_line_and_exit_code_2(tmp_path):
    np.save(tmp_path / "in.npy", np.array([[1.0, 2.0], [np.nan, 1.0]]))
    done = run("--embeddings", tmp_path / "in.npy", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "id=1, is not finite" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_the_job_writes_a_complete_run_and_prints_a_table(tmp_path):
    np.save(tmp_path / "in.npy", np.random.default_rng(0).standard_normal((300, 8)))
    arguments = ("--embeddings", tmp_path / "in.npy", "--output", tmp_path / "out")
    done = run(*arguments, "--num-clusters", "5")
    assert done.returncode == 0, done.stderr
    assert "all 300 vectors" in done.stdout
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["counts"]["clusters"] == 5
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_an_endpoint_names_clusters_and_its_key_is_nowhere(tmp_path):
    texts = [f"{'goal hockey' if n % 2 else 'orbit moon'} number {n}" for n in range(60)]
    vectors = pa.array(np.eye(2)[np.arange(60) % 2].tolist())
    pq.write_table(
        pa.table({"id": range(60), "text": texts, "embedding": vectors}), tmp_path / "in.parquet"
    )
    key = "sk-wJalrXUtnFEMI"
    arguments = ("--embeddings", tmp_path / "in.parquet", "--num-clusters", 2, "--name-model", "m")
    dead = f"http://127.0.0.1:{free_port()}/v1"
    done = run(*arguments, "--output", tmp_path / "dead", "--name-url", dead, OPENAI_API_KEY=key)
    assert done.returncode == 2
    assert f"error: {dead}/chat/completions was not reached" in done.stderr.splitlines()[-1]
    assert {path.name for path in (tmp_path / "dead").iterdir()} == {"run.json"}

    def answer(body):
        return "Hockey" if "goal" in body["messages"][0]["content"] else "Space"

    with chat_server(answer) as server:
        arguments = (*arguments, "--output", tmp_path / "out", "--name-url", server.url)
        done = run(*arguments, OPENAI_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    clusters = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    named = {row["name"]: row["keywords"][0] in ("goal", "hockey") for row in clusters}
    assert named == {"Hockey": True, "Space": False}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert key not in done.stdout + done.stderr
