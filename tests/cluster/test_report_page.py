"""The report in a real browser: it draws, searches, sorts and opens clusters, and runs no text."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from cluster.census import Census, CensusPlan
from cluster.describe import Description, Example
from cluster.document_map import MapLayout
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
        ),
        facts={"setting": HOSTILE},
        curve=[
            {"k": i, "silhouette": 0.1 * i, "stability": 0.5, "elbow": 0.1} for i in range(2, 6)
        ],
        curve_note=HOSTILE,
        lists=[Listing("Outliers", "None.", ("Id", "Text"), [("doc-1", HOSTILE)])],
    )


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
    for chart in ("map", "sizes", "curve", "confusion"):
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


def test_a_click_on_a_point_opens_its_cluster(page):
    point = """
      const view = document.querySelector('#map').__view;
      const items = view.scenegraph().root.items[0].items.flatMap((g) => g.items || []);
      const item = items.find((i) => i.datum && i.datum.c === 1);
      const [ox, oy] = view.origin();
      const box = document.querySelector('#map canvas').getBoundingClientRect();
      return [box.left + ox + item.x, box.top + oy + item.y];
    """
    x, y = page.execute_script(point)
    webdriver.ActionChains(page).move_by_offset(int(x), int(y)).click().perform()
    assert "Cluster 1" in page.find_element(By.ID, "detail").text


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


SHOWN = """
  const items = document.querySelector('#map').__view.scenegraph().root.items[0].items
    .flatMap((g) => g.items || []);
  return [items.filter((i) => i.text).map((i) => i.text),
          new Set(items.filter((i) => i.datum && i.datum.id).map((i) => i.fill)).size];
"""


def test_the_map_shows_the_labels_and_colours_of_the_level_that_is_chosen(page):
    labels, colours = page.execute_script(SHOWN)
    assert "fine" in labels
    assert "coarse" not in labels
    assert colours == 4  # three clusters, and noise
    Select(page.find_element(By.ID, "level")).select_by_value("0")
    WebDriverWait(page, 10).until(lambda p: "coarse" in p.execute_script(SHOWN)[0])
    assert page.execute_script(SHOWN)[1] == 2
