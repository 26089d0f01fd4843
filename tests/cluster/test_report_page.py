"""The report in a real browser: it draws, searches, sorts and opens clusters, and runs no text."""

import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from cluster.census import Census, CensusPlan
from cluster.describe import Description, Example
from cluster.document_map import Density, MapLayout
from cluster.kept_columns import KeptColumn, Numbers, Times
from cluster.metrics import score_clustering
from cluster.report import render_report
from cluster.report_data import Listing, MapLevel, MappedDocuments, Report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
HOSTILE = "</script><script>document.title='taken'</script><!-- <img src=x onerror=alert(1)> & café"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here"),
]


def example(number, text):
    return Example(f"doc-{number}", 0.25, text, "label <b>x</b>")


def report(k=3):
    random = np.random.default_rng(0)
    ids = np.arange(60) % k
    sizes = np.bincount(ids) * np.arange(k, 0, -1)
    vectors = random.standard_normal((60, 5)).astype(np.float32)
    plan = CensusPlan((k,), 5, 1_000, 10.0)
    labels = {"label <b>x</b>": sizes // 2, "other": sizes - sizes // 2}
    census = Census(plan, sizes, sizes * 0, sizes * 0, labels)
    words = ["volcano", "orchard", "harbour"]
    clusters = [
        Description(
            i,
            int(sizes[i]),
            float(sizes[i] / sizes.sum()),
            [words[i % 3], HOSTILE],
            [example(i, f"{HOSTILE} nearest of {i}")],
            [example(i + 100, f"breadth of {i}")],
            0.5 + i / 10,
            "other",
            0.5,
        )
        for i in range(k)
    ]
    return Report(
        title=f"Clusters of {HOSTILE}",
        lead="A test.",
        notices=[HOSTILE],
        census=census,
        clusters=clusters,
        scores=score_clustering(sizes, 1.0, np.array(list(labels.values())), vectors, ids),
        mapped=MappedDocuments(
            MapLayout(vectors[:, :2], "PCA", "PCA."),
            ids,
            [f"doc-{i}" for i in range(60)],
            [f"{HOSTILE} {i}" for i in range(60)],
            [
                MapLevel(ids // 2, {0: "coarse", 1: HOSTILE}),
                MapLevel(np.where(np.arange(60) < 2, -1, ids), {0: "fine", 1: "", 2: HOSTILE}),
            ],
            density(vectors[:, :2]),
        ),
        facts={"setting": HOSTILE},
        curve=[
            {"k": i, "silhouette": 0.1 * i, "stability": 0.5, "elbow": 0.1} for i in range(2, 6)
        ],
        curve_note=HOSTILE,
        lists=[Listing("Outliers", "None.", ("Id", "Text"), [("doc-1", HOSTILE)])],
        columns=kept(),
    )


def kept():
    """A category, a number and a date, of 60 documents in three clusters."""
    words = np.array([[HOSTILE, "b", None][i % 3] for i in range(60)], dtype=object)
    counts = {(0, HOSTILE): 40, (0, None): 20, (1, "b"): 30, (2, "b"): 20}
    numbers = Numbers({0: 20, 2: 4}, {0: Fraction(50), 2: Fraction(20)})
    days = np.datetime64("2026-01-05", "us") + np.arange(60) * np.timedelta64(1, "D")
    weeks = range(2_923, 2_929)
    assert str(Times("week", {}, weeks).start_of(2_923)).startswith("2026-01-05")
    times = Times("week", {(0, 2_923): 5, (0, 2_924): 15, (1, 2_928): 7, (2, 9): 1}, weeks)
    return [
        KeptColumn(f"word {HOSTILE}", "category", words, counts),
        KeptColumn("views", "number", np.arange(60.0), numbers=numbers),
        KeptColumn("published", "date", days, times=times),
        KeptColumn("title", "category", np.array([f"t{i}" for i in range(60)], dtype=object)),
    ]


def density(points):
    grid = Density.over(points)
    grid.add(np.repeat(points, 9, axis=0))
    return grid


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1200",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    return opened(browser, tmp_path / "report.html", report())


def opened(browser, path, content):
    path.write_text(render_report(content), encoding="utf-8")
    browser.get(path.as_uri())
    ready = "return document.documentElement.dataset.ready === 'true'"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(ready))
    return browser


def shown_rows(page):
    rows = page.find_elements(By.CSS_SELECTOR, "#cluster-table tbody tr")
    return [row.get_attribute("data-id") for row in rows if row.is_displayed()]


def test_it_loads_and_draws_without_a_complaint(page):
    assert [line for line in page.get_log("browser") if line["level"] != "INFO"] == []
    for chart in ("map", "sizes", "curve", "confusion", "times"):
        assert page.find_elements(By.CSS_SELECTOR, f"#{chart} canvas"), chart


def bare(k):
    """A report of vectors alone: no texts, labels, curve or examples."""
    full = report(k)
    scores = score_clustering(
        full.census.sizes, 0.0, None, np.zeros((2, 3), np.float32), np.zeros(2, int)
    )
    return replace(
        full,
        census=replace(full.census, labels={}),
        scores=scores,
        curve=[],
        levels=[],
        lists=[Listing("Outliers", "None.", (), [])],
        has_texts=False,
        columns=[],
        clusters=[
            replace(c, keywords=[], central=[], diverse=[], top_label=None, mean_distance=None)
            for c in full.clusters
        ],
        mapped=MappedDocuments(
            MapLayout(np.zeros((60, 2), np.float32), "PCA", "PCA."),
            np.arange(60) % k,
            range(60),
            None,
        ),
    )


@pytest.mark.parametrize("k", [1, 3, 40])
def test_a_bare_page_draws_without_a_complaint_too(browser, tmp_path, k):
    page = opened(browser, tmp_path / "bare.html", bare(k))
    assert [line for line in page.get_log("browser") if line["level"] != "INFO"] == []
    assert len(shown_rows(page)) == k
    assert not page.find_elements(By.ID, "curve")


def test_names_levels_and_narrow_screens_fit(browser, tmp_path):
    full = report()
    named = [replace(c, name=f"Name {c.cluster_id} {HOSTILE}") for c in full.clusters]
    levels = [
        {"num_clusters": 3, "cluster_id": i, "parent_num_clusters": 2, "parent_cluster_id": 0,
         "parent_share": 1.0, "share": "100%"} for i in range(3)
    ]  # fmt: skip
    page = opened(browser, tmp_path / "n.html", replace(full, clusters=named, levels=levels))
    page.find_element(By.ID, "search").send_keys("name 2")
    assert shown_rows(page) == ["2"]
    page.find_element(By.CSS_SELECTOR, "tr[data-id='2'] .name").click()
    assert page.find_element(By.CSS_SELECTOR, "#detail h2").text.startswith(
        "Cluster 2: Name 2 </scr"
    )
    page.set_window_size(420, 900)
    wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth + 1"
    # The charts are drawn anew a moment after the window's size has changed.
    WebDriverWait(page, 10).until(lambda page: not page.execute_script(wide))
    page.set_window_size(1400, 1200)


def test_texts_stay_texts(page):
    assert page.title == f"Clusters of {HOSTILE}"
    assert not page.find_elements(By.CSS_SELECTOR, "img, b b, td b")
    assert HOSTILE in page.find_element(By.CSS_SELECTOR, "#detail .documents").text


def test_search_filters_clusters(page):
    page.find_element(By.ID, "search").send_keys("orchard")
    assert shown_rows(page) == ["1"]
    assert page.find_element(By.ID, "matches").text == "1 of 3 clusters"
    page.find_element(By.ID, "search").send_keys(Keys.BACKSPACE * 7, "breadth of 2")
    assert shown_rows(page) == ["2"]


def test_a_click_on_a_cluster_shows_its_documents(page):
    page.find_element(By.CSS_SELECTOR, "tr[data-id='2'] .excerpt").click()
    detail = page.find_element(By.ID, "detail").text
    assert "Cluster 2" in detail
    assert "nearest of 2" in detail and "breadth of 2" in detail


MAP = "const map = document.querySelector('#map').map; "


def ask(page, code):
    return page.execute_script(MAP + "return " + code)


def mouse(page, *places):
    """Press at the first of ``places``, pixels of the map, go over the others, and let go."""
    canvas = page.find_element(By.CSS_SELECTOR, "#map canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width, height = ask(page, "map.size()")
    chain = webdriver.ActionChains(page, duration=50)
    for number, (x, y) in enumerate(places):
        chain.move_to_element_with_offset(canvas, round(x - width / 2), round(y - height / 2))
        if number == 0:
            chain.click_and_hold()
    chain.release().perform()


def says(page, words):
    """The map's status comes to say so, once the view rests."""
    WebDriverWait(page, 5).until(lambda p: words in p.find_element(By.ID, "map-status").text)


def picked(page):
    return page.find_element(By.ID, "picked-ids").get_attribute("value").split("\n")


def alone(page):
    """A point of cluster 1 with no other near it."""
    places = ask(page, "Array.from({length: 60}, (_, i) => map.screen(i))")
    gaps = np.linalg.norm(np.array(places)[:, None] - np.array(places), axis=2)
    return next(i for i in range(1, 60, 3) if np.sort(gaps[i])[1] > 25)


def test_a_click_on_a_point_opens_its_cluster_and_gives_its_id(page):
    place = alone(page)
    mouse(page, ask(page, f"map.screen({place})"))
    assert "Cluster 1" in page.find_element(By.ID, "detail").text
    assert picked(page) == [f"doc-{place}"]
    assert HOSTILE in page.find_element(By.ID, "picked-list").text
    assert not page.find_elements(By.CSS_SELECTOR, "#picked img")


def test_a_lasso_selects_what_lies_within_and_copies_their_ids(page):
    page.find_element(By.ID, "lasso").click()
    places = np.array(ask(page, "Array.from({length: 60}, (_, i) => map.screen(i))"))
    width, height = ask(page, "map.size()")
    # A triangle over the left half of the map, so that its edge is slanted.
    corners = np.array([[2, 2], [width * 0.6, 2], [2, height - 2]])
    mouse(page, *corners)
    x, y = places.T
    inside = (x > 2) & (y > 2) & ((x - 2) / (width * 0.6 - 2) + (y - 2) / (height - 4) < 1)
    assert 0 < inside.sum() < 60
    assert picked(page) == [f"doc-{i}" for i in np.flatnonzero(inside)]
    assert page.find_element(By.ID, "picked-count").text.startswith(f"{inside.sum()} of 60 doc")
    page.find_element(By.ID, "copy").click()
    WebDriverWait(page, 5).until(lambda p: p.find_element(By.ID, "copied").text == "Copied.")
    page.find_element(By.ID, "unpick").click()
    assert not page.find_element(By.ID, "picked").is_displayed()


def test_dragging_pans_the_map(page):
    page.execute_script(MAP + "map.zoomBy(4); map.draw()")
    x, y = ask(page, "map.screen(0)")
    mouse(page, (300, 300), (310, 305), (340, 280))
    moved = ask(page, "map.screen(0)")
    assert moved == pytest.approx([x + 40, y - 20], abs=1.5)
    assert not page.find_element(By.ID, "picked").is_displayed()


def test_ids_too_long_for_the_page_are_not_given_to_copy(browser, tmp_path):
    full = report()
    ids = ["x" * 20_000, *full.mapped.ids[1:]]
    page = opened(browser, tmp_path / "l.html", replace(full, mapped=replace(full.mapped, ids=ids)))
    page.execute_script(MAP + "map.select([0, 1])")
    assert picked(page) == ["doc-1"]
    assert "1 have ids too long" in page.find_element(By.ID, "picked-count").text


def test_the_keyboard_moves_over_the_map_and_selects_what_is_in_view(page):
    canvas = page.find_element(By.CSS_SELECTOR, "#map canvas")
    page.execute_script("arguments[0].focus()", canvas)
    keys = page.switch_to.active_element
    keys.send_keys("++++", Keys.ARROW_LEFT, Keys.ENTER)
    width, height = ask(page, "map.size()")
    places = np.array(ask(page, "Array.from({length: 60}, (_, i) => map.screen(i))"))
    inside = ((places >= 0) & (places <= [width, height])).all(axis=1)
    assert 0 < inside.sum() < 60
    assert picked(page) == [f"doc-{i}" for i in np.flatnonzero(inside)]
    says(page, f"{inside.sum()} of 60 points in view")
    keys.send_keys(Keys.ESCAPE, "0")
    assert not page.find_element(By.ID, "picked").is_displayed()
    says(page, "60 of 60 points in view")


def test_a_cluster_s_documents_can_be_selected_without_the_map(page):
    page.find_element(By.CSS_SELECTOR, "tr[data-id='2'] .excerpt").click()
    page.find_element(By.CSS_SELECTOR, "#detail .pick").click()
    assert picked(page) == [f"doc-{i}" for i in range(2, 60, 3)]


def crowded():
    """Two hundred clusters with long names, many of them in one place."""
    full, random = report(), np.random.default_rng(1)
    points = random.standard_normal((2_000, 2)).astype(np.float32)
    ids = np.arange(2_000) % 200
    names = {i: f"a rather long name {i}" for i in range(200)}
    levels = [MapLevel(ids // 20, names), MapLevel(ids, names)]
    return replace(
        full,
        mapped=MappedDocuments(MapLayout(points, "PCA", ""), ids, range(2_000), None, levels),
    )


def test_labels_never_cover_each_other(browser, tmp_path):
    page = opened(browser, tmp_path / "crowded.html", crowded())
    for size in ((1400, 1200), (420, 900)):
        page.set_window_size(*size)
        for level in ("null", "0", "1"):
            for zoom in (1, 2, 3):
                code = f"map.whole(); map.zoomBy({zoom}); map.show({level}); map.draw();"
                boxes = page.execute_script(MAP + code + "return map.labels()")
                assert len(boxes) > 3
                width = ask(page, "map.size()")[0]
                for i, a in enumerate(boxes):
                    assert a["x"] >= 0 and a["x"] + a["w"] <= width + 1
                    for b in boxes[:i]:
                        apart = (
                            a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"],
                            a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"],
                        )
                        assert any(apart), (a, b)
    page.set_window_size(1400, 1200)


def test_the_map_says_in_words_where_clusters_lie(page):
    page.find_element(By.CSS_SELECTOR, ".words summary").click()
    rows = page.find_elements(By.CSS_SELECTOR, "#map-words tr")
    cells = [cell.text for cell in rows[0].find_elements(By.TAG_NAME, "td")]
    assert cells[:2] == ["coarse", "40"]
    assert cells[2].split()[0] in ("top", "middle", "bottom")


def test_the_keyboard_reaches_and_opens_a_cluster(page):
    button = page.find_element(By.CSS_SELECTOR, "tr[data-id='1'] button")
    page.execute_script("arguments[0].focus()", button)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert "Cluster 1" in page.find_element(By.ID, "detail").text
    assert button.get_attribute("aria-pressed") == "true"


def test_a_header_sorts_both_ways(page):
    button = page.find_element(By.CSS_SELECTOR, "th button[data-key='size']")
    button.click()
    assert shown_rows(page) == ["2", "1", "0"]
    button.click()
    assert shown_rows(page) == ["0", "1", "2"]


def test_dark_follows_the_system(page):
    light = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    dark = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert light != dark


def shown(page):
    """Labels, and how many looks points have."""
    labels = ask(page, "map.labels().map((box) => box.text)")
    looks = "new Set(Array.from({length: 60}, (_, i) => JSON.stringify(map.mark(i)))).size"
    return labels, ask(page, looks)


def test_the_map_shows_the_labels_and_colours_of_the_level_that_is_chosen(page):
    Select(page.find_element(By.ID, "level")).select_by_value("1")
    WebDriverWait(page, 10).until(lambda p: "fine" in shown(p)[0])
    labels, looks = shown(page)
    assert "coarse" not in labels
    assert looks == 4  # three clusters, and noise
    Select(page.find_element(By.ID, "level")).select_by_value("0")
    WebDriverWait(page, 10).until(lambda p: "coarse" in shown(p)[0])
    assert shown(page)[1] == 2


def test_zooming_in_goes_from_coarse_levels_to_fine_ones(page):
    assert "coarse" in shown(page)[0]
    says(page, "2 clusters (coarser than the table's 3); ")
    page.find_element(By.ID, "zoom-in").click()
    WebDriverWait(page, 10).until(lambda p: "coarse" not in shown(p)[0])
    assert shown(page)[1] == 4
    says(page, "3 clusters; ")
    page.find_element(By.ID, "zoom-whole").click()
    WebDriverWait(page, 10).until(lambda p: "coarse" in shown(p)[0])


def test_density_is_shaded_where_no_point_is(browser, tmp_path):
    corners = np.tile(np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=np.float32), (15, 1))
    everyone = Density.over(corners)
    everyone.add(np.full((100, 2), 0.5, dtype=np.float32))
    full = report()
    mapped = replace(full.mapped, layout=MapLayout(corners, "PCA", ""), levels=[], density=everyone)
    page = opened(browser, tmp_path / "d.html", replace(full, mapped=mapped))
    alpha = """
      const canvas = document.querySelector('#map canvas'), [width, height] = map.size();
      const [x0] = map.screen(0), [x1] = map.screen(1), ratio = canvas.width / width;
      const at = (x) => canvas.getContext('2d')
        .getImageData(ratio * (x0 + x * (x1 - x0)), ratio * height / 2, 1, 1).data[3];
      return [at(0.505), at(0.3)];
    """
    shaded, empty = page.execute_script(MAP + alpha)
    assert shaded > 50
    assert empty == 0


def legend(page):
    return [item.text.split("\n") for item in page.find_elements(By.CSS_SELECTOR, "#legend li")]


def test_points_can_be_coloured_by_a_kept_column(page):
    by = Select(page.find_element(By.ID, "colour"))
    names = [option.text for option in by.options]
    assert names[0] == "by cluster"
    assert names[2:] == ["by views", "by published"]  # not by title
    assert names[1].startswith("by word </script>")
    assert not page.find_element(By.ID, "legend").is_displayed()
    by.select_by_visible_text("by views")
    assert legend(page)[0] == ["0 – 8", "9"]
    assert len(legend(page)) == 7
    assert shown(page)[1] == 7
    by.select_by_index(1)
    assert [item[-1] for item in legend(page)] == ["20", "20", "20"]
    hostile, *others = [item[0] for item in legend(page)]
    assert hostile.startswith("</script><script>document") and hostile.endswith("…")
    assert others == ["b", "no value"]
    marks = ask(page, "[0, 1, 2, 3].map((i) => map.mark(i))")
    assert marks[0] == marks[3] != marks[1]
    assert marks[2]["hollow"]
    by.select_by_index(0)
    assert not page.find_element(By.ID, "legend").is_displayed()
    assert shown(page)[1] == 2


def test_clusters_have_sizes_by_another_column(page):
    by = Select(page.find_element(By.ID, "measure"))
    assert [o.text for o in by.options] == ["documents", "sum of views", "mean of views"]

    def sizes():
        rows = page.find_elements(By.CSS_SELECTOR, "#cluster-table tbody tr")
        return [
            (r.get_attribute("data-id"), r.find_element(By.CSS_SELECTOR, ".size-bar").text)
            for r in rows
        ]

    before = sizes()
    by.select_by_visible_text("sum of views")
    assert sizes() == [("0", "50"), ("2", "20"), ("1", "0")]
    by.select_by_visible_text("mean of views")
    assert sizes() == [("2", "5"), ("0", "2.5"), ("1", "–")]
    header = page.find_element(By.CSS_SELECTOR, "th button[data-key='size']")
    assert header.text.startswith("Mean of views")
    by.select_by_visible_text("documents")
    assert sizes() == before


def test_a_cluster_tells_of_kept_columns_and_of_its_time(page):
    detail = page.find_element(By.ID, "detail")
    assert "sum 50, mean 2.5" in detail.text
    assert "none 33%" in detail.text
    assert "published, by week" in detail.text
    assert "2026-01-05 to 2026-02-09; most in 2026-01-12: 15" in detail.text
    bars = detail.find_elements(By.CSS_SELECTOR, ".timeline rect")
    assert [float(bar.get_attribute("height")) for bar in bars] == pytest.approx(
        [10 / 3, 10, 0, 0, 0, 0], abs=1e-3
    )
    chart = detail.find_element(By.CSS_SELECTOR, ".timeline svg")
    assert "most in 2026-01-12: 15" in chart.get_attribute("aria-label")


def test_topics_over_time_say_what_lies_outside(page):
    note = page.find_element(By.ID, "times-note").text
    assert note.startswith("Share of the documents of each week")
    assert note.endswith("Documents of other times: 1.")
