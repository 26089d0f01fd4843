"""Nights that leave clusters as they are: who joins, who fits nowhere, and who is told."""

import http.server
import json
import re
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import centroids_of, check_rows, night, rows_of, text_of, write_corpus

from pipelines.nightly import clusters
from pipelines.nightly.clusters import cluster_config
from pipelines.nightly.config import NightConfig
from pipelines.nightly.notify import notify
from pipelines.runtime.errors import InputError
from pipelines.store.config import EditConfig
from pipelines.store.edits import edit_store
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_model")
DOCUMENTS = 200
NOVEL = {"novel_documents": 10, "novel_similarity": 0.6, "max_score_drop": 1.0}


@pytest.fixture
def assigned(tonight):
    """Runs a night that does not fit anew."""

    def run(texts, **settings):
        return tonight(texts, **{"clusters": "assign", **NOVEL, **settings})

    return run


def texts_of(extra=0, topic="q"):
    """The corpus and further documents of a topic that it does not have."""
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    return texts | {1000 + n: text_of(n, topic) for n in range(extra)}


def novel_of(store, number=None):
    version = Store.open(str(store)).version(number)
    return pq.read_table(pa.BufferReader(version.read("novel.parquet"))).to_pylist()


def test_old_documents_and_centroids_stay_where_they_are(assigned, store):
    before, centroids = rows_of(store), centroids_of(store)
    texts = texts_of()
    texts |= {3: text_of(3, version=1), 500: text_of(500)}
    del texts[7]
    assert not assigned(texts).refusals
    after = check_rows(store, texts)
    for row_id in texts.keys() - {3, 500}:
        assert after[row_id]["cluster_id"] == before[row_id]["cluster_id"]
        assert after[row_id]["distance"] == before[row_id]["distance"]
    assert after[500]["cluster_id"] == before[0]["cluster_id"]
    for cluster, centroid in centroids_of(store).items():
        assert (centroid == centroids[cluster]).all()
    assert novel_of(store) == []
    assert verify_store(Store.open(str(store))) == []


def test_a_report_says_when_clusters_that_were_left_alone_were_fitted(assigned, tonight, store):
    fitted = Store.open(str(store)).version().record.details["fitted_at"].replace("T", " ")
    assert not assigned(texts_of(extra=1)).refusals
    page = Store.open(str(store)).version().read("report.html").decode()
    said = "fitted on vectors of an earlier time, and left as they were; every document"
    assert said in page
    assert re.search(rf"clusters fitted at\W.{{0,40}}{re.escape(fitted)}", page, re.DOTALL)
    assert not tonight(texts_of(extra=2), max_drift=1.0).refusals
    page = Store.open(str(store)).version().read("report.html").decode()
    assert "fitted on all 202 vectors" in page
    assert "clusters fitted at" not in page


def test_documents_that_fit_nowhere_are_novel_and_few_are_published(assigned, store):
    result = assigned(texts_of(extra=4))
    assert not result.refusals
    assert [row["id"] for row in novel_of(store)] == [1000, 1001, 1002, 1003]
    assert {row["group"] for row in novel_of(store)} == {None}
    assert "4 documents fit nowhere" in result.summary["novel"]
    rows = rows_of(store)
    assert all(row["cluster_id"] == rows[row["id"]]["cluster_id"] for row in novel_of(store))


def test_many_that_are_alike_are_proposed_and_made_a_cluster_when_accepted(assigned, store):
    before = rows_of(store)
    result = assigned(texts_of(extra=30))
    assert [reason.partition(":")[0] for reason in result.refusals] == ["novel"]
    assert "1 new clusters, of 30" in result.refusals[0]
    assert {row["group"] for row in novel_of(store, 2)} == {0}
    assert len(centroids_of(store, 2)) == 5
    assert not assigned(texts_of(extra=30), accept=("novel",)).refusals
    after = rows_of(store)
    (born,) = {after[1000 + n]["cluster_id"] for n in range(30)}
    assert born == 5
    novel = {row["id"]: (row["cluster_id"], row["distance"]) for row in novel_of(store)}
    assert novel == {1000 + n: (born, after[1000 + n]["distance"]) for n in range(30)}
    assert all(after[n]["cluster_id"] == before[n]["cluster_id"] for n in range(DOCUMENTS))
    assert verify_store(Store.open(str(store))) == []


