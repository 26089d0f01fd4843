"""Killed nights, nights at the same time, S3, and thirty random nights against a model of them."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_ray import run_inline
from nights import (
    WORKERS,
    check_rows,
    config_for,
    lineage_of,
    night,
    rows_of,
    text_of,
    write_corpus,
)

from pipelines.embedding import job as embed
from pipelines.nightly.night import STEPS
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_model")]

DRIVER = Path(__file__).parents[1] / "night_driver.py"
FIRST = {n: text_of(n) for n in range(150)}
SECOND = {n: text_of(n) for n in range(3, 155)} | {40: text_of(40, version=1)}
PUBLISH = STEPS.index("publish") + 1


def start(config, step: int = 0) -> subprocess.Popen:
    command = [sys.executable, str(DRIVER), json.dumps(asdict(config)), str(step)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model_folder):
    """A store after a first night, and one made from scratch of the second night's corpus."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "WORKERS", WORKERS)
        run_inline(patch)
        night(write_corpus(folder / "one", FIRST), folder / "store", tiny_model_folder)
        night(write_corpus(folder / "two", SECOND), folder / "scratch", tiny_model_folder)
    return folder


def content(rows: dict) -> dict:
    """What two builds of one corpus must have in common."""
    return {
        row_id: (row["text"], row["text_sha256"], row["embedding"].tobytes())
        for row_id, row in rows.items()
    }


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_a_night_killed_at_any_step_leaves_the_old_version_and_the_next_one_ends_right(
    first, tmp_path, tiny_model_folder, step
):
    shutil.copytree(first / "store", tmp_path / "store")
    corpus = write_corpus(tmp_path / "corpus", SECOND)
    config = config_for(corpus, tmp_path / "store", tiny_model_folder)
    code, _, error = finish(start(config, step))
    assert code == -9, error
    seen = SECOND if step > PUBLISH else FIRST
    assert Store.open(str(tmp_path / "store")).version().number == (2 if step > PUBLISH else 1)
    check_rows(tmp_path / "store", seen)
    result = night(corpus, tmp_path / "store", tiny_model_folder)
    assert not result.refusals
    store = Store.open(str(tmp_path / "store"))
    rows = check_rows(tmp_path / "store", SECOND)
    assert content(rows) == content(rows_of(first / "scratch"))
    assert verify_store(store) == []
    assert [path.name for path in (tmp_path / "store" / "_work").iterdir()] == ["run.json"]
    before = rows_of(tmp_path / "store", 1)
    assert all(rows[n]["cluster_id"] == before[n]["cluster_id"] for n in range(3, 150) if n != 40)


def test_of_two_nights_at_once_one_ends_with_a_line_and_code_75(first, tmp_path, tiny_model_folder):
    shutil.copytree(first / "store", tmp_path / "store")
    corpus = write_corpus(tmp_path / "corpus", SECOND)
    config = config_for(corpus, tmp_path / "store", tiny_model_folder)
    with Store.open(str(tmp_path / "store")).take_lease("nightly_reindex"):
        code, _, error = finish(start(config))
    assert code == 75
    assert [line for line in error.splitlines() if line.startswith("error:")]
    both = [start(config), start(config)]
    codes = sorted(finish(process)[0] for process in both)
    assert codes in ([0, 0], [0, 75])
    check_rows(tmp_path / "store", SECOND)
    assert verify_store(Store.open(str(tmp_path / "store"))) == []


def test_after_a_rollback_the_next_night_starts_from_there(first, tmp_path, tiny_model_folder):
    shutil.copytree(first / "store", tmp_path / "store")
    corpus = write_corpus(tmp_path / "corpus", SECOND)
    night(corpus, tmp_path / "store", tiny_model_folder)
    store = Store.open(str(tmp_path / "store"))
    with store.take_lease("test") as lease:
        store.rollback(lease)
    check_rows(tmp_path / "store", FIRST)
    third = SECOND | {500: text_of(500)}
    result = night(write_corpus(tmp_path / "corpus", third), tmp_path / "store", tiny_model_folder)
    assert not result.refusals
    rows = check_rows(tmp_path / "store", third)
    version = Store.open(str(tmp_path / "store")).version()
    assert (version.number, version.record.base) == (3, 1)
    # what the version that was rolled back had embedded is not embedded again
    assert json.loads(version.read("run.json"))["counts"]["embedded"] == 1
    assert rows[500]["first_seen"] == rows[500]["last_changed"]


def test_nights_on_s3(s3_server, tmp_path, tiny_model_folder):
    s3_server.create_bucket(Bucket="nights")
    corpus = write_corpus(tmp_path / "corpus", FIRST)
    config = config_for(corpus, "s3://nights/store", tiny_model_folder)
    assert not night(corpus, "s3://nights/store", tiny_model_folder).refusals
    check_rows("s3://nights/store", FIRST)
    write_corpus(tmp_path / "corpus", SECOND)
    for step in (4, 7, PUBLISH):
        assert finish(start(config, step))[0] == -9
        check_rows("s3://nights/store", FIRST)
    assert not night(corpus, "s3://nights/store", tiny_model_folder).refusals
    check_rows("s3://nights/store", SECOND)
    assert verify_store(Store.open("s3://nights/store")) == []


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(("insert", "change", "delete", "move", "relabel")),
        st.integers(0, 10_000),
    ),
    max_size=12,
)


@settings(
    max_examples=2,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(CHANGES, min_size=30, max_size=30))
def test_thirty_nights_of_random_changes_follow_a_model(tmp_path_factory, tiny_model_folder, plan):
    folder = tmp_path_factory.mktemp("nights")
    texts = {n: text_of(n) for n in range(60)}
    labels = {n: f"label{n % 3}" for n in texts}
    seen: dict[int, tuple] = {}
    ended: set[int] = set()
    for changes in plan:
        _apply(changes, texts, labels)
        corpus = write_corpus(folder / "corpus", texts, labels)
        result = night(
            corpus, folder / "store", tiny_model_folder, keep_columns=("label",),
            max_deleted=1.0, max_drift=1.0, max_score_drop=2.0,
        )  # fmt: skip
        assert not result.refusals
        rows = check_rows(folder / "store", texts)
        for row_id, row in rows.items():
            assert row["label"] == labels[row_id]
            before = seen.get(row_id)
            if before is None:
                assert row["first_seen"] == row["last_changed"]
            else:
                assert row["first_seen"] == before[1]
                assert (row["last_changed"] == before[2]) == (row["text"] == before[0])
        seen = {n: (r["text"], r["first_seen"], r["last_changed"]) for n, r in rows.items()}
        there = {row["cluster_id"] for row in rows.values()}
        assert not there & ended
        ended = {
            e["cluster_id"]
            for e in lineage_of(folder / "store")
            if e["event"] in ("died", "merged")
        }
    assert verify_store(Store.open(str(folder / "store"))) == []


def _apply(changes, texts: dict, labels: dict) -> None:
    for kind, number in changes:
        ids = list(texts)
        chosen = ids[number % len(ids)]
        free = max(ids) + 1
        if kind == "insert":
            texts[free], labels[free] = text_of(free, version=number), "new"
        elif kind == "change":
            texts[chosen] = text_of(chosen, version=number + 1)
        elif kind == "relabel":
            labels[chosen] = f"other{number}"
        elif len(ids) > 20:
            text, label = texts.pop(chosen), labels.pop(chosen)
            if kind == "move":
                texts[free], labels[free] = text, label
