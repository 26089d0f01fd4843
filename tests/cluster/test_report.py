"""The report as a string: under its size for any corpus, and with no text as markup."""

import json
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import vl_convert
from markupsafe import escape

from cluster import report as page
from cluster.census import Census, CensusPlan
from cluster.describe import Description, Example
from cluster.document_map import Density, MapLayout, lay_out
from cluster.kept_columns import KeptColumn, Numbers, Times
from cluster.metrics import score_clustering
from cluster.page_text import inline_json, shorten
from cluster.report import render_report
from cluster.report_data import (
    Changes,
    Listing,
    MapLevel,
    MappedDocuments,
    Report,
    page_data,
)

WIDE = "漢字" * 2_000


def report(k, text, mapped=3_000):
    sizes = np.full(k, 10)
    examples = [Example(f"doc-{i}", 0.5, text, text) for i in range(9)]
    clusters = [
        Description(i, 10, 1 / k, [text] * 8, examples[:5], examples[5:], 0.5, text, 1.0)
        for i in range(k)
    ]
    vectors = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    census = Census(CensusPlan((k,), 5, 1_000, 9.0), sizes, sizes * 0, sizes * 0, {text: sizes})
    points = np.zeros((mapped, 2), dtype=np.float32)
    return Report(
        title=text[:50],
        lead="",
        notices=[],
        census=census,
        clusters=clusters,
        scores=score_clustering(sizes, 1.0, None, vectors, np.arange(60) % 2),
        mapped=MappedDocuments(
            MapLayout(points, "PCA", ""), np.zeros(mapped, int), [text] * mapped, [text] * mapped
        ),
        facts={},
    )


def test_a_page_of_many_clusters_and_long_wide_texts_stays_under_5_mb():
    page = render_report(report(10_000, WIDE))
    assert len(page.encode()) < 5_000_000
    assert "The 500 largest of 10,000 clusters" in page


def test_markup_in_texts_is_escaped_everywhere():
    hostile = "<script>alert(1)</script><!--\u2028"
    page = render_report(report(2, hostile, mapped=5))
    assert "<script>alert" not in page
    assert "<!--" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    data = re.search(r'id="report-data">(.*?)</script>', page, flags=re.DOTALL)
    assert json.loads(data[1])["clusters"][0]["central"][0]["text"].startswith("<script>")


def test_the_page_asks_for_nothing_from_outside():
    page = render_report(report(2, "word", mapped=5))
    assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=[\"']https?:", page)


def test_a_page_without_texts_has_no_keyword_column():
    page = render_report(replace(report(2, "word", mapped=5), has_texts=False))
    assert "Keywords</button>" not in page


def test_few_documents_are_laid_out_by_pca_and_it_is_said():
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    layout = lay_out(vectors, seed=0)
    assert layout.method == "PCA"
    assert layout.points.shape == (9, 2)
    assert "fewer than 20 documents" in layout.note


def test_equal_vectors_lie_on_one_point():
    assert not lay_out(np.ones((5, 3), np.float32), seed=0).points.any()


def test_the_same_seed_gives_the_same_map():
    vectors = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    first, second = lay_out(vectors, seed=4), lay_out(vectors, seed=4)
    assert first.points.tobytes() == second.points.tobytes()


def test_the_chart_library_is_joined_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    page._chart_library.cache_clear()
    first = page._chart_library()
    page._chart_library.cache_clear()
    monkeypatch.setattr(vl_convert, "javascript_bundle", None)
    assert page._chart_library() == first
    assert "vegaEmbed" in first
    assert "</script" not in first


