"""Strangers in no dense region are noise in every table, and nobody else is."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import run_inline

from cluster.clustering import cluster_corpus
from cluster.config import ClusterConfig
from cluster.known import read_clustering
from cluster.newcomers import AssignConfig, assign_clusters
from cluster.noise import DenseRegions, NoiseFinder
from pipelines.runtime.run_record import RunRecord, read_run

CENTRES = 6 * np.eye(4, 8)
WORDS = ("apple pear", "engine wheel", "goal match", "court judge", "stray")


def draw(members=600, strangers=0, seed=0):
    """float32 points in 4 blobs, strangers far from all of them, and the label of each (4)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, members)
    points = CENTRES[labels] + 0.3 * random.normal(size=(members, 8))
    far = random.uniform(-9, 9, size=(strangers, 8))
    order = random.permutation(members + strangers)
    labels = np.append(labels, np.full(strangers, 4))
    return np.concatenate([points, far])[order].astype(np.float32), labels[order]


def hashes(n):
    return np.random.default_rng(9).integers(0, 2**63, n).astype(np.uint64)


def test_strangers_are_noise_and_members_are_not():
    points, labels = draw(strangers=30)
    orders = hashes(len(points))
    noise = NoiseFinder(DenseRegions.learn(points, orders, 0)).find(points, orders)
    assert noise[labels == 4].all()
    assert noise[labels < 4].mean() < 0.01


def test_tight_blobs_have_no_noise():
    points, _ = draw(2_000)
    orders = hashes(len(points))
    noise = NoiseFinder(DenseRegions.learn(points, orders, 0)).find(points, orders)
    assert noise.mean() < 0.001


def test_a_documents_answer_is_its_own_whoever_stands_beside_it():
    points, _ = draw(400, strangers=40)
    orders = hashes(len(points))
    finder = NoiseFinder(DenseRegions.learn(points[:300], orders[:300], 0))
    whole = finder.find(points, orders)
    assert 0 < whole.sum() < 60
    alone = [finder.find(points[i : i + 1], orders[i : i + 1])[0] for i in range(len(points))]
    assert whole.tolist() == alone


def test_the_fifth_neighbour_is_not_the_document_itself():
    line = np.arange(60, dtype=np.float32)[:, None]
    orders = hashes(60)
    finder = NoiseFinder(DenseRegions(line, orders, 0.0))
    assert finder.reach(line[:1], orders[:1]).tolist() == [5]
    assert finder.reach(line[:1], orders[:1] + np.uint64(1)).tolist() == [4]


@pytest.mark.parametrize("points", [np.ones((200, 3)), np.zeros((200, 3)), np.eye(20)])
def test_documents_all_alike_or_too_few_are_no_noise(points):
    points = points.astype(np.float32)
    orders = hashes(len(points))
    regions = DenseRegions.learn(points, orders, 0)
    noise = NoiseFinder(DenseRegions.from_table(regions.table())).find(points, orders)
    assert not noise.any()


def test_documents_on_the_limit_are_no_noise():
    bits = np.random.default_rng(0).integers(0, 2, (3_000, 32)).astype(np.float32)
    orders = hashes(len(bits))
    regions = DenseRegions.learn(bits, orders, 0)
    finder = NoiseFinder(DenseRegions.from_table(regions.table()))
    on_limit = finder.reach(bits, orders) == regions.limit
    assert on_limit.sum() > 500
    assert not finder.find(bits, orders)[on_limit].any()


def write(folder, points, labels, start=0):
    flat = pa.array(points.ravel())
    table = pa.table(
        {
            "id": np.arange(start, start + len(points)),
            "text": [f"{WORDS[label]} number {i}" for i, label in enumerate(labels)],
            "label": [WORDS[label] for label in labels],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, points.shape[1]),
        }
    )
    folder.mkdir()
    half = len(points) // 2
    pq.write_table(table.slice(0, half), folder / "a.parquet")
    pq.write_table(table.slice(half), folder / "b.parquet")


def cluster(tmp_path, name="out", **settings):
    output = str(tmp_path / name)
    config = ClusterConfig(
        embeddings=str(tmp_path / "in"),
        output=output,
        **{"num_clusters": "2,4", "map_documents": 15, "label_column": "label", **settings},
    )
    with RunRecord(output, "cluster_corpus", asdict(config)) as record:
        return cluster_corpus(config, record)


