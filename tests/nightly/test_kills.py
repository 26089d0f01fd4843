"""Backfills, edits and comparisons killed at every step, on disk and on S3; editors at once."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from inline_ray import run_inline
from nights import WORKERS, check_rows, config_for, night, rows_of, text_of, write_corpus

from pipelines.embedding import job as embed
from pipelines.nightly.night import STEPS
from pipelines.runtime.files import list_files, read_bytes
from pipelines.store.backfill import open_backfills
from pipelines.store.edits import read_edits
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_model")]

TESTS = Path(__file__).parents[1]
FIRST = {n: text_of(n) for n in range(150)}
SECOND = {n: text_of(n) for n in range(3, 155)} | {40: text_of(40, version=1)}
THIRD = SECOND | {41: text_of(41, version=2), 300: text_of(300)}
PART = {"max_embed_hours": 1e-9, "chunk_tokens": 9600}
NEW = {"prompt": "none", "accept": ("encoder", "drift"), "chunk_tokens": 9600}
PUBLISH = STEPS.index("publish") + 1


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model_folder):
    """A store after a first night, and one of the new encoder made from scratch."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "WORKERS", WORKERS)
        run_inline(patch)
        night(write_corpus(folder / "one", FIRST), folder / "store", tiny_model_folder)
        corpus = write_corpus(folder / "three", THIRD)
        night(corpus, folder / "scratch", tiny_model_folder, prompt="none")
    return folder


def run(script, *arguments) -> tuple[int, str, str]:
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout, done.stderr


def killed_night(config, step: int) -> None:
    code, _, error = run("night_driver.py", json.dumps(asdict(config)), step)
    assert code == -9, error


def backfill_through_kills(corpus_folder, store, model, first, step: int) -> None:
    """A backfill of which one night is killed at ``step``, between nights of the old encoder."""
    corpus = write_corpus(corpus_folder, SECOND)
    assert "unfinished" in night(corpus, store, model, **{**NEW, **PART}).summary
    partial = PART if step <= 3 else {}
    killed_night(config_for(corpus, store, model, **{**NEW, **partial}), step)
    published = Store.open(str(store)).version()
    assert (published.number == 2) == (step > PUBLISH)
    check_rows(store, SECOND if step > PUBLISH else FIRST)
    corpus = write_corpus(corpus_folder, THIRD)
    if step <= PUBLISH:
        night(corpus, store, model)  # with the old encoder
        check_rows(store, THIRD)
    for _ in range(20):
        result = night(corpus, store, model, **{**NEW, **PART})
        if "unfinished" not in result.summary:
            break
    assert not result.refusals
    rows, scratch = check_rows(store, THIRD), rows_of(first / "scratch")
    assert {n: row["embedding"].tobytes() for n, row in rows.items()} == {
        n: row["embedding"].tobytes() for n, row in scratch.items()
    }
    opened = Store.open(str(store))
    assert verify_store(opened) == []
    assert opened.version().record.fingerprint != opened.version(1).record.fingerprint
    assert not open_backfills(opened)
    assert list_files(f"{store}/_work") == ["run.json"]


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_a_backfill_killed_at_any_step_ends_right(first, tmp_path, tiny_model_folder, step):
    shutil.copytree(first / "store", tmp_path / "store")
    backfill_through_kills(tmp_path / "corpus", tmp_path / "store", tiny_model_folder, first, step)


def test_a_backfill_killed_on_s3_ends_right(first, s3_server, tmp_path, tiny_model_folder):
    s3_server.create_bucket(Bucket="backfills")
    one = write_corpus(tmp_path / "one", FIRST)
    for step in (3, 4, 8, PUBLISH):
        store = f"s3://backfills/store-{step}"
        assert not night(one, store, tiny_model_folder).refusals
        backfill_through_kills(tmp_path / "corpus", store, tiny_model_folder, first, step)


def killed_everywhere(arguments, check) -> None:
    """Run a verb again and again, killed one file later each time, until it ends; check each."""
    for number in range(1, 200):
        code, _, error = run("manage_driver.py", number, *arguments)
        check(code)
        if code == 0:
            return
        assert code == -9, error
    raise AssertionError("it never ends")


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_an_edit_that_is_killed_is_there_whole_or_not_at_all(
    first, request, tmp_path, tiny_model_folder, place
):
    store = str(tmp_path / "store")
    if place == "s3":
        request.getfixturevalue("s3_server").create_bucket(Bucket="edits")
        store = "s3://edits/store"
    corpus = write_corpus(tmp_path / "corpus", FIRST)
    night(corpus, store, tiny_model_folder)
    seen = 0

    def check(code):
        nonlocal seen
        edits = read_edits(store)
        assert [edit.number for edit in edits] == list(range(1, len(edits) + 1))
        assert len(edits) >= seen + (code == 0)
        seen = len(edits)
        assert all(edit.text == "a remark" for edit in edits)

    killed_everywhere(["edit", "--store", store, "--note", "a remark"], check)
    assert not night(corpus, store, tiny_model_folder).refusals
    assert verify_store(Store.open(store)) == []


def test_a_comparison_that_is_killed_leaves_a_whole_page_or_none(
    first, tmp_path, tiny_model_folder
):
    shutil.copytree(first / "store", tmp_path / "store")
    store = str(tmp_path / "store")
    night(write_corpus(tmp_path / "corpus", SECOND), store, tiny_model_folder)
    page = tmp_path / "page.html"
    before = {n: read_bytes(f"{store}/{n}") for n in list_files(store)}

    def check(code):
        assert page.exists() == (code == 0)
        assert {n: read_bytes(f"{store}/{n}") for n in list_files(store)} == before

    arguments = ["compare", "--store", store, "--version", "2", "--with", "1"]
    killed_everywhere([*arguments, "--output", str(page)], check)
    assert page.read_text().endswith("</html>\n")


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_people_who_edit_at_once_lose_nothing(first, request, tmp_path, tiny_model_folder, place):
    store = str(tmp_path / "store")
    if place == "s3":
        request.getfixturevalue("s3_server").create_bucket(Bucket="people")
        store = "s3://people/store"
    night(write_corpus(tmp_path / "corpus", FIRST), store, tiny_model_folder)
    clusters = sorted({row["cluster_id"] for row in rows_of(store).values()})
    command = [sys.executable, str(TESTS / "manage_driver.py"), "0", "edit", "--store", store]
    editors = [
        subprocess.Popen([*command, "--name", str(cluster), f"Name {cluster}", "--who", who])
        for cluster in clusters[:3]
        for who in ("ann", "bob")
    ]
    codes = [editor.wait(timeout=240) for editor in editors]
    assert sorted(codes) == [0, 0, 0, 2, 2, 2]  # of two names for one cluster the later is refused
    edits = read_edits(store)
    assert [edit.number for edit in edits] == [1, 2, 3]
    assert {edit.clusters[0] for edit in edits} == set(clusters[:3])
