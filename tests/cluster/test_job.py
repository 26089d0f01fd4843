"""``jobs/cluster_corpus.py`` as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, str(ROOT / "jobs" / "cluster_corpus.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


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