def test_labels_stand_amid_the_largest_clusters_and_noise_has_none():
    points = np.array([[0, 0], [2, 0], [4, 6], [9, 9], [7, 7]], dtype=np.float32)
    ids = np.array([1, 1, 1, 0, -1])
    mapped = MappedDocuments(
        MapLayout(points, "PCA", ""), ids, range(5), None, [MapLevel(ids, {0: "small", 1: "large"})]
    )
    data = page_data(replace(report(2, "word"), mapped=mapped), [])
    assert data["map"]["levels"] == [
        {
            "clusters": 2,
            "cluster": ids.tolist(),
            "labels": [
                {"c": 1, "n": 3, "x": 2, "y": 0, "t": "large"},
                {"c": 0, "n": 1, "x": 9, "y": 9, "t": "small"},
            ],
        }
    ]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_places_keep_their_digits_however_wide_the_map_is(scale):
    points = (draw(50) * scale).astype(np.float32)
    mapped = MappedDocuments(MapLayout(points, "PCA", ""), np.zeros(50, int), range(50), None)
    data = page_data(replace(report(2, "word"), mapped=mapped), [])["map"]
    error = np.abs(np.array([data["x"], data["y"]]).T - points).max()
    assert error < 1e-4 * np.ptp(points)


def draw(n):
    return np.random.default_rng(0).standard_normal((n, 2))


@pytest.mark.parametrize(
    "text", ["plain", "<" * 50, "'\"\\ " * 30, "\x01" * 40, "漢" * 40, "a<" * 9]
)
def test_a_short_text_is_short_in_the_page_too(text):
    for room in (5, 20, 64, 1_000):
        short = shorten(text, room)
        assert len(json.dumps(short, ensure_ascii=False).encode()) - 2 <= room
        assert len(inline_json(short).encode()) - 2 <= room
        assert len(str(escape(short)).encode()) <= room
        if len(text) * 6 <= room:
            assert short == " ".join(text.split())


WORST = {
    "wide": WIDE, "markup": "<&>" * 2_000, "quotes": "\"'" * 2_000, "controls": "\x01\x02" * 2_000
}  # fmt: skip


@pytest.mark.parametrize("text", WORST.values(), ids=WORST)
def test_the_worst_page_stays_under_5_mb(text):
    k, shown = 10_000, 5_000
    full = report(k, text, mapped=shown)
    ids = np.arange(shown) % k
    names = dict.fromkeys(range(k), text)
    everywhere = (100 * draw(200_000)).astype(np.float32)
    density = Density.over(everywhere)
    density.add(everywhere)
    long_ids = [f"{i:0150d}" for i in range(shown)]
    mapped = replace(
        full.mapped,
        layout=MapLayout(everywhere[:shown], "PCA", text),
        cluster_ids=ids,
        ids=long_ids,
        levels=[MapLevel(ids + 1_000 * i, names) for i in range(8)],
        density=density,
    )
    many = range(8 * k)
    values = np.array([f"{i % 999} {text}" for i in range(shown)], dtype=object)
    counts = {(i % k, str(values[i % 999])): 1 for i in many}
    days = np.datetime64("2026-01-01", "us") + np.arange(shown) * np.timedelta64(1, "h")
    times = Times("day", {(i % k, 20_454 + i % 60): 10**9 for i in many}, range(20_454, 20_514))
    numbers = Numbers(dict.fromkeys(range(k), 3), {i: Fraction(10**20, i + 7) for i in range(k)})
    columns = [
        *[KeptColumn(text, "category", values, counts)] * 3,
        *[KeptColumn(text, "number", np.linspace(0, 1e9, shown), numbers=numbers)] * 3,
        *[KeptColumn(text, "date", days, times=times)] * 20,
    ]
    rows = [(text,) * 6] * 60
    lists = [Listing("Outliers", "None.", ("Id",) * 6, rows)] * 3
    level = {"num_clusters": k, "cluster_id": k, "parent_num_clusters": k, "parent_cluster_id": k}
    page = render_report(
        replace(
            full,
            mapped=mapped,
            columns=columns,
            lists=lists,
            changes=Changes("Changes", "", lists),
            levels=[{**level, "share": "100%"}] * 1_000,
            facts={"keep columns": text},
            clusters=[replace(c, name=text) for c in full.clusters],
        )
    )
    assert len(page.encode()) < 5_000_000
    assert "18 more kept columns are not shown." in page