def test_clusters_that_were_accepted_outlive_the_next_fit(assigned, tonight, store):
    texts = texts_of(extra=15)
    assert not assigned(texts, accept=("novel",), refit_every=2).refusals
    (born,) = {rows_of(store)[1000 + n]["cluster_id"] for n in range(15)}
    edit_store(EditConfig(store=str(store), name=(born, "Quirks")))
    assert not assigned(texts, refit_every=2, max_score_drop=2.0).refusals
    assert Store.open(str(store)).version().record.details["nights_since_fit"] == 0
    assert {rows_of(store)[1000 + n]["cluster_id"] for n in range(15)} == {born}
    assert not tonight(texts | {3: text_of(3, version=1)}).refusals
    version = Store.open(str(store)).version()
    assert version.read_table("edits.parquet")["status"].to_pylist() == ["applied"]
    assert len(centroids_of(store)) == 6
    with Store.open(str(store)).take_lease("test") as lease:
        for _ in range(3):
            Store.open(str(store)).rollback(lease)
    assert not tonight(texts_of(extra=1)).refusals
    assert len(centroids_of(store)) == 5


def test_a_split_is_of_the_documents_that_were_there_not_of_those_that_came(assigned, store):
    assigned(texts_of(extra=1), novel_documents=99)
    split = rows_of(store)[1000]["cluster_id"]  # nearest to what is to come
    assigned(texts_of())
    edit_store(EditConfig(store=str(store), split=split))
    assert not assigned(texts_of(extra=40), accept=("novel",)).refusals
    version = Store.open(str(store)).version()
    assert version.read_table("edits.parquet")["status"].to_pylist() == ["applied"]
    assert len(centroids_of(store)) == 7
    rows = rows_of(store)
    newcomers = {rows[1000 + n]["cluster_id"] for n in range(40)}
    assert len({row["cluster_id"] for n, row in rows.items() if n < 1000} - newcomers) == 6
    assert not assigned(texts_of(extra=41), clusters="refit", max_drift=1.0).refusals
    assert len(centroids_of(store)) == 7
    assert verify_store(Store.open(str(store))) == []


def test_what_is_far_from_a_cluster_that_was_accepted_is_novel(assigned, store):
    texts = texts_of(extra=90)
    assert not assigned(texts, accept=("novel",)).refusals
    (born,) = {rows_of(store)[1000 + n]["cluster_id"] for n in range(90)}
    texts |= texts_of(extra=93) | {2000 + n: text_of(n, "x") for n in range(60)}
    for _ in range(2):
        assert not assigned(texts, novel_documents=99).refusals
        rows = rows_of(store)
        assert {rows[1000 + n]["cluster_id"] for n in range(93)} == {born}
        assert born in {rows[2000 + n]["cluster_id"] for n in range(60)}
        assert [row["id"] for row in novel_of(store)] == [*range(2000, 2060)]
        texts |= {3: text_of(3, version=1)}


def test_a_document_that_people_put_somewhere_is_not_novel(assigned, store):
    assigned(texts_of(extra=4))
    other = (rows_of(store)[1000]["cluster_id"] + 1) % 5
    edit_store(EditConfig(store=str(store), pin=("1000", other)))
    assigned(texts_of(extra=10))  # one more would be as many as a cluster takes
    assert [row["id"] for row in novel_of(store)] == [*range(1001, 1010)]
    assert {row["group"] for row in novel_of(store)} == {None}
    assert rows_of(store)[1000]["cluster_id"] == other


def test_novel_documents_of_several_nights_count_together(assigned):
    assert not assigned(texts_of(extra=6)).refusals
    assert "of 12" in assigned(texts_of(extra=12)).refusals[0]


def test_a_fit_is_due_after_as_many_nights_as_are_asked_for(assigned, store):
    for number, kind in enumerate(("assign", "assign", "fit", "assign"), 1):
        texts = texts_of() | {n: text_of(n, version=number) for n in range(5)}
        result = assigned(texts, refit_every=3)
        details = Store.open(str(store)).version().record.details
        assert (details["nights_since_fit"] == 0) == (kind == "fit")
        assert ("novel" in result.summary) == (kind == "assign")
        if number == 1:
            assert "a fit is due in 2 nights" in result.summary["novel"]


def test_one_night_that_refits_does_so_where_nothing_changed(assigned, tonight, store):
    texts = texts_of() | {n: text_of(n, version=1) for n in range(5)}
    assert not assigned(texts).refusals
    assert "nothing changed" in assigned(texts).summary
    assert not tonight(texts).refusals
    version = Store.open(str(store)).version()
    assert (version.number, version.record.details["nights_since_fit"]) == (3, 0)
    assert "nothing changed" in tonight(texts).summary


