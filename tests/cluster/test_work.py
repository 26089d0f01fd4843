"""A stopped clustering goes on; a finished one is confirmed; nothing foreign is deleted."""

import json
import shutil
from dataclasses import replace

import fsspec
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import run_inline

from cluster import clustering, vectors, work
from cluster.clustering import cluster_corpus
from cluster.config import ClusterConfig
from cluster.vectors import Columns
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run
from pipelines.runtime.table_view import TableView, pack_rows


class PoweredOffError(Exception):
    """What a killed process raises in these tests."""


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    run_inline(monkeypatch)
    monkeypatch.setattr(vectors.open_vectors, "__kwdefaults__", {
        **vectors.open_vectors.__kwdefaults__, "rows_per_shard": 100,
    })  # fmt: skip


def write_vectors(folder, *, fingerprint=None, files=4, seed=0):
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(files):
        points = np.eye(6)[random.integers(0, 6, 100)] + random.normal(0, 0.1, (100, 6))
        flat = pa.array(points.astype(np.float32).ravel())
        table = pa.table(
            {
                "id": range(100 * number, 100 * number + 100),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, 6),
            }
        )
        if fingerprint is not None:
            table = table.replace_schema_metadata({"shoal.encoder_fingerprint": fingerprint})
        pq.write_table(table, folder / f"{number}.parquet")


def config_of(tmp_path, output="out", **settings):
    defaults = {"embeddings": str(tmp_path / "in"), "num_clusters": "6", "map_documents": 10}
    return ClusterConfig(output=str(tmp_path / output), **{**defaults, **settings})


def run(config):
    record = RunRecord.of("cluster_corpus", config, keep_complete=True)
    with record:
        return cluster_corpus(config, record)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("run.json", "report.html")
    }


def stop_after(monkeypatch, stage, shards):
    """Make the process end once ``shards`` shards of ``stage`` are done."""

    def on_shards(function, given, *, stage="", **_):
        for number, shard in enumerate(given):
            if stage == stopping and number == shards:
                raise PoweredOffError
            yield function(shard).to_tables()

    stopping = stage
    monkeypatch.setattr(work, "run_on_shards", on_shards)


def count_shards(monkeypatch):
    done = []

    def on_shards(function, given, *, stage="", **_):
        for shard in given:
            done.append((stage, shard.name))
            yield function(shard).to_tables()

    monkeypatch.setattr(work, "run_on_shards", on_shards)
    return done


@pytest.mark.parametrize(
    ("stage", "left", "fits"),
    [
        ("scan", [("scan", 3), ("assign", 4)], 1),
        ("assign", [("scan", 0), ("assign", 3)], 0),
    ],
)
def test_a_stopped_run_does_only_what_is_left(tmp_path, monkeypatch, stage, left, fits):
    write_vectors(tmp_path / "in")
    run(config_of(tmp_path, "whole"))
    stop_after(monkeypatch, stage, 1)
    with pytest.raises(PoweredOffError):
        run(config_of(tmp_path))
    assert read_run(str(tmp_path / "out"))["status"] == "failed"
    done, fitted = count_shards(monkeypatch), []
    fit_levels = clustering.fit_levels
    monkeypatch.setattr(
        clustering, "fit_levels", lambda *given: fitted.append(given) or fit_levels(*given)
    )
    run(config_of(tmp_path, num_workers=3))
    names = [name for name, _ in done]
    assert [(name, names.count(name)) for name, _ in left] == left
    assert len(fitted) == fits
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_choice_of_k_is_kept_too(tmp_path, monkeypatch):
    write_vectors(tmp_path / "in")
    config = config_of(tmp_path, num_clusters="auto", max_clusters=8)
    stop_after(monkeypatch, "assign", 0)
    with pytest.raises(PoweredOffError):
        run(config)
    count_shards(monkeypatch)
    monkeypatch.setattr(clustering, "choose_num_clusters", None)
    run(config)
    assert pq.read_table(tmp_path / "out" / "k_curve.parquet").num_rows == 7


def test_vectors_that_changed_meanwhile_are_clustered_anew(tmp_path, monkeypatch):
    write_vectors(tmp_path / "in")
    stop_after(monkeypatch, "assign", 3)
    with pytest.raises(PoweredOffError):
        run(config_of(tmp_path))
    (tmp_path / "out" / "assignments" / "mine.parquet").write_bytes(b"")
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    write_vectors(tmp_path / "in", files=2, seed=1)
    done = count_shards(monkeypatch)
    run(config_of(tmp_path))
    assert len(done) == 4
    names = sorted(path.name for path in (tmp_path / "out" / "assignments").iterdir())
    assert names == ["mine.parquet", "part-00000.parquet", "part-00001.parquet"]


def write_lance(path, seed):
    random = np.random.default_rng(seed)
    points = np.eye(6)[random.integers(0, 6, 400)] + random.normal(0, 0.1, (400, 6))
    flat = pa.array(points.astype(np.float32).ravel())
    table = pa.table({"id": range(400), "embedding": pa.FixedSizeListArray.from_arrays(flat, 6)})
    shutil.rmtree(path, ignore_errors=True)
    lance.write_dataset(table, str(path), max_rows_per_file=100)


