"""Small work on a machine of its own: no Ray starts, and what comes out is the same."""

import gzip
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from pipelines.embedding import encode, job
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.encode import may_encode_here
from pipelines.embedding.job import embed_corpus
from pipelines.runtime import machines
from pipelines.runtime.errors import InputError
from pipelines.runtime.machines import ActorPlan
from pipelines.runtime.run_record import RunRecord, read_run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def config(tmp_path, tiny_model_folder):
    rows = [f"{'the sea ' * (n % 150 % 9)}number {n % 150}" for n in range(200)]
    for part in range(2):
        mine = range(part * 100, part * 100 + 100)
        table = pa.table({"id": list(mine), "text": [rows[n] for n in mine]})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=30)
    return EmbedConfig(
        corpus=f"{tmp_path}/*.parquet",
        output=str(tmp_path / "out"),
        model=str(tiny_model_folder),
        dtype="float32",
    )


@pytest.fixture
def put_off(monkeypatch):
    """A Ray that would start if it were needed; what it counts."""
    starts = []
    monkeypatch.setattr(machines, "_start", lambda: starts.append(1))
    return starts


def embed(config):
    with RunRecord.of("embed_corpus", config, keep_complete=True) as record:
        embed_corpus(config, record)
    table = pads.dataset(f"{config.output}/embeddings").to_table().sort_by("id")
    return table, read_run(config.output)["counts"]


def test_a_small_corpus_is_embedded_without_ray_as_with_it(config, local_ray, put_off, caplog):
    with caplog.at_level("INFO"):
        here, counts = embed(config)
    assert not put_off
    assert "0 chunks are done, in this process" in caplog.text
    machines.need_ray()
    assert put_off == [1]
    with caplog.at_level("INFO"):
        there, same = embed(replace(config, output=f"{config.output}-there"))
    assert "0 chunks are done, actors" in caplog.text
    assert counts == same
    assert (counts["documents"], counts["embedded"], counts["duplicates"]) == (200, 150, 50)
    assert here.drop_columns("embedding").equals(there.drop_columns("embedding"))
    first, second = (np.stack(t["embedding"].to_numpy()) for t in (here, there))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_a_killed_run_goes_on_from_its_chunks(config, put_off, monkeypatch):
    config = replace(config, chunk_tokens=200)
    original, calls = encode.ChunkEncoder.__call__, []

    def break_down(actor, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(actor, batch)

    monkeypatch.setattr(encode.ChunkEncoder, "__call__", break_down)
    with pytest.raises(KeyboardInterrupt):
        embed(config)
    before = len(calls)
    table, counts = embed(config)
    assert counts["embedded"] == 150
    assert len(table) == 200
    rest = len(calls) - before
    embed(replace(config, output=f"{config.output}-anew"))
    assert len(calls) == before + rest + 3 + rest


@pytest.mark.parametrize("mended", [False, True])
def test_a_run_that_goes_on_reads_kept_columns_as_its_files_are_now(config, put_off, mended):
    corpus = Path(config.output).with_name("corpus")
    corpus.mkdir()
    texts, labels = [f"text {n}" for n in range(4)], ["1.50", "1e5", "null", "true"]
    table = pa.table({"id": list("abcd"), "text": texts, "label": labels})
    pq.write_table(table, corpus / "a.parquet")
    rows = [f'{{"id": "j{n}", "text": "{random.random()}", "label": 7}}\n' for n in range(9000)]
    packed, other = gzip.compress("".join(rows).encode()), corpus / "b.jsonl.gz"
    other.write_bytes(b"" if mended else packed[: len(packed) * 3 // 4])
    config = replace(config, corpus=str(corpus), keep_columns=("label",))
    with pytest.raises(InputError, match=r"b\.jsonl\.gz"):
        embed(config)
    other.unlink()
    if mended:
        other.write_bytes(gzip.compress(rows[0].encode()))
    table, _ = embed(config)
    assert table["label"].to_pylist() == [*labels, *["7"] * mended]


def test_what_fails_in_the_thread_that_reads_ahead_is_told_of_its_chunk(
    config, put_off, monkeypatch
):
    def fail(batch, *, settings):
        raise KeyError("token")

    monkeypatch.setattr(job, "WORKERS", replace(job.WORKERS, tokenize=fail))
    with pytest.raises(KeyError) as caught:
        embed(config)
    assert caught.value.__notes__[0].startswith("in tokenize of 00000-")


@pytest.mark.parametrize(("asked", "groups", "cpus"), [(True, 1, 2), (False, 9, 2), (False, 1, 64)])
def test_actors_encode_where_they_were_asked_for_or_much_is_read_or_cpus_are_many(
    put_off, monkeypatch, asked, groups, cpus
):
    monkeypatch.setattr(encode, "usable_cpus", lambda: cpus)
    assert not may_encode_here(ActorPlan(1, 2, 1.0, 0.0, asked), groups)
    assert may_encode_here(ActorPlan(1, 2, 1.0, 0.0), 1) == (cpus == 2)


def test_actors_go_on_with_what_would_take_this_process_long(
    config, local_ray, put_off, monkeypatch, caplog
):
    config = replace(config, chunk_tokens=200)
    alone, counts = embed(replace(config, output=f"{config.output}-alone"))
    assert not put_off
    monkeypatch.setattr(encode, "_TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(encode, "_MOST_SECONDS_HERE", 0.0)
    caplog.clear()
    with caplog.at_level("INFO"):
        table, same = embed(config)
    assert put_off == [1]
    assert "embed: 0 chunks are done, in this process" in caplog.text
    assert "embed: 1 chunks are done, actors: " in caplog.text
    assert same == counts
    assert table.drop_columns("embedding").equals(alone.drop_columns("embedding"))
    first, second = (np.stack(t["embedding"].to_numpy()) for t in (alone, table))
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.slow
def test_jobs_start_ray_where_they_need_it_and_not_before(config, tmp_path):
    """Processes as a person starts them: Ray leaves a folder where it was started."""

    def started(*arguments, **more):
        with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as folder:
            environment = {**os.environ, "RAY_TMPDIR": folder, **more}
            environment.pop("RAY_ADDRESS", None)
            subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=environment, check=True,
                capture_output=True,
            )  # fmt: skip
            return Path(folder, "ray").exists()

    command = ["jobs/embed_corpus.py", "--corpus", config.corpus, "--model", config.model]
    vectors = str(tmp_path / "vectors")
    assert not started(*command, "--output", vectors)
    cluster = ["jobs/cluster_corpus.py", "--embeddings", vectors, "--num-clusters", "5"]
    assert not started(*cluster, "--output", str(tmp_path / "clusters"))
    assert started(*command, "--output", f"{vectors}-1", "--num-actors", "1")
    assert started(*command, "--output", f"{vectors}-2", SHOAL_LOG_FORMAT="json")
