"""Another encoder's vectors gather over several nights, while nights of the old one go on."""

import json

import pytest
from nights import check_rows, config_for, night, rows_of, text_of, write_corpus

from pipelines.nightly.notify import message_of
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import list_files
from pipelines.runtime.run_record import RunRecord, read_run
from pipelines.store.backfill import open_backfills, show_backfills
from pipelines.store.config import BackfillConfig, PublishConfig
from pipelines.store.manage import publish_version
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_model")
DOCUMENTS = 200
TEXTS = {n: text_of(n) for n in range(DOCUMENTS)}
A_CHUNK = {"max_embed_hours": 1e-9, "chunk_tokens": 9600}
NEW = {"prompt": "none", "accept": ("encoder", "drift")}


def work_of(store):
    return {name.split("/")[0] for name in list_files(f"{store}/_work")} - {"run.json"}


def backfill(tonight, texts, **settings):
    """Nights of a chunk each until the new encoder's version is whole; how many they were."""
    for number in range(1, 50):
        result = tonight(texts, **A_CHUNK, **NEW, **settings)
        if "unfinished" not in result.summary:
            assert not result.refusals
            return number
    raise AssertionError("it never ends")


def test_an_unfinished_night_leaves_the_published_version_and_says_how_far_it_is(tonight, store):
    before = rows_of(store)
    result = tonight(TEXTS, **A_CHUNK, **NEW)
    assert result.summary["published"] == "version 1, as before"
    (under_way,) = open_backfills(Store.open(str(store)))
    assert (under_way.nights, under_way.texts) == (1, DOCUMENTS)
    assert 0 < under_way.embedded < DOCUMENTS
    there = f"{under_way.embedded} of {DOCUMENTS} texts have a vector"
    assert result.summary["unfinished"].startswith(there)
    assert "more nights" in result.summary["next"]
    assert "until it is published" in result.summary["disk"]
    assert rows_of(store).keys() == before.keys()
    assert Store.open(str(store)).version().number == 1
    record = read_run(f"{store}/_work")
    assert record["metrics"]["published"] is False
    assert record["status"] == "complete"


def test_each_night_goes_on_where_the_last_one_ended(tonight, store):
    embedded = []
    for _ in range(3):
        tonight(TEXTS, **A_CHUNK, **NEW)
        (under_way,) = open_backfills(Store.open(str(store)))
        embedded.append(under_way.embedded)
    assert embedded[0] < embedded[1] < embedded[2]
    assert backfill(tonight, TEXTS) > 1
    check_rows(store, TEXTS, 2)
    assert not open_backfills(Store.open(str(store)))
    assert not work_of(store)
    assert verify_store(Store.open(str(store))) == []


def test_nights_of_the_old_encoder_go_on_and_what_they_change_is_right_at_publishing(
    tonight, store, tmp_path
):
    texts = dict(TEXTS)
    for step in range(3):
        assert "unfinished" in tonight(texts, **A_CHUNK, **NEW).summary
        if step == 1:
            assert "nothing changed" in tonight(texts).summary
        texts[step] = text_of(step, version=1)
        del texts[100 + step]
        texts[300 + step] = text_of(300 + step)
        texts[150 + step] = texts[10]
        assert not tonight(texts).refusals
        rows = check_rows(store, texts)
    old = Store.open(str(store)).version()
    assert old.number == 4
    assert len(open_backfills(Store.open(str(store)))) == 1
    texts[20] = text_of(20, version=2)
    backfill(tonight, texts)
    new = Store.open(str(store)).version()
    assert new.record.fingerprint != old.record.fingerprint
    after = check_rows(store, texts)
    assert all(after[n]["first_seen"] == rows[n]["first_seen"] for n in rows if n in after)
    corpus = write_corpus(tmp_path / "corpus", texts)
    model = json.loads(new.read("run.json"))["config"]["model"]
    night(corpus, tmp_path / "scratch", model, prompt="none")
    scratch = rows_of(tmp_path / "scratch")
    for row_id, row in after.items():
        assert (row["embedding"] == scratch[row_id]["embedding"]).all()
    assert not work_of(store)


def test_keys_of_files_survive_the_other_encoders_nights(tonight, store):
    tonight(TEXTS)
    tonight(TEXTS, **A_CHUNK, prompt="none")
    readings = {name.split("/")[0] for name in list_files(str(store / "keys"))}
    tonight(TEXTS)
    tonight(TEXTS, **A_CHUNK, prompt="none")
    assert {name.split("/")[0] for name in list_files(str(store / "keys"))} == readings
    assert len(readings) == 2


