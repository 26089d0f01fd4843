"""The page of a deduplication: its numbers and pairs, moved by keys, in light and dark."""

import shutil

import pyarrow as pa
import pytest

from cluster.duplicate_report import Judged, render_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def judged(**changes):
    curve = {
        "similarity": [0.8, 0.9, 0.95, 0.999],
        "removed": [40, 20, 10, 0],
        "share": [0.4, 0.2, 0.1, 0.0],
        "exact": [False, False, True, True],
    }
    pairs = [
        {"similarity": 0.901, "id": "a", "text": HOSTILE, "kept_id": "b", "kept_text": "like it"},
        {"similarity": 0.952, "id": "c", "text": "one", "kept_id": 7, "kept_text": None},
    ]
    found = {
        "settings": {"embeddings": "runs/x", "method": "vectors", "keep": "first", "against": None},
        "similarity": 0.95,
        "counts": {
            "documents": 100, "kept": 90, "removed": 10, "groups": 8, "rejected": 0,
            "not_comparable": 2,
        },
        "metrics": {"recall": {"value": 1.0, "removed": 5, "expected": 5, "sample": 50}},
        "curve": pa.table(curve),
        "pairs": pairs,
    }  # fmt: skip
    return Judged(**{**found, **changes})


def test_the_page_says_what_was_removed_and_by_which_rule():
    page = render_page(judged())
    assert "in the order of the corpus" in page
    assert "Zero vectors: 2." in page
    assert "recall (5 of 5 expected, 50 compared with all)" in page
    assert '<td class="number">20</td><td class="number">20.00%</td><td>at most</td>' in page
    assert "<script>document.title" not in page


def test_a_page_of_texts_without_pairs_or_estimates():
    curve = judged().curve.slice(2)
    unknown = pa.table({n: [v] for n, v in zip(curve.column_names, [0.8, None, None, False])})  # noqa: B905
    curve = pa.concat_tables([unknown.cast(curve.schema), curve])
    settings = {**judged().settings, "method": "text", "keep": "column:stars"}
    page = render_page(judged(settings=settings, pairs=[], curve=curve, metrics={}))
    assert "by falling stars" in page
    assert "not sought" in page
    assert "No pair lies near" in page


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here")
def test_keys_move_the_threshold_and_dark_follows_the_system(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "report.html").write_text(render_page(judged()))
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        page.get((tmp_path / "report.html").as_uri())
        assert page.title == "Near-duplicates of x"
        assert page.find_element(By.ID, "told").text == "0.95: 10 removed, 10.0%"
        assert "kept: 7" in page.find_element(By.ID, "pairs").text
        page.find_element(By.ID, "threshold").send_keys(Keys.ARROW_LEFT)
        assert page.find_element(By.ID, "told").text == "0.9: 20 removed, 20.0%"
        assert HOSTILE in page.find_element(By.ID, "pairs").text
        assert page.find_element(By.CSS_SELECTOR, "#numbers tr.selected").text.startswith("0.9")
        light = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        dark = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert light != dark
        assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []
    finally:
        page.quit()
