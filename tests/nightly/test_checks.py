"""Each check refuses on its own side of its limit, and lets itself be accepted."""

from dataclasses import replace

import pytest

from cluster.drift import Drift
from pipelines.nightly.checks import NightFigures, run_checks
from pipelines.nightly.config import NightConfig

SCORES = {"internal": {"silhouette": 0.5}, "labels": None, "num_clusters": 5, "imbalance": 1.2}
GOOD = NightFigures(
    counts={"deleted": 1, "rejected": 0, "documents": 100},
    documents_before=100,
    scores=SCORES,
    scores_before=SCORES,
    drift=Drift(0.01, 90, 0.02, []),
    encoder_before=None,
)
BAD = {
    "deleted": {"counts": {"deleted": 30, "rejected": 0, "documents": 100}},
    "rejected": {"counts": {"deleted": 0, "rejected": 11, "documents": 100}},
    "score": {"scores": {**SCORES, "internal": {"silhouette": 0.3}}},
    "drift": {"drift": Drift(0.31, 90, 0.0, [])},
    "imbalance": {"scores": {**SCORES, "imbalance": 4.5}},
    "encoder": {"encoder_before": "0123456789abcdef"},
}


def refusing(figures, **settings):
    return {check.name for check in run_checks(NightConfig(**settings), figures) if check.refuses}


def test_a_quiet_night_passes():
    assert refusing(GOOD) == set()


@pytest.mark.parametrize("name", BAD)
def test_each_check_refuses_alone_says_why_and_can_be_accepted(name):
    figures = replace(GOOD, **BAD[name])
    assert refusing(figures) == {name}
    reason = next(c.reason for c in run_checks(NightConfig(), figures) if c.refuses)
    assert reason.startswith(f"{name}: ")
    assert f"--accept {name}" in reason
    assert refusing(figures, accept=(name,)) == set()


def test_centroids_that_move_count_as_drift():
    assert refusing(replace(GOOD, drift=Drift(None, 0, 0.4, []))) == {"drift"}
    assert refusing(replace(GOOD, drift=Drift(None, 0, 0.4, [])), max_drift=0.5) == set()


def test_labels_count_where_there_are_some():
    before = {**SCORES, "labels": {"v_measure": 0.9}}
    after = {**SCORES, "labels": {"v_measure": 0.7}}
    assert refusing(replace(GOOD, scores_before=before, scores=after)) == {"score"}


def test_the_first_night_has_nothing_to_be_compared_with():
    first = replace(GOOD, documents_before=0, scores_before=None, drift=None)
    assert refusing(first) == set()
    assert refusing(replace(first, **BAD["imbalance"])) == {"imbalance"}
