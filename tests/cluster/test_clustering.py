"""The whole job over files: exact, repeatable, and clear about input it cannot use."""

import json
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from inline_ray import run_inline
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from cluster.clustering import cluster_corpus
from cluster.config import ClusterConfig
from cluster.kmeans import FitOptions, fit_in_memory
from cluster.lloyd import ArrayVectors
from cluster.on_ray import RayVectors
from cluster.vectors import Columns, open_vectors
from pipelines.runtime.command import load_config, parse
from pipelines.runtime.errors import InputError

WORDS = ("apple pear plum", "engine wheel brake", "goal match league", "court judge trial")


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=4, include_dashboard=False, logging_level="WARNING")
    yield
    if started:
        ray.shutdown()


def blobs(n=400, d=6, centers=4):
    vectors, truth = make_blobs(n, d, centers=centers, cluster_std=0.4, random_state=3)
    return vectors.astype(np.float32), truth


def table_of(vectors, truth, start=0):
    n, d = vectors.shape
    return pa.table(
        {
            "id": [f"doc-{i}" for i in range(start, start + n)],
            "text": [f"{WORDS[t % 4]} number {i}" for i, t in enumerate(truth)],
            "label": [None if i % 10 == 0 else f"label {t}" for i, t in enumerate(truth)],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), d),
        }
    )


def write_corpus(folder, cuts=(0, 150, 400), order=1):
    vectors, truth = blobs()
    table = table_of(vectors, truth)
    folder.mkdir()
    parts = [table.slice(a, b - a) for a, b in pairwise(cuts)][::order]
    for i, part in enumerate(parts):
        pq.write_table(part, folder / f"{i}.parquet", row_group_size=64)
    return truth


def config_of(tmp_path, **settings):
    defaults = {
        "embeddings": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "num_clusters": "4",
        "map_documents": 15,
    }
    return ClusterConfig(**{**defaults, **settings})


def read_assignments(folder):
    return pq.read_table(folder / "assignments").sort_by("id")


def test_separated_blobs_are_recovered_and_described(tmp_path):
    truth = write_corpus(tmp_path / "in")
    result = cluster_corpus(config_of(tmp_path, label_column="label"))
    rows = read_assignments(tmp_path / "out").to_pylist()
    found = {row["id"]: row["cluster_id"] for row in rows}
    assert adjusted_rand_score(truth, [found[f"doc-{i}"] for i in range(400)]) == 1.0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["labels"]["v_measure"] == pytest.approx(1.0)
    assert scores["labels"]["labelled_documents"] == 360
    assert scores["num_clusters"] == 4
    clusters = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    assert sum(row["size"] for row in clusters) == 400
    for row in clusters:
        assert set(row["keywords"][:3]) in [set(words.split()) for words in WORDS]
        assert len(row["representative_ids"]) == 5
    assert result.counts["documents"] == 400
    assert (tmp_path / "out" / "report.html").stat().st_size < 5_000_000


def test_distances_centroids_and_inertia_agree_with_numpy(tmp_path):
    write_corpus(tmp_path / "in")
    cluster_corpus(config_of(tmp_path))
    centroids = pq.read_table(tmp_path / "out" / "centroids.parquet")
    matrix = np.stack(centroids["centroid"].to_numpy())
    assignments = read_assignments(tmp_path / "out").to_pylist()
    vectors, _ = blobs()
    by_id = {f"doc-{i}": vector for i, vector in enumerate(vectors)}
    total = 0.0
    for row in assignments:
        distances = np.linalg.norm(matrix - by_id[row["id"]], axis=1)
        nearest, second = np.argsort(distances)[:2]
        assert (row["cluster_id"], row["second_cluster_id"]) == (nearest, second)
        assert row["distance"] == pytest.approx(distances[nearest], rel=1e-5)
        assert row["margin"] == pytest.approx(distances[second] - distances[nearest], rel=1e-5)
        total += distances[nearest] ** 2
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["inertia"] == pytest.approx(total, rel=1e-5)
    assert sorted(centroids["size"].to_pylist(), reverse=True) == centroids["size"].to_pylist()


