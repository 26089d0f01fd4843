"""A night costs what changed, keeps cluster ids, and publishes a whole or nothing."""

import json

import numpy as np
import pytest
from nights import (
    check_rows,
    config_for,
    lineage_of,
    night,
    rows_of,
    text_of,
    write_corpus,
)
from tiny_models import tiny_adapter

from pipelines.encoder import describe, precision, sources
from pipelines.nightly import changes
from pipelines.nightly import job as night_job
from pipelines.nightly.config import NightConfig
from pipelines.nightly.job import reindex
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import list_files
from pipelines.runtime.run_record import read_run
from pipelines.store.compare import Side, compare, compare_neighbours
from pipelines.store.index import find_words
from pipelines.store.lease import LeaseHeldError
from pipelines.store.store import Store

pytestmark = pytest.mark.usefixtures("no_model")
DOCUMENTS = 200


def counts_of(store):
    return read_run(f"{store}/_work")["counts"]


def test_the_first_night_publishes_every_document_with_its_cluster(first):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    rows = check_rows(first / "store", texts)
    topics = {(text[0], rows[n]["cluster_id"]) for n, text in texts.items()}
    assert len(topics) == 5
    assert rows[7]["label"] == "labelc"
    assert rows[7]["first_seen"] == rows[7]["last_changed"]
    assert {event["event"] for event in lineage_of(first / "store")} == {"born"}


def test_a_version_holds_all_that_made_it(first):
    version = Store.open(str(first / "store")).version()
    assert {
        "encoder.json", "centroids.parquet", "clusters.parquet", "lineage.parquet", "scores.json",
        "checks.json", "report.html", "run.json",
    } <= set(version.artifacts())  # fmt: skip
    run = json.loads(version.read("run.json"))
    assert (run["job"], run["status"]) == ("nightly_reindex", "complete")
    assert run["counts"]["documents"] == run["counts"]["embedded"] == DOCUMENTS
    assert json.loads(version.read("scores.json"))["labels"]["v_measure"] == pytest.approx(1.0)
    assert not list_files(str(first / "store" / "_work"))[1:]


def test_a_night_without_change_embeds_nothing_and_makes_no_version(tonight, store):
    result = tonight({n: text_of(n) for n in range(DOCUMENTS)})
    assert "nothing changed" in result.summary
    assert counts_of(store)["embedded"] == 0
    assert counts_of(store)["unchanged"] == DOCUMENTS
    assert [v.number for v in Store.open(str(store)).versions()] == [1]


def test_only_what_is_new_or_changed_is_embedded(tonight, store):
    before = rows_of(store)
    texts = {n: text_of(n) for n in range(5, DOCUMENTS + 3)}
    texts[50] = text_of(50, version=1)
    assert not tonight(texts).refusals
    found = {k: v for k, v in counts_of(store).items() if v}
    assert found == {
        "documents": 198, "new": 3, "changed": 1, "deleted": 5, "unchanged": 194,
        "embedded": 4, "written": 4, "tokens": found["tokens"], "clusters": 5,
    }  # fmt: skip
    rows = check_rows(store, texts)
    assert rows[50]["first_seen"] == before[50]["first_seen"] < rows[50]["last_changed"]
    assert rows[60]["last_changed"] == before[60]["last_changed"]
    assert rows[DOCUMENTS]["first_seen"] > before[60]["first_seen"]
    untouched = [n for n in range(5, DOCUMENTS) if n != 50]
    assert all(rows[n]["cluster_id"] == before[n]["cluster_id"] for n in untouched)


def test_known_texts_under_new_ids_are_not_embedded(tonight, store):
    texts = {n + 1000: text_of(n) for n in range(20)} | {n: text_of(n) for n in range(20, 200)}
    tonight(texts)
    assert (counts_of(store)["embedded"], counts_of(store)["reused"]) == (0, 20)
    assert (counts_of(store)["new"], counts_of(store)["deleted"]) == (20, 20)
    check_rows(store, texts)


