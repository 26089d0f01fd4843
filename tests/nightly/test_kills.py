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
from pipelines.runtime.files import exists, list_files, read_bytes, write_bytes
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
EMBED, PUBLISH = (STEPS.index(name) + 1 for name in ("embed what is new or changed", "publish"))


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


def killed_night(config, step: int | str) -> None:
    code, _, error = run("night_driver.py", json.dumps(asdict(config)), step)
    assert code == -9, error


def backfill_through_kills(corpus_folder, store, model, first, step: int, unit: int = 0) -> None:
    """A backfill of which one night is killed at ``step``, between nights of the old encoder.

    With ``unit`` it is killed in the middle of the step, at that unit of work.
    """
    corpus = write_corpus(corpus_folder, SECOND)
    assert "unfinished" in night(corpus, store, model, **{**NEW, **PART}).summary
    partial = PART if step <= 3 and not unit else {}
    config = config_for(corpus, store, model, **{**NEW, **partial})
    killed_night(config, f"{step}.{unit}" if unit else step)
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


@pytest.mark.parametrize("unit", [2, 4])
def test_a_backfill_killed_while_it_embeds_ends_right(first, tmp_path, tiny_model_folder, unit):
    store = tmp_path / "store"
    shutil.copytree(first / "store", store)
    backfill_through_kills(tmp_path / "corpus", store, tiny_model_folder, first, EMBED, unit)


@pytest.mark.parametrize("step", range(1, len(STEPS) + 1))
def test_a_backfill_killed_on_s3_ends_right(first, s3_server, tmp_path, tiny_model_folder, step):
    s3_server.create_bucket(Bucket="backfills")
    store = f"s3://backfills/store-{step}"
    copy_folder(first / "store", store)
    unit = 3 if step == EMBED else 0
    backfill_through_kills(tmp_path / "corpus", store, tiny_model_folder, first, step, unit)


def copy_folder(source: Path, target: str) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            write_bytes(f"{target}/{path.relative_to(source)}", path.read_bytes())


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
        assert all(edit.note == "a remark" for edit in edits)

    killed_everywhere(["edit", "--store", store, "--note", "a remark"], check)
    assert not night(corpus, store, tiny_model_folder).refusals
    assert verify_store(Store.open(store)) == []


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_comparison_that_is_killed_leaves_a_whole_page_or_none(
    first, request, tmp_path, tiny_model_folder, place
):
    root = str(tmp_path)
    shutil.copytree(first / "store", tmp_path / "store")
    if place == "s3":
        request.getfixturevalue("s3_server").create_bucket(Bucket="pages")
        root = "s3://pages"
        copy_folder(first / "store", f"{root}/store")
    store, page = f"{root}/store", f"{root}/page.html"
    night(write_corpus(tmp_path / "corpus", SECOND), store, tiny_model_folder)
    before = {n: read_bytes(f"{store}/{n}") for n in list_files(store)}

    def check(code):
        assert exists(page) == (code == 0)
        assert {n: read_bytes(f"{store}/{n}") for n in list_files(store)} == before

    arguments = ["compare", "--store", store, "--version", "2", "--with", "1"]
    killed_everywhere([*arguments, "--output", page], check)
    assert read_bytes(page).decode().endswith("</html>\n")


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