def test_noise_is_noise_in_every_table_and_scored_apart(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    points, labels = draw(strangers=30)
    write(tmp_path / "in", points, labels)
    result = cluster(tmp_path, noise=True)
    rows = pq.read_table(tmp_path / "out" / "assignments").sort_by("id").to_pandas()
    noise = rows["cluster_id"] == -1
    assert noise[labels == 4].all()
    assert (
        noise.sum() == result.counts["noise"] == read_run(str(tmp_path / "out"))["counts"]["noise"]
    )
    assert ((rows["cluster_id_2"] == -1) == noise).all()
    assert rows["margin"].isna().equals(noise)
    assert (rows["second_cluster_id"][noise] >= 0).all()
    mapped = pq.read_table(tmp_path / "out" / "map.parquet").sort_by("id").to_pandas()
    assert mapped["cluster_id"].equals(rows["cluster_id"])
    for name in ("clusters", "clusters_2", "centroids"):
        sizes = pq.read_table(tmp_path / "out" / f"{name}.parquet")["size"].to_numpy()
        assert sizes.sum() == (~noise).sum()
    keywords = pq.read_table(tmp_path / "out" / "clusters.parquet")["keywords"].to_pylist()
    assert all("stray" not in words for words in keywords)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["noise"]["documents"] == noise.sum()
    assert scores["labels"]["labelled_documents"] == (~noise).sum()
    assert scores["labels"]["v_measure"] > scores["noise"]["labels_with_noise"]["v_measure"] - 0.05
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Noise" in page
    assert "in no dense region" in result.summary["noise"]


def test_clusters_of_nothing_but_noise_are_said_to_be_so(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    write(tmp_path / "in", *draw(strangers=30))
    result = cluster(tmp_path, noise=True, num_clusters="20")
    sizes = pq.read_table(tmp_path / "out" / "clusters.parquet")["size"].to_numpy()
    rows = pq.read_table(tmp_path / "out" / "assignments").to_pandas()
    empty = np.flatnonzero(sizes == 0)
    nearest = rows["second_cluster_id"][rows["cluster_id"] == -1]
    assert len(empty) == result.counts["empty_clusters"] > 0
    assert set(empty) <= set(nearest)
    told = f"Empty clusters: {len(empty)}. At most noise lies nearest to them."
    assert told in result.summary.values()


def test_where_all_is_noise_clusters_are_empty_and_it_is_said(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    learn = DenseRegions.learn
    monkeypatch.setattr(DenseRegions, "learn", lambda *given: replace(learn(*given), limit=-1.0))
    write(tmp_path / "in", *draw(100))
    result = cluster(tmp_path, noise=True)
    assert result.counts["noise"] == 100
    rows = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    assert [(row["size"], row["share"], row["top_label"]) for row in rows] == 4 * [(0, 0, None)]
    assert set(pq.read_table(tmp_path / "out" / "assignments")["cluster_id"].to_pylist()) == {-1}
    told = "All documents are noise, and no cluster holds any: leave --noise out."
    assert told in result.summary.values()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["noise"]["share"] == 1
    assert scores["levels"][1]["nested_share"] == 0
    assert told in (tmp_path / "out" / "report.html").read_text()


def test_who_is_noise_does_not_depend_on_files_or_levels(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    points, labels = draw(strangers=20)
    write(tmp_path / "in", points, labels)
    cluster(tmp_path, noise=True)
    first = pq.read_table(tmp_path / "out" / "assignments").sort_by("id")
    for path in (tmp_path / "in").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.take(np.arange(len(table))[::-1]), path)
    cluster(tmp_path, "again", noise=True, num_clusters="4", label_column=None)
    second = pq.read_table(tmp_path / "again" / "assignments").sort_by("id")
    ours, theirs = (t["cluster_id"].to_numpy() == -1 for t in (first, second))
    assert ours.tolist() == theirs.tolist()


def test_newcomers_are_noise_too_and_clusterings_with_noise_compare(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    write(tmp_path / "in", *draw(strangers=30))
    cluster(tmp_path, noise=True)
    cluster(tmp_path, "compared", num_clusters="4", compare=str(tmp_path / "out"))
    assert (
        "documents are in clusters of both" in (tmp_path / "compared" / "report.html").read_text()
    )
    points, labels = draw(100, strangers=10, seed=5)
    write(tmp_path / "new", points, labels, start=10_000)
    config = AssignConfig(
        embeddings=str(tmp_path / "new"),
        clusters=str(tmp_path / "out"),
        output=str(tmp_path / "given"),
    )
    with RunRecord(config.output, "assign_clusters", asdict(config)) as record:
        result = assign_clusters(
            config, record, read=lambda c: read_clustering(c.clusters, c.quantile)
        )
    given = pq.read_table(tmp_path / "given" / "assignments").sort_by("id").to_pandas()
    noise = given["cluster_id"].to_numpy() == -1
    assert noise[labels == 4].all()
    assert noise.sum() == result.counts["noise"]
    assert result.counts["assigned"] + result.counts["noise"] == 110
