"""A dry run tells what a night would do, and writes nothing."""

import pytest
from nights import text_of

from pipelines.embedding.estimate import Estimate
from pipelines.nightly import dry_run
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import list_files
from pipelines.runtime.run_record import read_run
from pipelines.store.config import EditConfig
from pipelines.store.edits import edit_store
from pipelines.store.store import Store

pytestmark = pytest.mark.usefixtures("no_model")
DOCUMENTS = 200


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """A sample that was measured: 10 tokens a document, 100 tokens a second of one actor."""

    def estimate(files, columns, description, actors, cut=None):
        return Estimate(len(files), DOCUMENTS, 10 * DOCUMENTS, 100.0, 5.0 + 20.0 / actors.largest)

    monkeypatch.setattr(dry_run, "estimate_run", estimate)


def contents(store):
    return {name: (store / name).read_bytes() for name in list_files(str(store))}


def test_changes_are_counted_and_their_embedding_estimated(tonight, store):
    before = contents(store)
    texts = {n: text_of(n) for n in range(5, DOCUMENTS + 3)} | {50: text_of(50, version=1)}
    result = tonight(texts, dry_run=True)
    assert contents(store) == before
    assert result.summary["changes"] == "3 new, 1 changed, 5 deleted, 194 unchanged"
    assert result.summary["texts to embed"] == "4, and 0 known ones to reuse"
    assert result.summary["tokens"] == "about 40, prompts included"
    assert "100 tokens a second each" in result.summary["actors"]
    assert not result.refusals
    assert not [name for name in result.summary if name.startswith("check ")]
    result = tonight(texts)
    assert result.summary["texts embedded"] == "4, and 0 known ones reused"


def test_what_was_detected_and_passed_over_is_told_and_counted(tonight, store, tmp_path):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    labels = {n: f"label{text[:1]}" for n, text in texts.items()}
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.xlsx").write_text("x")
    (tmp_path / "corpus" / "b.jsonl").write_text('{"id": 900, "text": "a text"}\n')
    result = tonight(texts, labels, dry_run=True)
    assert result.summary["parquet"] == "1 files; columns id int64, text string, label string"
    assert result.summary["parquet, row 3"] == f"2: {texts[2]}"
    assert result.summary["jsonl, row 1"] == "900: a text"
    assert result.summary["passed over: unknown format"].startswith("1 files, such as ")
    assert [*result.summary][-1] == "dry run"
    (tmp_path / "corpus" / "b.jsonl").unlink()
    tonight(texts, labels)
    assert read_run(f"{store}/_work")["metrics"]["files_passed_over"] == 1


def test_another_encoder_and_vanished_documents_are_told_as_the_checks_will(tonight, store):
    before = contents(store)
    texts = {n: text_of(n) for n in range(0, DOCUMENTS, 4)}
    result = tonight(texts, dry_run=True, prompt="none", max_deleted=0.3, accept=("deleted",))
    assert "150 of 200" in result.summary["check 1"]
    assert "(accepted)" in result.summary["check 1"]
    assert result.summary["check 2"].startswith("encoder")
    assert result.summary["checks"].startswith("1 of those")  # the other is accepted
    assert result.summary["texts to embed"].startswith("50,")
    assert contents(store) == before
    assert Store.open(str(store)).version().number == 1


def test_a_first_night_needs_no_store(tonight, store, tmp_path):
    new = tmp_path / "new"
    result = tonight({n: text_of(n) for n in range(9)}, dry_run=True, store=str(new))
    assert result.summary["version before"] == "none"
    assert result.summary["texts to embed"].startswith("9,")
    assert not new.exists()


def test_a_folder_that_is_no_store_is_refused(tonight, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("mine")
    with pytest.raises(InputError, match="is no store"):
        tonight({0: text_of(0)}, dry_run=True, store=str(tmp_path / "other"))


def test_edits_that_the_night_would_apply_are_told(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    assert "edits" not in tonight(texts, dry_run=True).summary
    for number in range(2):
        edit_store(EditConfig(store=str(store), name=(number, f"Name {number}")))
    before = contents(store)
    assert tonight(texts, dry_run=True).summary["edits"].startswith("2 by people")
    assert contents(store) == before
    tonight(texts)
    assert "edits" not in tonight(texts, dry_run=True).summary
