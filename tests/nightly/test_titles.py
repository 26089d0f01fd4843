"""A model's names for clusters, kept while a cluster lives; people's stand above them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import chat_server
from nights import lineage_of, rows_of, text_of
from ports import free_port

from pipelines.encoder import endpoint
from pipelines.encoder.titles import TitleWriter
from pipelines.runtime.errors import InputError
from pipelines.store.config import EditConfig
from pipelines.store.edits import edit_store
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_model")


@pytest.fixture
def asked(monkeypatch):
    """The groups that the model was asked to name, one list a question."""
    questions = []

    def answer(writer, levels, *, taken=None):
        (groups,) = levels
        questions.append((writer.model, list(groups), dict(taken or {})))
        start = sum(len(groups) for _, groups, _ in questions[:-1])
        return [[f"Title {start + place}" for place in range(len(groups))]]

    monkeypatch.setattr(TitleWriter, "check", lambda writer: None)
    monkeypatch.setattr(TitleWriter, "name", answer)
    return questions


def names_of(store):
    version = Store.open(str(store)).version()
    rows = pq.read_table(pa.BufferReader(version.read("clusters.parquet"))).to_pylist()
    return {row["cluster_id"]: row["name"] for row in rows}


def corpus(changed=(), documents=200):
    return {n: text_of(n, version=int(n in changed)) for n in range(documents)}


def test_titles_are_kept_while_clusters_live_and_people_stand_above(asked, tonight, store):
    tonight(corpus())
    by_keywords = names_of(store)
    assert not asked
    tonight(corpus(), name_model="writer")  # nothing changed, but names are wanted
    titled = names_of(store)
    assert set(titled) == set(by_keywords)
    assert sorted(titled.values()) == [f"Title {n}" for n in range(len(titled))]
    assert all(group.keywords and group.texts for group in asked[0][1])

    tonight(corpus({3, 4}))  # without the flag, and without a question
    tonight(corpus({3, 4, 5}), name_model="writer")
    assert names_of(store) == titled
    assert len(asked) == 1

    edit_store(EditConfig(store=str(store), name=(2, "Billing"), who="ann"))
    tonight(corpus({3, 4, 5}))
    assert names_of(store) == {**titled, 2: "Billing"}
    edit_store(EditConfig(store=str(store), undo=1, who="ann"))
    tonight(corpus({3, 4, 5}))
    assert names_of(store) == titled
    assert not [e for e in lineage_of(store) if e["event"] == "renamed"]
    assert verify_store(Store.open(str(store))) == []
    report = Store.open(str(store)).version().read("report.html").decode()
    assert "Title 0" in report


def test_a_night_that_has_its_titles_has_nothing_to_do(asked, tonight, store):
    tonight(corpus(), name_model="writer")
    version = Store.open(str(store)).version().number
    tonight(corpus(), name_model="writer")
    assert Store.open(str(store)).version().number == version
    assert len(asked) == 1


def test_a_model_that_finds_no_name_is_not_asked_again_where_nothing_changed(
    asked, monkeypatch, tonight, store
):
    def nothing(writer, levels, *, taken=None):
        asked.append(levels)
        return [[None] * len(groups) for groups in levels]

    monkeypatch.setattr(TitleWriter, "name", nothing)
    before = names_of(store)
    tonight(corpus(), name_model="writer")
    version = Store.open(str(store)).version().number
    tonight(corpus(), name_model="writer")
    assert len(asked) == 1
    assert Store.open(str(store)).version().number == version
    assert names_of(store) == before


def test_a_new_cluster_is_asked_for_beside_the_names_that_are_taken(asked, tonight, store):
    texts = corpus() | {n: text_of(n, "a", 7) for n in range(0, 200, 10)}
    tonight(texts, name_model="writer", max_drift=1.0)
    before = names_of(store)
    divided = {r["cluster_id"] for r in rows_of(store).values() if r["text"].startswith("a")}.pop()
    other = min(set(before) - {divided})
    edit_store(EditConfig(store=str(store), name=(other, "Billing"), who="ann"))
    edit_store(EditConfig(store=str(store), split=divided, who="ann"))
    tonight(texts, name_model="writer", accept=("score",))
    model, groups, taken = asked[1]
    assert (model, len(groups)) == ("writer", 1)
    assert set(taken) == {*before.values(), "Billing"} - {before[other]}
    (born,) = set(names_of(store)) - set(before)
    assert names_of(store) == {**before, other: "Billing", born: "Title 5"}


def test_an_endpoint_names_clusters_and_stops_no_later_night(
    monkeypatch, caplog, tonight, store, tmp_path
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wJalrXUtnFEMI")
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0)
    dead = {"name_model": "writer", "name_url": f"http://127.0.0.1:{free_port()}/v1"}
    version = Store.open(str(store)).version().number
    with pytest.raises(InputError, match="was not reached"):
        tonight(corpus(), **dead)
    assert Store.open(str(store)).version().number == version

    with chat_server(lambda body: f"Title {len(server.requests)}") as server:
        tonight(corpus(), name_model="writer", name_url=server.url)
    titled = names_of(store)
    assert len({*titled.values()}) == len(titled) == 5
    assert all(name.startswith("Title ") for name in titled.values())
    assert all(body["model"] == "writer" for body in server.requests)

    texts = corpus() | {n: text_of(n, "a", 7) for n in range(0, 200, 10)}
    tonight(texts, max_drift=1.0, **dead)
    divided = {r["cluster_id"] for r in rows_of(store).values() if r["text"].startswith("a")}.pop()
    edit_store(EditConfig(store=str(store), split=divided, who="ann"))
    assert "got no name" not in caplog.text
    assert not tonight(texts, accept=("score",), **dead).refusals
    (born,) = set(names_of(store)) - set(titled)
    assert names_of(store).items() >= titled.items() and names_of(store)[born]
    assert "was not reached" in caplog.text and "1 of 1 new clusters got no name" in caplog.text
    secrets = [p for p in tmp_path.rglob("*") if p.is_file() and b"sk-wJal" in p.read_bytes()]
    assert secrets == [] and "sk-wJal" not in caplog.text