def test_texts_with_a_vector_are_not_embedded_again(tonight, store):
    texts, embedded = dict(TEXTS), 0
    while True:
        result = tonight(texts, **A_CHUNK, **NEW)
        counts = read_run(f"{store}/_work")["counts"]
        embedded = counts["reused"] + counts["embedded"]
        if "unfinished" not in result.summary:
            break
        texts[len(texts)] = text_of(len(texts))  # another corpus, so another folder each night
        tonight(texts)
    assert embedded == counts["documents"] == len(texts)
    assert counts["embedded"] < 60
    check_rows(store, texts)


def test_without_the_flag_the_rest_is_embedded_in_one_night(tonight, store):
    tonight(TEXTS, **A_CHUNK, **NEW)
    (under_way,) = open_backfills(Store.open(str(store)))
    assert not tonight(TEXTS, **NEW, chunk_tokens=9600).refusals
    assert read_run(f"{store}/_work")["counts"]["embedded"] >= DOCUMENTS - under_way.embedded
    check_rows(store, TEXTS, 2)
    assert not work_of(store)


def test_a_whole_backfill_that_is_not_accepted_waits_as_a_refused_version(tonight, store):
    result = None
    while result is None or "unfinished" in result.summary:
        result = tonight(TEXTS, **A_CHUNK, prompt="none")
    assert any("encoder" in reason for reason in result.refusals)
    assert Store.open(str(store)).version().number == 1
    tonight(TEXTS | {500: text_of(500)})
    texts = TEXTS | {500: text_of(500)}
    assert not tonight(texts, **A_CHUNK, **NEW).refusals
    counts = read_run(f"{store}/_work")["counts"]
    assert (counts["embedded"], counts["reused"]) == (1, DOCUMENTS)
    check_rows(store, texts)


def test_cancel_removes_its_vectors_and_nothing_else(tonight, store):
    tonight(TEXTS, **A_CHUNK, **NEW)
    tonight(TEXTS, **A_CHUNK, prompt="topic", accept=("encoder",))
    answer = show_backfills(BackfillConfig(str(store)))
    assert len(answer.rows) == 2
    assert all(entry["bytes"] > 0 for entry in answer.data)
    first, second = answer.data
    with pytest.raises(InputError, match="no backfill of an encoder"):
        show_backfills(BackfillConfig(str(store), cancel="none"))
    answer = show_backfills(BackfillConfig(str(store), cancel=first["fingerprint"][:8]))
    assert [entry["fingerprint"] for entry in answer.data] == [second["fingerprint"]]
    assert set(second["folders"]) < work_of(store)
    assert not set(first["folders"]) & work_of(store)
    check_rows(store, TEXTS)
    assert verify_store(Store.open(str(store))) == []


def test_after_a_cancel_the_next_night_begins_anew(tonight, store):
    tonight(TEXTS, **A_CHUNK, **NEW)
    (under_way,) = open_backfills(Store.open(str(store)))
    show_backfills(BackfillConfig(str(store), cancel=under_way.fingerprint))
    backfill(tonight, TEXTS)
    check_rows(store, TEXTS, 2)


def test_a_version_published_by_hand_ends_no_backfill_of_another(tonight, store):
    tonight(TEXTS, **A_CHUNK, **NEW)
    tonight(TEXTS | {300: text_of(300)})
    publish_version(PublishConfig(str(store), 1))
    assert len(open_backfills(Store.open(str(store)))) == 1
    backfill(tonight, TEXTS)
    check_rows(store, TEXTS)


def test_a_first_night_may_take_several(tmp_path, tiny_model_folder):
    corpus = write_corpus(tmp_path / "corpus", TEXTS)
    result = night(corpus, tmp_path / "store", tiny_model_folder, **A_CHUNK)
    assert result.summary["published"] == "no version yet"
    while "unfinished" in result.summary:
        result = night(corpus, tmp_path / "store", tiny_model_folder, **A_CHUNK)
    check_rows(tmp_path / "store", TEXTS)


def test_a_webhook_is_told_that_it_is_unfinished(tonight, store):
    result = tonight(TEXTS, **A_CHUNK, **NEW)
    record = RunRecord(str(store / "_work"), "nightly_reindex", {}, take_over=True)
    record.metrics.update({"version": 1, "published": False})
    message = message_of(str(store), record, result)
    assert (message["event"], message["published"]) == ("unfinished", False)


def test_a_limit_below_zero_is_refused(store):
    with pytest.raises(InputError, match="max_embed_hours is -1"):
        config_for("corpus", store, "model", max_embed_hours=-1)
