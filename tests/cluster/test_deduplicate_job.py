"""``jobs/deduplicate_corpus.py`` as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*arguments):
    command = [sys.executable, str(ROOT / "jobs" / "deduplicate_corpus.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_a_threshold_beyond_1_ends_with_one_line_and_exit_code_2(tmp_path):
    done = run("--embeddings", tmp_path, "--output", tmp_path / "out", "--similarity", "1.2")
    assert done.returncode == 2
    assert "--similarity is 1.2; it must be above 0 and at most 1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_job_removes_copies_and_confirms_a_complete_result(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    vectors[200:] = 2 * vectors[:100]
    np.save(tmp_path / "in.npy", vectors)
    arguments = ("--embeddings", tmp_path / "in.npy", "--output", tmp_path / "out")
    done = run(*arguments, "--similarity", "1.0", "--write-clean")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["counts"]["removed"] == 100
    removed = pq.read_table(tmp_path / "out" / "removed.parquet")
    assert removed["id"].to_pylist() == list(range(200, 300))
    assert removed["kept_id"].to_pylist() == list(range(100))
    assert pq.read_table(tmp_path / "out" / "clean")["id"].to_pylist() == list(range(200))
    again = run(*arguments, "--similarity", "1.0", "--write-clean")
    assert again.returncode == 0, again.stderr
    said = " ".join(again.stdout.replace("│", " ").split())  # a long path wraps the line
    assert "is complete, its input unchanged" in said
    other = run(*arguments, "--similarity", "0.9")
    assert other.returncode == 2
    assert "holds another run: its similarity" in other.stderr
