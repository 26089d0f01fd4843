"""Every document on the map: where it was laid out, or among its neighbours, whatever the batch."""

import datetime
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import run_inline

from cluster import report, vectors
from cluster.clustering import cluster_corpus
from cluster.config import ClusterConfig
from cluster.document_map import Density, MapPlaces, lay_out
from pipelines.runtime.errors import InputError


def draw(n, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_the_sample_lies_where_it_was_laid_out():
    sample, points = draw(50), draw(50, 2, 1)
    assert MapPlaces(sample, points).place(sample) == pytest.approx(points, abs=1e-6)


def test_a_place_is_the_weighted_mean_of_the_four_nearest():
    sample, points, others = draw(50), draw(50, 2, 1), draw(20, seed=2)
    places = MapPlaces(sample, points).place(others)
    for vector, place in zip(others.astype(np.float64), places, strict=True):
        distances = np.linalg.norm(sample - vector, axis=1)
        nearest = np.argsort(distances)[:4]
        expected = np.average(points[nearest], axis=0, weights=distances[nearest] ** -4)
        assert place == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_places_are_bitwise_the_same_whatever_the_batch(batch):
    sample, points = np.repeat(draw(40, 20), 2, axis=0), draw(80, 2, 1)
    others = np.vstack([draw(100, 20, seed=2), sample[:20]])
    places = MapPlaces(sample, points)
    parts = [places.place(others[start : start + batch]) for start in range(0, 120, batch)]
    assert np.vstack(parts).tobytes() == places.place(others).tobytes()


def test_fewer_documents_than_neighbours_have_places():
    assert MapPlaces(draw(1), draw(1, 2)).place(draw(3)).tolist() == draw(1, 2).tolist() * 3


def test_a_layout_keeps_groups_apart_and_is_the_same_again():
    members = np.repeat(np.arange(3), 30)
    vectors = (20 * np.eye(3, 6)[members] + draw(90)).astype(np.float32)
    layout = lay_out(vectors, 1)
    assert layout.method == "t-SNE"
    assert layout.points.tobytes() == lay_out(vectors, 1).points.tobytes()
    centres = np.stack([layout.points[members == group].mean(axis=0) for group in range(3)])
    nearest = ((layout.points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert nearest.tolist() == members.tolist()


@pytest.mark.parametrize(
    "vectors", [draw(5), np.ones((40, 6), np.float32), draw(40, 1), np.eye(40, 6, dtype=np.float32)]
)
def test_few_equal_or_flat_documents_have_finite_places(vectors):
    points = lay_out(vectors, 0).points
    assert points.shape == (len(vectors), 2)
    assert np.isfinite(points).all()


def test_density_counts_each_document_in_its_square():
    grid = Density.over(np.array([[0, 0], [96, 48]], dtype=np.float32))
    assert grid.counts.shape == (48, 96)
    assert grid.side == 1
    grid.add(np.array([[0, 0], [0.5, 0.9], [3.5, 2.5], [96, 48], [95.5, 47.5]], dtype=np.float32))
    found = {tuple(cell): grid.counts[tuple(cell)] for cell in np.argwhere(grid.counts).tolist()}
    assert found == {(0, 0): 2, (2, 3): 1, (47, 95): 2}


@pytest.mark.parametrize("batch", [1, 7, 1_000])
def test_density_is_the_same_whatever_the_batch(batch):
    points = draw(500, 2, 3)
    parts, whole = Density.over(points), Density.over(points)
    whole.add(points)
    for start in range(0, 500, batch):
        parts.add(points[start : start + batch])
    assert np.array_equal(parts.counts, whole.counts)
    assert whole.counts.sum() == 500


@pytest.mark.parametrize("points", [np.zeros((4, 2)), np.array([[0, 1], [9, 1.0]])])
def test_density_of_documents_on_a_point_or_a_line_loses_none(points):
    grid = Density.over(points.astype(np.float32))
    grid.add(points.astype(np.float32))
    assert grid.counts.sum() == len(points)


@pytest.fixture
def clustered(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    (tmp_path / "in").mkdir()

    def cluster(cuts, name, **settings):
        monkeypatch.setattr(vectors.open_vectors, "__kwdefaults__", {
            **vectors.open_vectors.__kwdefaults__, "rows_per_shard": 50,
        })  # fmt: skip
        for path in (tmp_path / "in").iterdir():
            path.unlink()
        for start, stop in zip((0, *cuts), (*cuts, 200), strict=True):
            rows = {
                "id": [f"d{i}" for i in range(start, stop)],
                "text": [f"word{i % 7} and so on" for i in range(start, stop)],
                "day": [
                    None if i % 10 == 0 else datetime.date(2024, 1, 1) + datetime.timedelta(4 * i)
                    for i in range(start, stop)
                ],
                "year": [2000 + i % 20 for i in range(start, stop)],
                "embedding": list(draw(200)[start:stop]),
            }
            pq.write_table(pa.table(rows), tmp_path / "in" / f"{start:03d}.parquet")
        output = tmp_path / name
        defaults = {"num_clusters": "5", "map_documents": 15, "keep_columns": ("year", "text")}
        given = {**defaults, **settings}
        cluster_corpus(ClusterConfig(embeddings=str(tmp_path / "in"), output=str(output), **given))
        return output

    return cluster


def test_the_map_holds_every_document_whatever_the_files(clustered):
    output = clustered((), "one")
    first = pq.read_table(output / "map.parquet")
    assert first.column_names == ["id", "x", "y", "cluster_id", "year", "text"]
    second = pq.read_table(clustered((30, 90, 91), "many") / "map.parquet")
    assert first.sort_by("id").equals(second.sort_by("id"))
    rows = {row["id"]: row for row in first.to_pylist()}
    assert len(rows) == 200
    assigned = pq.read_table(output / "assignments").to_pylist()
    assert all(rows[row["id"]]["cluster_id"] == row["cluster_id"] for row in assigned)
    assert all(row["year"] == 2000 + int(row["id"][1:]) % 20 for row in rows.values())
    assert not (output / "_work").exists()


def test_the_report_shows_at_most_as_many_points_as_a_page_holds(clustered, monkeypatch):
    monkeypatch.setattr(report, "MAP_POINTS", 10)
    page = (clustered((), "out") / "report.html").read_text()
    shown = json.loads(page.split('id="report-data">')[1].split("</script>")[0])["map"]
    assert len(shown["x"]) == len(shown["id"]) == len(shown["levels"][0]["cluster"]) == 10


def test_the_report_shows_the_sample_where_the_map_has_it(clustered):
    output = clustered((60,), "out")
    page = (output / "report.html").read_text()
    data = page.split('id="report-data">')[1].split("</script>")[0]
    shown = json.loads(data)["map"]
    assert len(shown["x"]) == 15
    rows = {row["id"]: row for row in pq.read_table(output / "map.parquet").to_pylist()}
    x, y = (np.array([row[name] for row in rows.values()]) for name in "xy")
    density = shown["density"]
    counted, _, _ = np.histogram2d(
        y, x, (density["rows"], density["columns"]),
        [[start, start + density[n] * density["side"]]
         for start, n in ((density["bottom"], "rows"), (density["left"], "columns"))],
    )  # fmt: skip
    assert density["counts"] == counted.ravel().tolist()
    for name, x in zip(shown["id"], shown["x"], strict=True):
        assert rows[name]["x"] == pytest.approx(x, abs=1e-3)


def test_kept_columns_are_told_by_cluster_whatever_the_files(clustered):
    first, second = clustered((), "one"), clustered((30, 90, 91), "many")
    values = pq.read_table(first / "column_values.parquet")
    assert values.equals(pq.read_table(second / "column_values.parquet"))
    rows = pq.read_table(first / "map.parquet").to_pylist()
    years = [row for row in values.to_pylist() if row["column"] == "year"]
    assert len(years) == 5
    for row in years:
        members = [r["year"] for r in rows if r["cluster_id"] == row["cluster_id"]]
        assert (row["documents"], row["sum"]) == (len(members), sum(members))
        assert row["mean"] == sum(members) / len(members)
    texts = Counter((row["cluster_id"], row["text"]) for row in rows)
    found = [row for row in values.to_pylist() if row["column"] == "text"]
    assert {(r["cluster_id"], r["value"]): r["documents"] for r in found} == texts
    assert not (first / "over_time.parquet").exists()


def test_topics_over_time_are_of_all_documents(clustered):
    output = clustered((60,), "out", keep_columns=("day",))
    rows = pq.read_table(output / "over_time.parquet").to_pylist()
    documents = pq.read_table(output / "map.parquet").to_pylist()
    expected = Counter((r["cluster_id"], r["day"].replace(day=1)) for r in documents if r["day"])
    assert {(r["cluster_id"], r["start"].date()): r["documents"] for r in rows} == expected
    assert sum(expected.values()) == 180
    assert {row["unit"] for row in rows} == {"month"}
    shown = json.loads(
        (output / "report.html").read_text().split('id="report-data">')[1].split("</script>")[0]
    )
    assert (
        sum(shown["columns"][0]["time"]["totals"]) + shown["columns"][0]["time"]["outside"] == 180
    )


def test_tables_of_columns_that_are_no_longer_kept_are_removed(clustered):
    output = clustered((), "out", keep_columns=("day", "year"))
    assert {"over_time.parquet", "column_values.parquet"} <= {p.name for p in output.iterdir()}
    clustered((), "out", keep_columns=())
    assert not {p.name for p in output.iterdir()} & {"over_time.parquet", "column_values.parquet"}


@pytest.mark.parametrize(("columns", "message"), [(("x",), "not id, x, y"), (("n",), "no column")])
def test_columns_that_cannot_be_kept_are_refused(clustered, columns, message):
    with pytest.raises(InputError, match=message):
        clustered((), "out", keep_columns=columns)
