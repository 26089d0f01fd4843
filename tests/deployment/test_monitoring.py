"""Metrics, their documentation and the dashboard name the same things."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())
METRIC = re.compile(r'\b(Counter|Gauge|Histogram)\(\s*"(\w+)",\s*"([^"]+)"')


def served() -> dict[str, str]:
    """Name as Prometheus sees it, and description, of every metric in the sources."""
    found = {}
    for package in ("pipelines", "cluster", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            for kind, name, description in METRIC.findall(path.read_text()):
                found[f"ray_{name}" + ("_total" if kind == "Counter" else "")] = description
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_metric_is_documented_with_its_unit():
    rows = dict(re.findall(r"^\| `(ray_shoal_\w+)` \| [^|]+ \| ([^|]+) \|", PAGE, re.M))
    assert rows.keys() == served().keys()
    assert all(unit.strip() for unit in rows.values())


def test_every_metric_has_a_name_of_ours_and_a_description():
    assert len(served()) >= 10
    for name, description in served().items():
        assert name.startswith("ray_shoal_")
        assert len(description) > 10, name


def test_the_dashboard_shows_every_metric_and_no_other():
    shown = set(re.findall(r"ray_shoal_\w+", " ".join(expressions())))
    assert shown == served().keys()


def test_alarms_and_page_name_metrics_that_exist():
    assert set(re.findall(r"ray_shoal_\w+", PAGE)) == served().keys()


def test_the_dashboards_panels_do_not_overlap():
    places = [tuple(panel["gridPos"][k] for k in ("x", "y")) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    assert all(panel["title"] and panel["description"] for panel in DASHBOARD["panels"])