@pytest.mark.parametrize("fit", ["sample:120", "all"])
def test_results_do_not_depend_on_files_their_order_or_workers(tmp_path, fit):
    for name, cuts, order, workers in (
        ("a", (0, 150, 400), 1, 1),
        ("b", (0, 10, 200, 399, 400), -1, 3),
    ):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name / "in", cuts, order)
        cluster_corpus(
            config_of(tmp_path / name, fit=fit, num_workers=workers, label_column="label")
        )
    for file in ("centroids.parquet", "clusters.parquet", "outliers.parquet", "scores.json"):
        first = (tmp_path / "a" / "out" / file).read_bytes()
        assert first == (tmp_path / "b" / "out" / file).read_bytes(), file
    first = read_assignments(tmp_path / "a" / "out")
    assert first.equals(read_assignments(tmp_path / "b" / "out"))


def test_a_rerun_is_bit_identical(tmp_path):
    write_corpus(tmp_path / "in")
    config = config_of(tmp_path, label_column="label")
    cluster_corpus(config)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    cluster_corpus(config)
    for path, content in before.items():
        assert path.read_bytes() == content, path.name


def test_actors_add_up_to_what_one_process_does(tmp_path):
    write_corpus(tmp_path / "in", (0, 90, 200, 310, 400))
    source = open_vectors(str(tmp_path / "in"), Columns(), rows_per_shard=100)
    vectors, _ = blobs()
    start = fit_in_memory(vectors, 7, FitOptions()).centroids
    expected = ArrayVectors(vectors).assign_to(start)
    behind = RayVectors(
        source, count=400, largest=float(np.abs(vectors).max()), num_workers=3, num_cpus=1
    )
    found = behind.assign_to(start)
    behind.close()
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.sums.tobytes() == expected.sums.tobytes()
    assert found.error == expected.error


def test_several_levels_are_nested_and_written(tmp_path):
    write_corpus(tmp_path / "in")
    cluster_corpus(config_of(tmp_path, num_clusters="8,2,4"))
    names = read_assignments(tmp_path / "out").column_names
    assert names[-3:] == ["cluster_id_2", "cluster_id_4", "cluster_id_8"]
    levels = pq.read_table(tmp_path / "out" / "levels.parquet").to_pylist()
    assert {(row["parent_num_clusters"], row["num_clusters"]) for row in levels} == {(2, 4), (4, 8)}
    assert min(row["parent_share"] for row in levels) == 1.0
    rows = read_assignments(tmp_path / "out").to_pylist()
    for level in levels:
        children = [
            row[f"cluster_id_{level['parent_num_clusters']}"]
            for row in rows
            if row[f"cluster_id_{level['num_clusters']}"] == level["cluster_id"]
        ]
        assert children == [level["parent_cluster_id"]] * level["size"]