def test_a_changed_label_is_stored_without_embedding(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    labels = {n: f"label{text[:1]}" for n, text in texts.items()} | {3: "other"}
    tonight(texts, labels)
    assert (counts_of(store)["retouched"], counts_of(store)["embedded"]) == (1, 0)
    rows = check_rows(store, texts)
    assert (rows[3]["label"], rows[4]["label"]) == ("other", "labele")


def test_another_set_of_kept_columns_rewrites_documents_with_their_vectors(store, tmp_path):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    before = rows_of(store)
    result = night(write_corpus(tmp_path / "corpus", texts), store, _model(store), keep_columns=())
    assert not result.refusals
    assert (counts_of(store)["embedded"], counts_of(store)["reused"]) == (0, DOCUMENTS)
    rows = check_rows(store, texts)
    assert "label" not in rows[0]
    assert rows[0]["first_seen"] == before[0]["first_seen"]


def _model(store):
    return json.loads(Store.open(str(store)).version().read("run.json"))["config"]["model"]


def test_too_many_deletions_are_refused_and_the_candidate_kept(tonight, store):
    texts = {n: text_of(n) for n in range(0, DOCUMENTS, 2)}
    result = tonight(texts, max_deleted=0.3)
    assert "deleted: 100 of 200" in result.refusals[0]
    assert Store.open(str(store)).version().number == 1
    assert len(rows_of(store)) == DOCUMENTS
    assert check_rows(store, texts, number=2)
    assert Store.open(str(store)).version(2).record.reasons == tuple(result.refusals)
    assert not tonight(texts, max_deleted=0.3, accept=("deleted",)).refusals
    check_rows(store, texts)


def test_drift_is_measured_and_refused(tonight, store):
    texts = {n: text_of(n, "abcde"[(n * 7 + n // 5) % 5], 1) for n in range(DOCUMENTS)}
    texts |= {n: text_of(n, "xyzuv"[n % 5], 1) for n in range(150)}
    result = tonight(texts, max_drift=0.05)
    assert any(reason.startswith("drift") for reason in result.refusals)


def test_another_encoder_embeds_everything_anew_and_waits_for_a_person(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    result = tonight(texts, prompt="none")
    assert len(result.refusals) == 1
    assert result.refusals[0].startswith("encoder")
    assert counts_of(store)["embedded"] == DOCUMENTS
    old, new = Store.open(str(store)).versions()
    assert old.record.fingerprint != new.record.fingerprint
    result = tonight(texts, prompt="none", accept=("encoder",))
    assert not result.refusals
    assert (counts_of(store)["embedded"], counts_of(store)["reused"]) == (0, DOCUMENTS)
    assert Store.open(str(store)).version().record.fingerprint == new.record.fingerprint
    assert rows_of(store)[0]["cluster_id"] == rows_of(store, 1)[0]["cluster_id"]


def test_auto_is_the_stores_precision_on_whatever_machine(tonight, store, monkeypatch):
    monkeypatch.setattr(precision, "cpu_prefers_bfloat16", lambda: True)
    texts = {n: text_of(n) for n in range(DOCUMENTS + 1)}
    assert not tonight(texts, dtype="auto").refusals
    assert counts_of(store)["embedded"] == 1
    assert json.loads(Store.open(str(store)).version().read("encoder.json"))["dtype"] == "float32"


def test_a_store_of_vectors_without_an_adapter_gets_more_of_them(
    tonight, store, tiny_model_folder, tmp_path, monkeypatch, caplog
):
    adapter = tiny_adapter(tmp_path / "packaged", tiny_model_folder)
    monkeypatch.setattr(sources, "_PACKAGED_ADAPTER_FOLDER", adapter)
    for module in (describe, night_job):
        monkeypatch.setattr(module, "PACKAGED_MODEL", str(tiny_model_folder))
    texts = {n: text_of(n) for n in range(DOCUMENTS + 1)}
    with caplog.at_level("INFO"):
        assert not tonight(texts).refusals
    assert counts_of(store)["embedded"] == 1
    assert "--adapter packaged embeds every document anew" in caplog.text
    assert tonight(texts, adapter="packaged").refusals[0].startswith("encoder")


def test_more_clusters_split_those_there_are(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    texts |= {n: text_of(n, "q") for n in range(DOCUMENTS, DOCUMENTS + 40)}
    assert not tonight(texts, num_clusters="6").refusals
    events = [e for e in lineage_of(store) if e["version"] == 2]
    assert [(e["event"], e["cluster_id"]) for e in events] == [("born", 5)]
    rows = check_rows(store, texts)
    assert {rows[n]["cluster_id"] for n in range(DOCUMENTS, DOCUMENTS + 40)} == {5}
    report = Store.open(str(store)).version().read("report.html").decode()
    assert "Since version 1" in report
    assert "Appeared" in report


def test_ids_are_never_reused_even_after_a_rollback(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    more = texts | {n: text_of(n, "q") for n in range(200, 240)}
    assert not tonight(more, num_clusters="6").refusals
    opened = Store.open(str(store))
    with opened.take_lease("test") as lease:
        assert opened.rollback(lease).number == 1
    more = texts | {n: text_of(n, "r") for n in range(300, 340)}
    assert not tonight(more, num_clusters="6").refusals
    rows = check_rows(store, more)
    assert {rows[n]["cluster_id"] for n in range(300, 340)} == {6}


def test_a_held_lease_ends_a_second_run(tonight, store):
    with Store.open(str(store)).take_lease("other"), pytest.raises(LeaseHeldError) as held:
        tonight({n: text_of(n) for n in range(DOCUMENTS)})
    assert held.value.exit_code == 75


def test_vectors_of_an_interrupted_night_are_used_though_the_corpus_changed(
    tonight, store, monkeypatch
):
    texts = {n: text_of(n) for n in range(20, DOCUMENTS + 40)}
    with monkeypatch.context() as patch:
        patch.setattr(changes, "write_result", _stop)
        with pytest.raises(KeyboardInterrupt):
            tonight(texts)
    assert read_run(f"{store}/_work")["status"] == "failed"
    texts[500] = text_of(500)
    tonight(texts)
    assert (counts_of(store)["embedded"], counts_of(store)["reused"]) == (1, 40)
    check_rows(store, texts)
    assert list_files(f"{store}/_work") == ["run.json"]


def _stop(*_):
    raise KeyboardInterrupt


def test_documents_that_come_without_ids_are_known_by_their_text(tmp_path, tiny_model_folder):
    corpus = tmp_path / "docs.txt"
    lines = [text_of(n) for n in range(60)]
    corpus.write_text("\n".join([*lines, lines[0]]) + "\n")
    night(str(corpus), tmp_path / "store", tiny_model_folder)
    assert counts_of(tmp_path / "store")["repeats"] == 1
    corpus.write_text("\n".join([*lines[5:], text_of(99), lines[9]]) + "\n")
    night(str(corpus), tmp_path / "store", tiny_model_folder)
    found = counts_of(tmp_path / "store")
    assert (found["new"], found["deleted"], found["embedded"]) == (1, 5, 1)
    assert (found["unchanged"], found["repeats"]) == (55, 1)
    assert {row["text"] for row in rows_of(tmp_path / "store").values()} == {
        *lines[5:], text_of(99),
    }  # fmt: skip


def test_a_document_whose_text_became_empty_leaves_the_store(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    tonight(texts | {7: ""})
    assert (counts_of(store)["rejected"], counts_of(store)["deleted"]) == (1, 1)
    version = Store.open(str(store)).version()
    assert any(name.startswith("rejected/") for name in version.artifacts())
    assert 7 not in rows_of(store)


def test_a_text_column_of_another_name_is_called_text_in_the_store(tmp_path, tiny_model_folder):
    lines = [json.dumps({"key": f"k{n}", "body": text_of(n), "year": n}) for n in range(60)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    settings = {"text_column": "body", "id_column": "key", "keep_columns": ("year",)}
    for _ in range(2):
        night(
            str(tmp_path / "docs.jsonl"), tmp_path / "store", tiny_model_folder, **settings,
            float16=True,
        )  # fmt: skip
    assert counts_of(tmp_path / "store")["unchanged"] == 60
    row = rows_of(tmp_path / "store")["k7"]
    assert (row["text"], row["year"]) == (text_of(7), 7)
    schema = Store.open(str(tmp_path / "store")).version().schema
    assert str(schema.field("embedding").type) == "fixed_size_list<item: halffloat>[64]"


def test_options_that_cannot_be_are_refused():
    for settings in (
        {"max_deleted": 1.5},
        {"max_score_drop": -1},
        {"num_clusters": "10,20"},
        {"keep_columns": ("cluster_id",)},
        {"text_column": "body", "keep_columns": ("text",)},
        {"accept": ("nonsense",)},
        {"store": ""},
    ):
        with pytest.raises(InputError):
            NightConfig(**settings)


def test_ids_of_untouched_documents_stay_when_one_percent_changes(tmp_path, tiny_model_folder):
    random = np.random.default_rng(0)
    texts = {n: text_of(n) for n in range(1000)}
    corpus = write_corpus(tmp_path / "corpus", texts)
    settings = config_for(corpus, tmp_path / "store", tiny_model_folder, num_clusters="12")
    reindex(settings)
    before = rows_of(tmp_path / "store")
    touched = random.choice(1000, 10, replace=False).tolist()
    for n in touched:
        texts[n] = text_of(n, version=1)
    write_corpus(tmp_path / "corpus", texts)
    assert not reindex(settings).refusals
    rows = check_rows(tmp_path / "store", texts)
    same = [rows[n]["cluster_id"] == before[n]["cluster_id"] for n in texts if n not in touched]
    assert np.mean(same) >= 0.99


def test_a_kept_column_with_a_dot_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match=r"'meta\.lang'"):
        NightConfig(keep_columns=("meta.lang",))


def test_an_index_of_words_is_made_when_asked_for_and_then_kept(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    assert not tonight(texts, full_text=True).refusals
    version = Store.open(str(store)).version()
    assert version.number == 2
    assert set(find_words(version.documents, "topica", 500)) == set(range(0, DOCUMENTS, 5))
    assert not tonight(texts | {500: text_of(500)}).refusals
    version = Store.open(str(store)).version()
    assert 500 in find_words(version.documents, "topica", 500)
    texts |= {500: text_of(500), 501: text_of(501, "b")}
    assert not tonight(texts, prompt="none", accept=("encoder",)).refusals  # all are written anew
    version = Store.open(str(store)).version()
    assert set(find_words(version.documents, "topica", 500)) == {*range(0, DOCUMENTS, 5), 500}


def test_a_refused_encoder_shows_what_it_would_change(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    result = tonight(texts, prompt="none")
    assert result.summary["same 10 nearest"].endswith("(200 documents)")
    version = Store.open(str(store)).version(2)
    near = json.loads(version.read("run.json"))["metrics"]["neighbours"]
    assert near == compare_neighbours(
        Store.open(str(store)).version(1).documents, version.documents, sample=200, seed=0
    )
    report = version.read("report.html").decode()
    assert "From cluster to cluster" in report
    assert "are the same under the two encoders" in " ".join(report.split())


def test_every_candidate_is_compared_with_the_version_before_in_its_report(tonight, store):
    texts = {n: text_of(n) for n in range(5, DOCUMENTS)} | {50: text_of(50, topic="e", version=1)}
    assert not tonight(texts).refusals
    version = Store.open(str(store)).version()
    compared = json.loads(version.read("compare.json"))
    assert (compared["old"]["version"], compared["new"]["version"]) == (1, 2)
    assert compared["documents"] == {"both": DOCUMENTS - 5, "only_old": 5, "only_new": 0}
    assert compared["moved"]["reasons"] == {"edit": 0, "text": 1, "encoder": 0, "centroid": 0}
    assert compared["moved"]["first"]["text"][0]["id"] == 50
    assert compared["neighbours"]["overlap"] is None  # one encoder: vectors are as they were
    assert compared["new"]["recall_at_10"] == 1.0
    report = version.read("report.html").decode()
    assert "Compared with version 1" in report
    assert "Moved by another text" in report
    sides = Side.of(Store.open(str(store)).version(1)), Side.of(version)
    by_hand = compare(*sides, sample=0, seed=0)
    assert {**by_hand, "new": compared["new"]} == compared


def test_a_refused_encoder_change_shows_what_it_would_change(tonight, store):
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    assert tonight(texts, prompt="none").refusals
    version = Store.open(str(store)).version(2)
    compared = json.loads(version.read("compare.json"))
    assert not compared["same_encoder"]
    assert compared["neighbours"]["documents"] == DOCUMENTS
    assert any(reason.startswith("encoder") for reason in compared["new"]["reasons"])
    assert "same 10 nearest" in version.read("report.html").decode()