def test_a_lance_dataset_that_was_written_anew_is_another(tmp_path, monkeypatch):
    write_lance(tmp_path / "in.lance", 0)
    stop_after(monkeypatch, "assign", 3)
    config = config_of(tmp_path, embeddings=str(tmp_path / "in.lance"))
    with pytest.raises(PoweredOffError):
        run(config)
    write_lance(tmp_path / "in.lance", 1)
    done = count_shards(monkeypatch)
    run(config)
    assert len(done) == 8
    assert "input unchanged" in run(config).summary["nothing to do"]
    write_lance(tmp_path / "in.lance", 2)
    with pytest.raises(InputError, match="it has changed since: choose another --output"):
        run(config)


def test_files_that_tell_no_time_of_change_are_never_taken_for_unchanged(tmp_path, caplog):
    memory = fsspec.filesystem("memory")
    digests = []
    for seed in (0, 1, 1):
        write_vectors(tmp_path / "in", files=1, seed=seed)
        memory.pipe("/untimed/0.parquet", (tmp_path / "in" / "0.parquet").read_bytes())
        digests.append(clustering.digest_of(vectors.open_vectors("memory://untimed", Columns())))
    assert len(set(digests)) == 3
    assert "tells no time of change of 1 files, such as /untimed/0.parquet" in caplog.text


def test_files_without_a_time_of_change_are_told_apart_by_their_etags(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    write_vectors(tmp_path / "in", files=1)
    memory.pipe("/tagged/0.parquet", (tmp_path / "in" / "0.parquet").read_bytes())
    source = vectors.open_vectors("memory://tagged", Columns())
    plain, digests = type(memory).info, []
    for tag in ("one", "one", "two"):
        monkeypatch.setattr(type(memory), "info", lambda *a, t=tag: {**plain(*a), "ETag": t})
        digests.append(clustering.digest_of(source))
    assert digests[0] == digests[1] != digests[2]


def test_a_complete_result_is_confirmed_and_foreign_files_stay(tmp_path, monkeypatch):
    write_vectors(tmp_path / "in")
    run(config_of(tmp_path))
    (tmp_path / "out" / "my_joined_table.parquet").write_bytes(b"mine")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(work, "run_on_shards", None)
    again = run(config_of(tmp_path, num_workers=2))
    assert "input unchanged" in again.summary["nothing to do"]
    assert contents(tmp_path / "out") == before
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "complete"


def test_foreign_files_stay_where_all_is_computed_again(tmp_path):
    write_vectors(tmp_path / "in")
    cluster_corpus(config_of(tmp_path))
    (tmp_path / "out" / "my_joined_table.parquet").write_bytes(b"mine")
    (tmp_path / "out" / "centroids_old.parquet").write_bytes(b"mine")
    (tmp_path / "out" / "rejected.parquet").write_bytes(b"an earlier run's")
    before = contents(tmp_path / "out")
    cluster_corpus(config_of(tmp_path))
    del before[next(path for path in before if path.name == "rejected.parquet")]
    assert contents(tmp_path / "out") == before


def test_a_complete_result_of_other_vectors_is_refused_and_stays(tmp_path):
    write_vectors(tmp_path / "in")
    run(config_of(tmp_path))
    before = contents(tmp_path / "out")
    write_vectors(tmp_path / "in", seed=1)
    with pytest.raises(InputError, match="it has changed since: choose another --output"):
        run(config_of(tmp_path))
    assert contents(tmp_path / "out") == before
    assert read_run(str(tmp_path / "out"))["status"] == "complete"


def test_centroids_of_another_encoder_are_refused(tmp_path):
    write_vectors(tmp_path / "in", fingerprint="a" * 64)
    cluster_corpus(config_of(tmp_path))
    start = str(tmp_path / "out" / "centroids.parquet")
    cluster_corpus(config_of(tmp_path, "same", initial_centroids=start))
    write_vectors(tmp_path / "in", fingerprint="b" * 64)
    with pytest.raises(InputError, match=r"vectors with fingerprint aaa.*vectors with bbb"):
        cluster_corpus(config_of(tmp_path, "other", initial_centroids=start))


@pytest.mark.parametrize("fit", ["sample:200000", "all"])
def test_a_shard_of_deleted_rows_is_a_valid_empty_file(tmp_path, monkeypatch, fit):
    write_vectors(tmp_path / "in")
    find_source = clustering.find_source

    def without_second(config):
        source = find_source(config)
        first, second, *others = source.shards
        view = TableView(deleted=pack_rows(np.arange(100)))
        second = replace(second, pieces=(replace(second.pieces[0], view=view),))
        return replace(source, shards=(first, second, *others))

    monkeypatch.setattr(clustering, "find_source", without_second)
    result = run(config_of(tmp_path, fit=fit, noise=True))
    assert result.counts["documents"] == 300
    files = [tmp_path / "out" / "assignments" / f"part-0000{n}.parquet" for n in range(4)]
    assert [pq.read_table(path).num_rows for path in files] == [100, 0, 100, 100]
    assert pq.read_schema(files[1]).equals(pq.read_schema(files[0]))
    assert pq.read_table(tmp_path / "out" / "map.parquet").num_rows == 300


@pytest.mark.parametrize("settings", [{"restarts": 7}, {"two_level": "yes"}])
def test_starts_beside_given_centroids_are_refused(tmp_path, settings):
    with pytest.raises(InputError, match="has no effect beside --initial-centroids"):
        config_of(tmp_path, initial_centroids="centroids.parquet", **settings)
