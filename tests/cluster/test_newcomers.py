"""New vectors into the clusters there are: exact, resumable, novel where nothing is like them."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import run_inline
from tiny_stores import CENTROIDS, ENCODER, SCHEMA, finish, numbered, table_of, when, write_files

from cluster import newcomers, vectors, work
from cluster.clustering import cluster_corpus
from cluster.config import AssignConfig, ClusterConfig
from cluster.known import Reach, read_clustering
from cluster.newcomers import assign_clusters
from pipelines.nightly.clusters import read_published_clusters
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord
from pipelines.store.store import Store

WORDS = ("apple pear", "engine wheel", "goal match", "court judge")
CENTRES = 4 * np.eye(4, 8, dtype=np.float32)


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    run_inline(monkeypatch)
    monkeypatch.setattr(vectors.open_vectors, "__kwdefaults__", {
        **vectors.open_vectors.__kwdefaults__, "rows_per_shard": 100,
    })  # fmt: skip


def write_corpus(folder, points, texts, fingerprint="a" * 64, start=0):
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(points)), 3)):
        flat = pa.array(points[part].astype(np.float32).ravel())
        table = pa.table(
            {
                "id": part + start,
                "text": [texts[i] for i in part],
                "embedding": pa.FixedSizeListArray.from_arrays(flat, points.shape[1]),
            }
        )
        table = table.replace_schema_metadata({"shoal.encoder_fingerprint": fingerprint})
        pq.write_table(table, folder / f"{number}.parquet")


def draw(n, seed):
    random = np.random.default_rng(seed)
    members = random.integers(0, 4, n)
    points = CENTRES[members] + random.normal(0, 0.3, (n, 8))
    return points, [f"{WORDS[m]} number {i}" for i, m in enumerate(members)]


@pytest.fixture
def clustered(tmp_path):
    """400 documents in four groups, clustered; the folder of the result."""
    write_corpus(tmp_path / "old", *draw(400, 0))
    output = str(tmp_path / "clusters")
    config = ClusterConfig(
        embeddings=str(tmp_path / "old"), output=output, num_clusters="4", map_documents=15
    )
    with RunRecord(output, "cluster_corpus", asdict(config)) as record:
        cluster_corpus(config, record)
    return tmp_path / "clusters"


def assign(tmp_path, read=None, **settings):
    config = AssignConfig(
        embeddings=str(tmp_path / "new"),
        clusters=str(tmp_path / "clusters"),
        output=str(tmp_path / "out"),
        **settings,
    )
    record = RunRecord(config.output, "assign_clusters", asdict(config), keep_complete=True)
    reader = read or (lambda config: read_clustering(config.clusters, config.quantile))
    with record:
        return assign_clusters(config, record, read=reader)


def rows_of(tmp_path):
    return pq.read_table(tmp_path / "out" / "assignments").sort_by("id")


def test_distances_and_clusters_are_those_of_numpy(tmp_path, clustered):
    points, texts = draw(300, 1)
    write_corpus(tmp_path / "new", points, texts, start=1000)
    assign(tmp_path)
    rows = rows_of(tmp_path)
    assert rows.column_names == ["id", "cluster_id", "distance", "novel"]
    assert rows["id"].to_pylist() == list(range(1000, 1300))
    centroids = np.stack(pq.read_table(clustered / "centroids.parquet")["centroid"].to_numpy())
    distances = np.linalg.norm(points.astype(np.float32)[:, None] - centroids, axis=2)
    assert rows["cluster_id"].to_pylist() == distances.argmin(axis=1).tolist()
    assert rows["distance"].to_numpy() == pytest.approx(distances.min(axis=1), rel=1e-5)


def test_the_clusterings_own_documents_are_novel_as_often_as_asked(tmp_path, clustered):
    write_corpus(tmp_path / "new", *draw(400, 0))
    result = assign(tmp_path, quantile=0.9)
    old = pq.read_table(clustered / "assignments").sort_by("id")
    rows = rows_of(tmp_path)
    assert rows["cluster_id"].equals(old["cluster_id"])
    novel = rows["novel"].to_numpy()
    assert result.counts["novel"] == novel.sum()
    for cluster in range(4):
        inside = old["cluster_id"].to_numpy() == cluster
        assert 0.07 < novel[inside].mean() <= 0.1
        distances = old["distance"].to_numpy()[inside]
        limit = np.quantile(distances, 0.9)
        assert (distances[novel[inside]] > 0.998 * limit).all()
        assert (distances[~novel[inside]] < 1.01 * limit).all()


def test_what_fits_nowhere_is_novel_and_described(tmp_path, clustered):
    points, texts = draw(200, 1)
    random = np.random.default_rng(2)
    strange = 4 * np.eye(8)[[6, 7]][random.integers(0, 2, 60)] + random.normal(0, 0.2, (60, 8))
    words = ["volcano lava" if point[6] > 2 else "violin sonata" for point in strange]
    write_corpus(tmp_path / "new", np.vstack([points, strange]), texts + words)
    result = assign(tmp_path, quantile=1.0)
    assert set(np.flatnonzero(rows_of(tmp_path)["novel"].to_numpy())) >= set(range(200, 260))
    groups = pq.read_table(tmp_path / "out" / "novel_clusters.parquet").to_pylist()
    assert sum(group["share"] for group in groups) == pytest.approx(1)
    keywords = [set(group["keywords"]) for group in groups[:2]]
    assert sorted(keywords, key=min) == [{"lava", "volcano"}, {"sonata", "violin"}]
    assert all(200 <= value < 260 for group in groups[:2] for value in group["representative_ids"])
    assert "volcano" in " ".join(result.summary.values())


def test_nothing_novel_is_an_empty_table(tmp_path, clustered):
    write_corpus(tmp_path / "new", *draw(400, 0))
    assert assign(tmp_path, quantile=1.0).counts["novel"] == 0
    assert pq.read_table(tmp_path / "out" / "novel_clusters.parquet").num_rows == 0


def test_a_stopped_run_goes_on_and_a_complete_one_is_confirmed(tmp_path, clustered, monkeypatch):
    write_corpus(tmp_path / "new", *draw(300, 1))
    left = [2, 99]

    def on_shards(function, shards, **_):
        for number, shard in enumerate(shards):
            if number == left[0]:
                raise KeyError("powered off")
            done.append(shard.name)
            yield function(shard).to_tables()

    done = []
    monkeypatch.setattr(work, "run_on_shards", on_shards)
    with pytest.raises(KeyError):
        assign(tmp_path)
    left.pop(0)
    assign(tmp_path)
    assert sorted(done) == ["part-00000", "part-00001", "part-00002"]
    assert len(rows_of(tmp_path)) == 300
    assert "nothing to do" in assign(tmp_path).summary
    assert len(done) == 3


def test_another_encoder_is_refused_and_what_differs_is_named(tmp_path, clustered):
    write_corpus(tmp_path / "new", *draw(30, 1), fingerprint="b" * 64)
    with pytest.raises(InputError, match=r"its fingerprint is bbb.*, there it is aaa"):
        assign(tmp_path)
    for folder, pooling in (("new", "mean"), ("old", "last")):
        content = json.dumps({"model": "m", "pooling": pooling})
        (tmp_path / folder / "encoder.json").write_text(content)
    with pytest.raises(InputError, match="its pooling is 'mean', there it is 'last'"):
        assign(tmp_path)


def test_vectors_of_another_dimension_are_refused(tmp_path, clustered):
    write_corpus(tmp_path / "new", np.ones((3, 5)), ["a"] * 3)
    with pytest.raises(InputError, match=r"holds vectors of 5 numbers, .* centroids of 8"):
        assign(tmp_path)


def test_an_unfinished_clustering_is_refused(tmp_path, clustered):
    write_corpus(tmp_path / "new", *draw(30, 1))
    record = json.loads((clustered / "run.json").read_text())
    (clustered / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with pytest.raises(InputError, match="has status 'running', not 'complete'"):
        assign(tmp_path)


def test_a_stores_published_version_takes_newcomers_under_its_ids(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "new").mkdir()
    store = Store.open_or_create(str(tmp_path / "store"))
    files = write_files(tmp_path / "files", numbered(range(40)))
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        candidate.replace(files, schema=SCHEMA, when=when(0))
        candidate.put("run.json", json.dumps({"config": {"metric": "euclidean"}}).encode())
        names = {"cluster_id": pa.array(range(3), pa.int32()), "name": ["a", "b", "c"]}
        candidate.put_table("clusters.parquet", pa.table(names))
        version = finish(candidate)
        store.publish(version.number, lease, expected=None)
    new = table_of(numbered(range(40, 60)))
    pq.write_table(
        new.replace_schema_metadata({"shoal.encoder_fingerprint": ENCODER.fingerprint}),
        tmp_path / "new" / "a.parquet",
    )
    assign(tmp_path, lambda c: read_published_clusters(store.uri, None, c.quantile))
    matrix = np.stack(new.sort_by("id")["embedding"].to_numpy())
    nearest = np.linalg.norm(matrix[:, None] - CENTROIDS, axis=2).argmin(axis=1)
    assert rows_of(tmp_path)["cluster_id"].to_pylist() == nearest.tolist()


def test_merged_clusters_are_one_where_novel_documents_lie_near_them(tmp_path, clustered):
    points = np.vstack([CENTRES[[place] * 10] for place in (0, 1, 2)])
    far = points + 2 * np.eye(8)[[4] * 10 + [5] * 10 + [6] * 10]
    far = np.vstack([far, far[20:25]])  # 10 each in both parts of the merged, 15 in another
    write_corpus(tmp_path / "new", far, ["far off"] * len(far), start=9_000)

    def read(config):
        known = read_clustering(config.clusters, config.quantile)
        near = np.linalg.norm(known.centroids[:, None] - CENTRES, axis=2).argmin(axis=1)
        ids = np.array([7, 7, 3, 9], dtype=np.int32)  # by centre: 0 and 1 were merged
        return replace(known, ids=ids[near])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newcomers, "_FEWEST_TO_CLUSTER", 100)  # all of them as one group
        result = assign(tmp_path, read)
    (group,) = pq.read_table(tmp_path / "out" / "novel_clusters.parquet").to_pylist()
    assert (group["size"], group["nearest_cluster_id"]) == (35, 7)
    assert result.summary["clusters that got some"] == "2 of 3"


@pytest.mark.parametrize("batches", [1, 7])
def test_quantiles_do_not_depend_on_batches(batches):
    random = np.random.default_rng(0)
    places, distances = random.integers(0, 3, 5_000), random.gamma(9, 0.1, 5_000)
    reach = Reach(4)
    for part in np.array_split(np.arange(5_000), batches):
        reach.add(places[part], distances[part])
    limits = reach.limits(0.95)
    exact = [np.quantile(distances[places == place], 0.95) for place in range(3)]
    assert limits[:3] == pytest.approx(exact, rel=0.01)
    for place in range(3):
        assert (distances[places == place] < limits[place]).mean() >= 0.95
    assert limits[3] == 0