def test_a_fit_is_due_when_documents_have_drifted_from_their_centroids(assigned, store):
    fits = []
    for extra in (1, 2, 30, 31, 32):
        result = assigned(texts_of(extra), refit_drift=0.2, novel_documents=99, max_drift=1.0)
        version = Store.open(str(store)).version()
        inertia = version.record.scores["inertia"] / version.count()
        growth = inertia / version.record.details["fitted_spread"] - 1
        fits.append(version.record.details["nights_since_fit"] == 0)
        if not fits[-1]:
            told = result.summary["novel"]
            assert ("a fit is due in 1 nights" in told) == (growth > 0.2) == (extra == 30)
            assert (f"{growth:+.1%} since the fit" in told) == (extra != 30)
    assert fits == [False, False, False, True, False]


def test_a_fit_heeds_what_changed_in_all_nights_since_the_last_one(assigned, store, monkeypatch):
    asked = []

    def settings(*arguments):
        asked.append(cluster_config(*arguments))
        return asked[-1]

    monkeypatch.setattr(clusters, "cluster_config", settings)
    texts = texts_of()
    for number in range(1, 5):
        texts |= {n: text_of(n, version=number) for n in range(10 * number, 10 * number + 8)}
        assert not assigned(texts, refit_every=4).refusals
    version = Store.open(str(store)).version()
    assert (version.number, version.record.details["nights_since_fit"]) == (5, 0)
    assert asked[-1].max_iterations == 16  # four nights of 4%
    texts |= {3: text_of(3, version=9), 4: text_of(4, version=9)}
    assert not assigned(texts, clusters="refit").refusals
    assert asked[-1].max_iterations == 1


def test_another_number_of_clusters_is_fitted_anew(assigned, store):
    assert not assigned(texts_of(), num_clusters="6", max_drift=1.0).refusals
    assert Store.open(str(store)).version().record.details["nights_since_fit"] == 0
    assert len(centroids_of(store)) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"refit_every": 3}, "no effect without --clusters assign"),
        ({"refit_drift": 0.1}, "no effect without --clusters assign"),
        ({"refit_drift": -0.1, "clusters": "assign"}, "must not be negative"),
        ({"novel_similarity": 1.0}, "novel_similarity is 1.0"),
        ({"notify": "ftp://somewhere"}, "http:// or https:// address, or env:NAME"),
    ],
)
def test_options_that_do_not_do_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        NightConfig(**flags)


@pytest.fixture
def webhook():
    """An address that keeps what is posted to it."""
    posted = []

    class Keep(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Keep)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    server.server_close()


def test_a_webhook_is_told_what_became_of_a_night(assigned, webhook, monkeypatch):
    address, posted = webhook
    monkeypatch.setenv("WEBHOOK", address)
    assigned(texts_of(extra=3), notify=address)
    assigned(texts_of(extra=3), notify="env:WEBHOOK")
    assigned(texts_of(extra=20), notify=address)
    assigned({n: text_of(n) for n in range(40)}, notify=address)
    assert {kind for kind, _ in posted} == {"application/json"}
    messages = [message for _, message in posted]
    assert [(m["event"], m["version"]) for m in messages] == [
        ("published", 2), ("unchanged", 2), ("novel", 3), ("refused", 4),
    ]  # fmt: skip
    assert messages[0]["counts"]["novel"] == 3
    assert messages[2]["reasons"][0].startswith("novel")
    assert [m["published"] for m in messages] == [True, True, False, False]


def test_a_webhook_is_told_of_an_encoder_change_from_refusal_to_publication(tonight, webhook):
    address, posted = webhook
    change = {"prompt": "none", "notify": address}
    tonight(texts_of(), **change, max_embed_hours=1e-9, chunk_tokens=9600)
    tonight(texts_of(), **change)
    tonight(texts_of(), **change, accept=("encoder",))
    messages = [message for _, message in posted]
    told = [(m["event"], m["published"], m["version"]) for m in messages]
    assert told == [("unfinished", False, 1), ("refused", False, 2), ("published", True, 3)]
    assert [reason.partition(":")[0] for reason in messages[1]["reasons"]] == ["encoder"]
    assert messages[2]["reasons"] == []


def test_a_webhook_that_fails_does_not_fail_the_night(webhook, caplog, monkeypatch):
    address, _ = webhook
    assert not notify(f"{address}/broken", {})
    assert not notify("http://127.0.0.1:9/", {})
    monkeypatch.delenv("WEBHOOK", raising=False)
    assert not notify("env:WEBHOOK", {})
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "127.0.0.1" not in caplog.text


def test_a_first_night_is_fitted(tmp_path, tiny_model_folder):
    corpus = write_corpus(tmp_path / "corpus", texts_of())
    settings = {"clusters": "assign", **NOVEL}
    assert not night(corpus, tmp_path / "store", tiny_model_folder, **settings).refusals
    assert "novel.parquet" not in Store.open(str(tmp_path / "store")).version().artifacts()