def test_every_level_is_scored_and_described(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    write_corpus(tmp_path / "in")
    cluster_corpus(config_of(tmp_path, num_clusters="2,4,8", label_column="label"))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    coarse, middle, fine = scores["levels"]
    for name in ("num_clusters", "labels", "internal", "inertia", "imbalance", "undefined"):
        assert fine[name] == scores[name]
    assert (middle["nested_share"], fine["nested_share"]) == (1.0, 1.0)
    assert coarse["inertia"] > middle["inertia"] > fine["inertia"]
    assert middle["labels"]["v_measure"] == pytest.approx(1.0)
    assignments = read_assignments(tmp_path / "out")
    ids, truth = assignments["cluster_id_4"].to_numpy(), blobs()[1]
    order = np.argsort([f"doc-{i}" for i in range(400)])
    assert adjusted_rand_score(truth[order], ids) == 1.0
    middle_clusters = pq.read_table(tmp_path / "out" / "clusters_4.parquet").to_pylist()
    assert [row["size"] for row in middle_clusters] == np.bincount(ids).tolist()
    vectors = blobs()[0][order]
    centroids = np.stack(
        pq.read_table(tmp_path / "out" / "centroids_4.parquet")["centroid"].to_numpy()
    )
    distances = np.linalg.norm(vectors - centroids[ids], axis=1)
    assert middle["inertia"] == pytest.approx((distances**2).sum(), rel=1e-5)
    for cluster in range(4):
        expected = vectors[ids == cluster].mean(axis=0)
        assert centroids[cluster] == pytest.approx(expected, abs=1e-5)


def test_auto_finds_the_number_of_blobs_and_says_why(tmp_path):
    write_corpus(tmp_path / "in")
    result = cluster_corpus(config_of(tmp_path, num_clusters="auto", max_clusters=8))
    assert result.counts["clusters"] == 4
    assert result.summary["why so many clusters"].startswith("4 clusters have the best mean")
    curve = pq.read_table(tmp_path / "out" / "k_curve.parquet")
    assert curve["num_clusters"].to_pylist() == [2, 3, 4, 5, 6, 7, 8]


def test_given_centroids_keep_their_numbers(tmp_path):
    write_corpus(tmp_path / "in")
    cluster_corpus(config_of(tmp_path))
    old = pq.read_table(tmp_path / "out" / "centroids.parquet")
    flipped = old.take([3, 2, 1, 0]).set_column(0, "cluster_id", pa.array(range(4), pa.int32()))
    pq.write_table(flipped, tmp_path / "start.parquet")
    again = config_of(
        tmp_path, output=str(tmp_path / "again"), initial_centroids=str(tmp_path / "start.parquet")
    )
    cluster_corpus(again)
    new = pq.read_table(tmp_path / "again" / "centroids.parquet")
    assert np.stack(new["centroid"].to_numpy()) == pytest.approx(
        np.stack(flipped["centroid"].to_numpy()), abs=1e-5
    )


def test_npy_rows_are_numbered_and_texts_are_missed_aloud(tmp_path):
    vectors, _ = blobs()
    np.save(tmp_path / "in.npy", vectors)
    cluster_corpus(config_of(tmp_path, embeddings=str(tmp_path / "in.npy")))
    assert read_assignments(tmp_path / "out")["id"].to_pylist() == list(range(400))
    assert "came without texts" in (tmp_path / "out" / "report.html").read_text()


def test_near_duplicates_and_outliers_are_listed(tmp_path):
    vectors, truth = blobs()
    vectors[7] = vectors[11]
    vectors[20] = vectors[20] + 30 * (vectors[20] - vectors[truth == truth[20]].mean(axis=0))
    (tmp_path / "in").mkdir()
    pq.write_table(table_of(vectors, truth), tmp_path / "in" / "a.parquet")
    cluster_corpus(config_of(tmp_path, duplicate_similarity=0.9999999))
    repeats = pq.read_table(tmp_path / "out" / "near_duplicates.parquet").to_pylist()
    assert {"doc-7", "doc-11"} in [{row["id"], row["duplicate_of"]} for row in repeats]
    outliers = pq.read_table(tmp_path / "out" / "outliers.parquet").to_pylist()
    assert outliers[0]["id"] == "doc-20"


def test_near_duplicates_are_sought_among_all_vectors_not_a_sample(tmp_path):
    vectors, truth = blobs()
    vectors[:100] = vectors[200:300]
    (tmp_path / "in").mkdir()
    pq.write_table(table_of(vectors, truth), tmp_path / "in" / "a.parquet")
    few = {"fit": "sample:100", "sample_documents": 50, "map_documents": 50}
    found = {}
    for name, settings in (("few", few), ("all", {})):
        config = config_of(tmp_path, duplicate_similarity=0.9999999, **settings)
        cluster_corpus(replace(config, output=str(tmp_path / name)))
        table = pq.read_table(tmp_path / name / "near_duplicates.parquet")
        found[name] = {(row["id"], row["duplicate_of"]) for row in table.to_pylist()}
        assigned = read_assignments(tmp_path / name).to_pydict()
        clusters = dict(zip(assigned["id"], assigned["cluster_id"], strict=True))
        assert all(clusters[row["id"]] == row["cluster_id"] for row in table.to_pylist())
    assert len(found["few"]) >= 100
    assert found["few"] == found["all"]
    scores = json.loads((tmp_path / "few" / "scores.json").read_text())
    assert scores["near_duplicates"]["searched"] == 400


def test_cosine_ignores_lengths(tmp_path):
    write_corpus(tmp_path / "in")
    vectors, truth = blobs()
    scaled = vectors * np.random.default_rng(0).uniform(0.1, 90, (400, 1)).astype(np.float32)
    (tmp_path / "scaled").mkdir()
    pq.write_table(table_of(scaled, truth), tmp_path / "scaled" / "a.parquet")
    for name in ("in", "scaled"):
        cluster_corpus(
            config_of(
                tmp_path,
                embeddings=str(tmp_path / name),
                output=str(tmp_path / f"out-{name}"),
                metric="cosine",
            )
        )
    first, second = (read_assignments(tmp_path / f"out-{name}") for name in ("in", "scaled"))
    assert first["cluster_id"].equals(second["cluster_id"])


def write_vectors(folder, vectors, name="a.parquet", **columns):
    folder.mkdir(exist_ok=True)
    ids = columns.pop("id", list(range(len(vectors))))
    pq.write_table(pa.table({"id": ids, "embedding": vectors, **columns}), folder / name)


@pytest.mark.parametrize(
    ("vectors", "settings", "message"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], {"num_clusters": "3"}, "only 2 vectors"),
        ([[1.0, 2.0]] * 5, {"num_clusters": "2"}, "only 1 of the 5 vectors differ"),
        ([[1.0, float("nan")], [1.0, 1.0]], {}, "id=0, is not finite"),
        ([None, [1.0, 1.0]], {}, "id=0, is null"),
        ([[1.0, 1.0], [1.0]], {}, "id=1, is of 1 numbers, not 2"),
        ([[0.0, 0.0], [1.0, 1.0]], {"metric": "cosine"}, "id=0, is zero, so it has no direction"),
        ([[1.0, 1.0]], {"label_column": "topic"}, "no column 'topic'; its columns are id, emb"),
        ([[1.0, 1.0]], {"id_column": "key"}, "no column 'key'"),
        ([["1", "2"]], {}, "required is a list of numbers"),
    ],
)
def test_input_that_cannot_be_clustered_is_one_clear_error(tmp_path, vectors, settings, message):
    write_vectors(tmp_path / "in", vectors)
    with pytest.raises(InputError) as caught:
        cluster_corpus(config_of(tmp_path, **{"num_clusters": "1", **settings}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mixed_dimensions_and_mixed_encoders_are_refused(tmp_path):
    write_vectors(tmp_path / "in", [[1.0, 2.0]])
    write_vectors(tmp_path / "in", [[1.0, 2.0, 3.0]], "b.parquet", id=[9])
    with pytest.raises(InputError, match=r"mixed dimensions: .*a.parquet holds vectors of 2"):
        cluster_corpus(config_of(tmp_path))
    for name, mark in (("a", b"one"), ("b", b"two")):
        table = pq.read_table(tmp_path / "in" / "a.parquet")
        table = table.replace_schema_metadata({b"shoal.encoder_fingerprint": mark})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(InputError, match=r"mixed encoders: .*fingerprint one.* with two"):
        cluster_corpus(config_of(tmp_path))


def test_repeated_ids_are_refused(tmp_path):
    write_vectors(tmp_path / "in", [[1.0, 2.0], [2.0, 2.0], [3.0, 1.0]], id=["x", "y", "x"])
    with pytest.raises(InputError, match=r"1 rows repeat the 'id' of another .*'x'"):
        cluster_corpus(config_of(tmp_path))


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        cluster_corpus(config_of(tmp_path))
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=r"holds no file that ends in .parquet"):
        cluster_corpus(config_of(tmp_path))
    (tmp_path / "in" / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        cluster_corpus(config_of(tmp_path))


def test_labels_that_are_all_null_are_refused(tmp_path):
    write_vectors(tmp_path / "in", [[1.0], [2.0]], label=pa.array([None, None], pa.string()))
    with pytest.raises(InputError, match="'label' holds no label in 2 rows"):
        cluster_corpus(config_of(tmp_path, num_clusters="1", label_column="label"))


def test_bad_vectors_can_be_left_out_and_are_listed(tmp_path):
    vectors = [[1.0, 2.0], [float("inf"), 1.0], [5.0, 5.0], None, [1.0]]
    write_vectors(tmp_path / "in", vectors)
    result = cluster_corpus(config_of(tmp_path, num_clusters="2", drop_bad_vectors=True))
    assert (result.counts["documents"], result.counts["clustered"]) == (5, 2)
    rejected = pq.read_table(tmp_path / "out" / "rejected.parquet").to_pylist()
    assert [row["id"] for row in rejected] == [1, 3, 4]
    assert rejected[2]["reason"] == "of 1 numbers, not 2"


def test_nothing_but_bad_vectors_is_said(tmp_path):
    write_vectors(tmp_path / "in", [[float("nan"), 1.0], None])
    with pytest.raises(InputError, match="none of the 2 vectors can be clustered; the first is"):
        cluster_corpus(config_of(tmp_path, num_clusters="auto", drop_bad_vectors=True))


def test_a_label_column_of_ids_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.clustering._MOST_CELLS", 19)
    write_vectors(
        tmp_path / "in", [[1.0], [2.0]] * 5, label=[f"x{i}" for i in range(10)], id=list(range(10))
    )
    with pytest.raises(InputError, match="10 different labels in column 'label' times 2 clusters"):
        cluster_corpus(config_of(tmp_path, num_clusters="2,1", label_column="label"))


def test_odd_texts_and_ids_pass_through(tmp_path):
    texts = [
        "",
        None,
        "<script>alert(1)</script>",
        "x" * 3_000_000,
        "\x00\u2028 ' \" \\",
        "漢字かな " * 50,
    ]
    ids = ["it's", '"', "a\nb", "<b>", "ä", "-1"]
    vectors = np.eye(6, 4, dtype=np.float16) + np.arange(6, dtype=np.float16)[:, None]
    write_vectors(tmp_path / "in", list(vectors), id=ids, text=texts)
    cluster_corpus(config_of(tmp_path, num_clusters="3"))
    assert set(read_assignments(tmp_path / "out")["id"].to_pylist()) == set(ids)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert len(page.encode()) < 5_000_000


@pytest.mark.slow
def test_an_auto_choice_that_had_no_choice_is_drawn(tmp_path):
    write_vectors(tmp_path / "in", [[1.0, 0.0], [0.0, 1.0]] * 4)
    result = cluster_corpus(config_of(tmp_path, num_clusters="auto"))
    assert result.counts["clusters"] == 2
    assert "only 2 different vectors" in result.summary["why so many clusters"]


@pytest.mark.slow
def test_buckets_are_read_and_written(tmp_path, s3_server):
    s3_server.create_bucket(Bucket="clusters")
    write_corpus(tmp_path / "in")
    for file in (tmp_path / "in").iterdir():
        s3_server.upload_file(str(file), "clusters", f"my corpus/100%/{file.name}")
    address = "s3://clusters/my corpus/100%"
    cluster_corpus(config_of(tmp_path))
    cluster_corpus(config_of(tmp_path, embeddings=address, output="s3://clusters/out", fit="all"))
    cluster_corpus(config_of(tmp_path, fit="all", output=str(tmp_path / "all")))
    keys = {o["Key"] for o in s3_server.list_objects_v2(Bucket="clusters")["Contents"]}
    files = (
        "centroids.parquet",
        "clusters.parquet",
        "scores.json",
        "assignments/part-00000.parquet",
    )
    for file in files:
        assert f"out/{file}" in keys
        body = s3_server.get_object(Bucket="clusters", Key=f"out/{file}")["Body"].read()
        assert body == (tmp_path / "all" / file).read_bytes(), file
    assert "out/report.html" in keys


def test_one_cluster_is_described_and_its_undefined_scores_have_reasons(tmp_path):
    write_corpus(tmp_path / "in")
    cluster_corpus(config_of(tmp_path, num_clusters="1", label_column="label"))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["internal"]["silhouette"] is None
    assert "at least 2 clusters" in scores["undefined"]["silhouette"]
    assert scores["labels"]["v_measure"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": "many"}, "--num-clusters is 'many'"),
        ({"num_clusters": "0"}, "at least 1"),
        ({"fit": "sample:0"}, "--fit is 'sample:0'"),
        ({"fit": "some"}, "--fit is 'some'"),
        ({"restarts": 0}, "--restarts is 0"),
        ({"duplicate_similarity": 2.0}, "--duplicate-similarity is 2.0"),
        ({"max_clusters": 9}, "leave one of them out"),
        ({"initial_centroids": "x", "num_clusters": "2,3"}, "with one number"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_any_work(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, **settings)


@pytest.mark.parametrize(
    ("yaml", "name", "value"),
    [
        ("num_clusters: 20", "num_clusters", "20"),
        ("num_clusters: [10, 20]", "num_clusters", "10,20"),
        ("two_level: no", "two_level", "no"),
        ("fit: all", "fit", "all"),
    ],
)
def test_yaml_may_say_numbers_lists_and_truth(tmp_path, yaml, name, value):
    (tmp_path / "c.yaml").write_text(yaml)
    assert getattr(load_config(ClusterConfig, str(tmp_path / "c.yaml")), name) == value


def test_clusters_are_named_where_a_model_is_given(tmp_path):
    write_corpus(tmp_path / "in")
    asked = []

    class Namer:
        def check(self):
            assert not (tmp_path / "out").exists()

        def name(self, levels):
            asked.extend(brief for briefs in levels for brief in briefs)
            return [[f"some-llm: <i>{b.keywords[0]}</i>" for b in briefs] for briefs in levels]

    config = config_of(tmp_path, name_model="some-llm", num_clusters="2,3")
    assert "got no name" not in str(cluster_corpus(config, namer=Namer()).summary)
    coarse = pq.read_table(tmp_path / "out" / "clusters_2.parquet").to_pylist()
    assert all(row["name"].startswith("some-llm: <i>") for row in coarse)
    clusters = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    assert [row["name"] for row in clusters] == [
        f"some-llm: <i>{row['keywords'][0]}</i>" for row in clusters
    ]
    assert all(len(brief.texts) == len(set(brief.texts)) > 0 for brief in asked)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "some-llm: &lt;i&gt;" in page and "some-llm: <i>" not in page
    with pytest.raises(InputError, match="--name-model names clusters by their texts"):
        cluster_corpus(config_of(tmp_path, name_model="x", text_column="body"), namer=Namer())


def test_a_writer_that_cannot_be_asked_stops_the_job_and_one_that_falls_silent_does_not(tmp_path):
    write_corpus(tmp_path / "in")

    class Namer:
        def check(self):
            raise InputError("nobody answers")

        def name(self, levels):
            return [[None] * (len(briefs) - 1) + ["Goals"] for briefs in levels]

    config = config_of(tmp_path, name_model="some-llm", num_clusters="3")
    with pytest.raises(InputError, match="nobody answers"):
        cluster_corpus(config, namer=Namer())
    assert not (tmp_path / "out").exists()
    Namer.check = lambda self: None
    result = cluster_corpus(config, namer=Namer())
    assert "Clusters that got no name: 2 of 3. Keywords stand for them." in result.summary.values()
    clusters = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    assert sorted(row["name"] or "" for row in clusters) == ["", "", "Goals"]


@pytest.mark.parametrize(
    "url",
    [
        "llm.example/v1",
        "ftp://llm.example/v1",
        "http:///v1",
        "http://[::1/v1",
        "https://ann:sk-secret@llm.example/v1",
        "https://llm.example/v1?key=sk-secret",
        "https://llm.example/v1#sk-secret",
        "https://llm.example/v1 ",
    ],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_unrepeated(url):
    with pytest.raises(InputError, match="--name-url takes an address") as found:
        ClusterConfig(name_model="m", name_url=url)
    assert "secret" not in str(found.value)


def test_an_endpoint_needs_the_name_of_its_model():
    ClusterConfig(name_model="m", name_url="https://llm.example/v1")
    with pytest.raises(InputError, match="--name-url needs --name-model"):
        ClusterConfig(name_url="https://llm.example/v1")


def test_a_config_survives_its_own_record(tmp_path):
    config = config_of(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"config": asdict(config)}))
    assert parse(ClusterConfig, ["--config", str(tmp_path / "run.json")]) == config
    assert replace(config, seed=3) != config
