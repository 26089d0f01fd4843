import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_stores import (
    DIMENSION,
    ENCODER,
    SCHEMA,
    change,
    finish,
    nearest,
    numbered,
    publish_first,
    publish_night,
    table_of,
    texts_of,
    vector_of,
    when,
    write_files,
)

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, list_files, remove_files, write_bytes
from pipelines.store import candidate as candidate_module
from pipelines.store import documents as store_module
from pipelines.store import store as catalog_module
from pipelines.store.columns import document_schema
from pipelines.store.documents import assign_fragment, read_fragment
from pipelines.store.lease import LeaseLostError
from pipelines.store.records import StaleWriterError
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

TEXTS = numbered(range(40))


@pytest.fixture
def store(tmp_path):
    return Store.open_or_create(str(tmp_path / "store"))


@pytest.fixture
def published(store, tmp_path):
    publish_first(store, tmp_path, TEXTS)
    return store


def test_a_first_version_holds_every_document_of_its_files(published):
    version = published.version()
    assert version.number == 1
    assert texts_of(version) == TEXTS
    assert version.record.counts == {"documents": 40, "embedded": 1}
    assert version.record.fingerprint == ENCODER.fingerprint
    row = version.take(["d7"]).to_pylist()[0]
    assert row["label"] == "first"
    assert row["first_seen"] == row["last_changed"] == when(0)
    np.testing.assert_array_equal(row["embedding"], vector_of(TEXTS["d7"]))
    cluster, distance = nearest(vector_of(TEXTS["d7"])[None])
    assert row["cluster_id"] == cluster[0]
    assert row["distance"] == pytest.approx(distance[0], rel=1e-6)


def test_a_night_writes_what_changed_and_leaves_the_rest(published):
    before = {
        row["id"]: row for batch in published.version().batches() for row in batch.to_pylist()
    }
    version = publish_night(published, {"d3": "other text", "e1": "new text"}, ["d5", "d6", "none"])
    after = {row["id"]: row for batch in version.batches() for row in batch.to_pylist()}
    assert after.keys() == before.keys() - {"d5", "d6"} | {"e1"}
    assert after["d3"]["first_seen"] == when(0)
    assert after["d3"]["last_changed"] == after["e1"]["first_seen"] == when(1)
    assert after["d3"]["text"] == "other text"
    for row_id in before.keys() - {"d3", "d5", "d6"}:
        assert after[row_id] == before[row_id]


def test_before_assignments_documents_have_the_cluster_of_the_version_before(published):
    old = {r["id"]: r["cluster_id"] for b in published.version().batches() for r in b.to_pylist()}
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        change(candidate, {"d3": "other text", "e1": "new text"})
        found = {
            row["id"]: row["cluster_id"]
            for ref in candidate.fragments()
            for batch in read_fragment(ref, ["id", "cluster_id"])
            for row in batch.to_pylist()
        }
    assert found.pop("e1") is None
    assert found == old


def test_a_candidate_is_invisible_until_it_is_sealed_and_published(published):
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        change(candidate, {"d3": "other text"})
        assert texts_of(published.version()) == TEXTS
        version = finish(candidate)
        assert texts_of(published.version()) == TEXTS
        assert [v.number for v in published.versions()] == [1, 2]
        published.publish(version.number, lease)
    assert texts_of(published.version()) == {**TEXTS, "d3": "other text"}


@pytest.mark.parametrize(
    "step",
    ["upsert", "delete", "assign", "artifacts", "index", "stamp", "record", "publication", "tag"],
)
def test_a_crash_at_any_step_leaves_readers_on_the_old_version(published, monkeypatch, step):
    files_before = set(list_files(published.uri))
    with pytest.raises(ZeroDivisionError), published.take_lease("test") as lease:
        crash_at(step, published, lease, monkeypatch)
    monkeypatch.undo()
    assert texts_of(published.version()) == TEXTS
    assert published.version().number == 1
    with published.take_lease("test") as lease:
        published.clean(lease)
    left = {n for n in set(list_files(published.uri)) - files_before if not volatile(n)}
    sealed = step in ("publication", "tag")
    assert [v.number for v in published.versions()] == ([1, 2] if sealed else [1])
    if not sealed:
        assert left == set()
    assert verify_store(published) == []
    version = publish_night(published, {"d3": "other text"}, ["d5"])
    expected = {**TEXTS, "d3": "other text"}
    del expected["d5"]
    assert texts_of(published.version()) == texts_of(version) == expected
    assert version.number == (3 if sealed else 2)
    assert verify_store(published) == []


def volatile(name: str) -> bool:
    """Files of a store that every holder of the lease may change."""
    return name.startswith(
        ("lease/", "documents.lance/_versions/", "documents.lance/_transactions")
    )


def crash_at(step, store, lease, monkeypatch):
    """Do a night and divide by zero at one of its steps."""

    def crash(*_, **__):
        raise ZeroDivisionError

    if step == "stamp":
        monkeypatch.setattr(store_module.Documents, "stamp", crash)
    elif step == "record":
        monkeypatch.setattr(candidate_module, "write_record", crash)
    elif step == "publication":
        monkeypatch.setattr(catalog_module, "write_publication", crash)
    candidate = store.begin(lease)
    change(candidate, {"d3": "other text"})
    if step == "upsert":
        crash()
    candidate.delete([pa.array(["d5"])])
    if step == "delete":
        crash()
    candidate.set_assignments([assign_fragment(ref, nearest) for ref in candidate.fragments()])
    if step == "assign":
        crash()
    candidate.put("scores.json", b"{}")
    if step == "artifacts":
        crash()
    candidate.update_index()
    if step == "index":
        crash()
    version = candidate.seal(counts={}, scores={})
    if step == "tag":
        monkeypatch.setattr(store_module.Documents, "tag", crash)
    store.publish(version.number, lease)


def test_an_abandoned_candidate_leaves_nothing(published):
    before = {n for n in list_files(published.uri) if not volatile(n)}
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        change(candidate, {"d3": "other text"}, ["d4"])
        candidate.put("notes.txt", b"x")
        published.clean(lease)
    assert {n for n in list_files(published.uri) if not volatile(n)} == before


def test_vectors_of_two_encoders_never_mix(published):
    other = document_schema(pa.string(), {"label": pa.string()}, DIMENSION, pa.float32(), "ab" * 32)
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        with pytest.raises(InputError, match="vectors of two encoders never mix"):
            candidate.upsert(table_of({"a": "b"}).to_batches(), schema=other, when=when(1))


def test_vectors_of_another_length_are_refused(published):
    other = document_schema(pa.string(), {}, 8, pa.float32(), ENCODER.fingerprint)
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        with pytest.raises(InputError, match=r"column 'embedding' is .*\[16\] in the store"):
            candidate.upsert(table_of({"a": "b"}).to_batches(), schema=other, when=when(1))


def test_an_id_that_comes_twice_is_refused(published):
    batches = [*table_of({"a": "b"}).to_batches(), *table_of({"a": "c"}).to_batches()]
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        with pytest.raises(InputError, match="id 'a' comes more than once"):
            candidate.upsert(batches, schema=SCHEMA, when=when(1))


def test_a_new_encoder_keeps_what_is_known_of_documents(published, tmp_path):
    old = {r["id"]: r for b in published.version().batches() for r in b.to_pylist()}
    schema = document_schema(pa.string(), {"label": pa.string()}, 8, pa.float16(), "cd" * 32)
    texts = {**TEXTS, "d3": "other text", "e1": "new text"}
    del texts["d5"]
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        files = write_files(tmp_path, texts, schema)
        assert candidate.replace(files, schema=schema, when=when(1)) == len(texts)
        rows = {r["id"]: r for b in candidate.documents.batches() for r in b.to_pylist()}
    assert texts_of(published.version()) == TEXTS
    assert {row_id: row["text"] for row_id, row in rows.items()} == texts
    assert {len(row["embedding"]) for row in rows.values()} == {8}
    assert rows["d3"]["first_seen"] == rows["d7"]["last_changed"] == when(0)
    assert rows["d3"]["last_changed"] == rows["e1"]["first_seen"] == when(1)
    assert rows["d7"]["cluster_id"] == old["d7"]["cluster_id"]
    assert rows["e1"]["cluster_id"] is None


def test_changed_columns_are_written_without_vectors(published):
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        found = candidate.update_columns(pa.table({"id": ["d1", "d2"], "label": ["x", "y"]}))
        assert found == 2
        rows = candidate.take(["d1", "d2", "d3"], ["id", "label", "text"]).to_pylist()
    assert {(r["id"], r["label"]) for r in rows} == {("d1", "x"), ("d2", "y"), ("d3", "first")}
    assert {r["text"] for r in rows} == {TEXTS["d1"], TEXTS["d2"], TEXTS["d3"]}


def test_assignments_of_some_fragments_are_not_enough(published):
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        first = candidate.fragments()[:1]
        with pytest.raises(ValueError, match="1 fragments with 20 rows are assigned, there are 2"):
            candidate.set_assignments([assign_fragment(ref, nearest) for ref in first])


@pytest.mark.parametrize("row_id", ["it's", 'a "quoted" id', "two\nlines", "", "ünï", "a\\b"])
def test_any_string_is_an_id(store, tmp_path, row_id):
    publish_first(store, tmp_path, {row_id: "first text", "other": "second text"})
    version = publish_night(store, {row_id: "changed text"}, ["other"])
    assert texts_of(version) == {row_id: "changed text"}
    assert version.take([row_id], ["first_seen"]).to_pylist() == [{"first_seen": when(0)}]


def test_ids_may_be_integers_and_vectors_half_precision(store, tmp_path):
    schema = document_schema(
        pa.int32(), {"label": pa.string()}, DIMENSION, pa.float16(), ENCODER.fingerprint
    )
    texts = {number: f"text {number}" for number in range(-3, 20)}
    publish_first(store, tmp_path, texts, schema)
    version = publish_night(store, {5: "other text"}, [-3])
    assert version.schema.field("id").type == pa.int64()
    assert version.schema.field("embedding").type.value_type == pa.float16()
    assert texts_of(version) == {**{k: v for k, v in texts.items() if k != -3}, 5: "other text"}
    assert version.search(vector_of("other text"), 1)["id"].to_pylist() == [5]
    assert verify_store(store) == []


def test_a_kept_column_cannot_take_a_name_of_the_store():
    with pytest.raises(InputError, match="kept column 'distance'"):
        document_schema(pa.string(), {"distance": pa.float64()}, 4, pa.float32(), "")


def test_rolling_back_twice_goes_back_two_versions(published):
    publish_night(published, {"d1": "second text"}, night=1)
    publish_night(published, {"d1": "third text"}, night=2)
    with published.take_lease("test") as lease:
        assert published.rollback(lease).number == 2
        assert published.rollback(lease).number == 1
        with pytest.raises(InputError, match="no version published before 1 is left"):
            published.rollback(lease)
    assert texts_of(published.version()) == TEXTS


def test_rolling_back_ends_where_a_version_was_published_twice(published):
    publish_night(published, {"d1": "second text"}, night=1)
    publish_night(published, {"d1": "third text"}, night=2)
    with published.take_lease("test") as lease:
        published.publish(1, lease)
        assert [published.rollback(lease).number for _ in range(3)] == [3, 2, 1]
        with pytest.raises(InputError, match="no version published before 1 is left"):
            published.rollback(lease)
        published.publish(3, lease)
        published.publish(2, lease)
        assert [published.rollback(lease).number for _ in range(2)] == [3, 1]


def test_a_rollback_that_was_recorded_and_not_done_is_done_again(published, monkeypatch):
    publish_night(published, {"d1": "second text"}, night=1)
    publish_night(published, {"d1": "third text"}, night=2)
    with published.take_lease("test") as lease:
        with monkeypatch.context() as patch:
            patch.setattr(store_module.Documents, "tag", None)
            with pytest.raises(TypeError):
                published.rollback(lease)
        assert published.version().number == 3
        assert [published.rollback(lease).number for _ in range(2)] == [2, 1]


def test_the_night_after_a_rollback_starts_from_what_is_published(published):
    publish_night(published, {"d1": "wrong text"}, ["d2"])
    with published.take_lease("test") as lease:
        published.rollback(lease)
    version = publish_night(published, {"d3": "other text"}, night=2)
    assert version.number == 3
    assert version.record.base == 1
    assert texts_of(version) == {**TEXTS, "d3": "other text"}
    with published.take_lease("test") as lease:
        assert published.rollback(lease).number == 1
    assert verify_store(published) == []


def test_a_version_made_from_an_old_one_is_not_published_by_accident(published):
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        change(candidate, {"d1": "from version 1"})
        version = finish(candidate)
        with pytest.raises(StaleWriterError, match="version 1 is published, not 7"):
            published.publish(version.number, lease, expected=7)
    assert published.version().number == 1


def test_a_refused_version_can_be_looked_at_and_published_by_hand(published):
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        change(candidate, {}, list(TEXTS)[:30])
        version = finish(candidate, reasons=["75% of the documents are deleted"])
    assert published.version().number == 1
    assert published.version(version.number).record.reasons == ("75% of the documents are deleted",)
    assert published.version(version.number).count() == 10
    with published.take_lease("test") as lease:
        published.publish(version.number, lease)
    assert published.version().count() == 10


def test_two_writers_cannot_both_change_the_store(published):
    with published.take_lease("test") as lease:
        first, second = published.begin(lease), published.begin(lease)
        change(first, {"d1": "from the first"})
        with pytest.raises(StaleWriterError, match="another writer has changed it"):
            change(second, {"d2": "from the second"})


def test_a_writer_that_lost_its_lease_stops(published):
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
    with pytest.raises(LeaseLostError, match="it was given back"):
        change(candidate, {"d1": "too late"})


def test_pruning_keeps_the_newest_the_published_and_the_named(published):
    for night in range(1, 6):
        publish_night(published, {"d1": f"text of night {night}"}, night=night)
    with published.take_lease("test") as lease:
        published.tag(2, "before-the-summer", lease)
        published.publish(3, lease)
        assert published.prune(lease, keep=2) == [1, 4]
    assert [v.number for v in published.versions()] == [2, 3, 5, 6]
    assert texts_of(published.version(2))["d1"] == "text of night 1"
    assert verify_store(published) == []
    with published.take_lease("test") as lease:
        published.untag("before-the-summer", lease)
        assert published.prune(lease, keep=1) == [2, 5]
    assert publish_night(published, {"d1": "x y"}, night=7).number == 7


def test_pruning_frees_the_room_of_what_it_removes(published):
    def size() -> int:
        return sum(f.stat().st_size for f in Path(published.uri).rglob("*") if f.is_file())

    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        change(candidate, {"d1": "other text"})
        candidate.put("large.bin", os.urandom(1_000_000))
        published.publish(finish(candidate).number, lease)
    publish_night(published, {"d1": "third text"}, night=2)
    before = size()
    with published.take_lease("test") as lease:
        published.prune(lease, keep=1)
    assert size() < before - 1_000_000


def test_an_artifact_that_two_versions_share_outlives_the_first(published):
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        candidate.put("large.bin", b"x" * 1000)
        published.publish(finish(candidate).number, lease)
        candidate = published.begin(lease)
        candidate.put("large.bin", b"x" * 1000)
        version = finish(candidate)
        published.publish(version.number, lease)
        assert version.record.artifacts["large.bin"].path == "versions/2/large.bin"
        published.prune(lease, keep=1)
    assert published.version().read("large.bin") == b"x" * 1000
    assert verify_store(published) == []


def test_a_folder_of_other_things_is_no_store(tmp_path):
    with pytest.raises(InputError, match="is no store"):
        Store.open(str(tmp_path))
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"it holds 'thesis.tex'\) and is no store"):
        Store.open_or_create(str(tmp_path))


def test_an_unknown_version_is_named_with_those_there_are(published):
    with pytest.raises(InputError, match="has no version 9; its versions are 1"):
        published.version(9)


def test_a_store_without_a_publication_says_so(store):
    assert store.published() is None
    with pytest.raises(InputError, match="no published version yet"):
        store.version()


def test_search_finds_a_documents_text_first(published):
    found = published.version().search(vector_of(TEXTS["d11"]), 3)
    assert found["id"][0].as_py() == "d11"
    assert found["score"][0].as_py() == pytest.approx(1, abs=1e-5)
    assert found["text"][0].as_py() == TEXTS["d11"]
    assert found.column_names[0] == "score"
    assert "embedding" not in found.column_names


def test_a_filter_never_makes_hits_fewer(published):
    publish_night(published, numbered(range(100, 103), "other"))
    found = published.version().search(vector_of(TEXTS["d11"]), 3, filter="label = 'other'")
    assert sorted(found["id"].to_pylist()) == ["d100", "d101", "d102"]


@pytest.mark.parametrize("filter", ["nosuch = 3", "label = = 1", "label ="])
def test_a_faulty_filter_is_the_users_error(published, filter):
    with pytest.raises(InputError, match="A filter is a condition in SQL"):
        published.version().search(vector_of("x"), 3, filter=filter)


def test_a_query_of_another_length_is_refused(published):
    with pytest.raises(InputError, match="the version's vectors have 16 numbers"):
        published.version().search(np.zeros(3, np.float32), 3)


def damage(store, name, change_bytes):
    path = Path(store.uri, name)
    path.write_bytes(change_bytes(path.read_bytes()))


def test_verify_finds_a_changed_and_a_missing_artifact(published):
    damage(published, "versions/1/scores.json", lambda data: data + b" ")
    assert verify_store(published) == [
        "version 1: artifact scores.json was changed (versions/1/scores.json)"
    ]
    Path(published.uri, "versions/1/scores.json").unlink()
    assert verify_store(published) == [
        "version 1: artifact scores.json is missing (versions/1/scores.json)"
    ]


def test_verify_finds_a_record_that_does_not_fit_its_documents(published):
    def miscount(data: bytes) -> bytes:
        content = json.loads(data)
        content["counts"]["documents"] = 41
        return json.dumps(content).encode()

    damage(published, "versions/1/version.json", miscount)
    assert verify_store(published) == ["version 1: it has 40 documents, its record says 41"]


def test_verify_finds_documents_gone_from_the_disk(published):
    data = next(Path(published.uri, "documents.lance/data").iterdir())
    data.unlink()
    assert any("version 1: it cannot be read" in problem for problem in verify_store(published))


def test_verify_finds_wrong_rows(published):
    table = table_of({"a": "some text", "b": "more text", "c": "last text"})
    digests = table["text_sha256"].to_pylist()
    digests[0] = hashlib.sha256(b"x").hexdigest()
    vectors = np.zeros((3, DIMENSION), np.float32)
    vectors[:, 0] = [1, 2, np.nan]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMENSION)
    batches = (
        table.drop_columns(["text_sha256", "embedding"])
        .append_column("text_sha256", pa.array(digests))
        .append_column("embedding", embedding)
        .to_batches()
    )
    with published.take_lease("test") as lease:
        candidate = published.begin(lease)
        candidate.upsert(batches, schema=SCHEMA, when=when(1))
        finish(candidate)
    assert verify_store(published) == [
        "version 2: 1 documents have a text_sha256 that is not their text's",
        "version 2: 1 vectors hold numbers that are not finite",
        "version 2: 1 vectors are not of length 1, as the encoder makes them",
    ]


def test_verify_finds_documents_without_assignment_and_wrong_sizes(published):
    with published.take_lease("test") as lease:
        centroids = published.version().read("centroids.parquet")
        candidate = published.begin(lease)
        candidate.put("centroids.parquet", centroids)
        change(candidate, {"new": "new text"})
        candidate.seal(counts={}, scores={})
        candidate = published.begin(lease)
        candidate.put("centroids.parquet", centroids)
        change(candidate, {}, ["d1"])
        candidate.set_assignments([assign_fragment(ref, nearest) for ref in candidate.fragments()])
        candidate.seal(counts={}, scores={})
    problems = verify_store(published)
    assert "version 2: 1 documents have no cluster_id" in problems
    assert any("version 3: clusters" in problem for problem in problems)


def test_verify_finds_a_version_that_cleaning_would_remove(published):
    published.version().documents.untag("version-1")
    assert "version 1 has no tag: cleaning would remove its documents" in verify_store(published)


def test_files_stay_few_and_deleted_rows_are_dropped_in_time(published):
    for night in range(1, 16):
        word = f"night{night}"
        version = publish_night(published, numbered([night % 40], word), night=night)
        fragments = version.fragments()
        assert len(fragments) <= 12
        assert version.documents.deleted_share() <= 0.5
        assert texts_of(version) == {
            **TEXTS,
            **{f"d{n % 40}": f"night{n} text {n % 40}" for n in range(1, night + 1)},
        }
    assert version.take(["d9"], ["first_seen"]).to_pylist() == [{"first_seen": when(0)}]


IDS = st.integers(0, 30)
NIGHT = st.tuples(
    st.dictionaries(IDS, st.integers(0, 5), max_size=8),
    st.sets(IDS, max_size=6),
    st.sampled_from(["publish", "publish", "publish", "refuse", "crash", "rollback", "prune"]),
)


@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.lists(NIGHT, min_size=3, max_size=10))
def test_a_store_is_a_dictionary_with_history(nights):
    folder = Path(tempfile.mkdtemp())
    try:
        check_history(Store.open_or_create(str(folder / "store")), folder, nights)
    finally:
        shutil.rmtree(folder)


def check_history(store, folder, nights):
    """Run nights against a model of the store: contents by number, and what is published."""
    contents = {1: numbered(range(10))}
    publish_first(store, folder, contents[1])
    history = [1]
    for number, (changed, deleted, way) in enumerate(nights, 1):
        texts = {f"d{row}": f"text {row} {value}" for row, value in changed.items()}
        gone = {f"d{row}" for row in deleted} - texts.keys()
        with store.take_lease("test") as lease:
            if way == "rollback" and len(history) > 1:
                store.rollback(lease)
                history.pop()
            elif way == "prune":
                kept = {*sorted(contents)[-2:], history[-1]}
                assert set(store.prune(lease, keep=2)) == contents.keys() - kept
                contents = {n: texts for n, texts in contents.items() if n in kept}
                history = [n for n in history if n in kept]
            else:
                candidate = store.begin(lease)
                change(candidate, texts, gone, number)
                if way != "crash":
                    version = finish(candidate)
                    base = contents[history[-1]]
                    contents[version.number] = {
                        k: v for k, v in {**base, **texts}.items() if k not in gone
                    }
                if way in ("publish", "rollback"):
                    store.publish(version.number, lease, expected=history[-1])
                    history.append(version.number)
        assert store.version().number == history[-1]
        assert {v.number: texts_of(v) for v in store.versions()} == contents
    assert verify_store(store) == []


ENDLESS_NIGHTS = """
import itertools, sys
from pathlib import Path
from tiny_stores import numbered, publish_first, publish_night
from pipelines.store.store import Store

store = Store.open_or_create(sys.argv[1])
if store.published() is None:
    publish_first(store, Path(sys.argv[2]), numbered(range(60), "night0"))
print("ready", flush=True)
for number in itertools.count(store.version().number):
    publish_night(store, numbered(range(60), f"night{number}"), [], night=number)
    print("published", flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_whole_versions(tmp_path):
    """Every night changes every text: texts of two nights in one version would be a torn one."""
    uri, random = str(tmp_path / "store"), np.random.default_rng(0)
    published = 0
    for _ in range(5):
        arguments = [sys.executable, "-c", ENDLESS_NIGHTS, uri, str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for _ in range(random.integers(1, 4)):
                assert process.stdout.readline() == "published\n"
            time.sleep(random.uniform(0.0, 0.3))
            process.kill()
        store = Store.open(uri)
        version = store.version()
        words = {text.split()[0] for text in texts_of(version).values()}
        assert version.count() == 60
        assert len(words) == 1
        assert version.number >= published
        published = version.number
        assert verify_store(store) == []
    with store.take_lease("test") as lease:
        store.prune(lease, keep=1)
    assert published > 5
    assert {v.number for v in store.versions()} >= {published}


@pytest.fixture(scope="module")
def bucket(s3_server):
    s3_server.create_bucket(Bucket="shoal-store")
    return "s3://shoal-store"


def test_a_store_on_s3_is_published_changed_rolled_back_and_pruned(bucket, tmp_path):
    store = Store.open_or_create(join(bucket, "nightly"))
    publish_first(store, tmp_path, TEXTS)
    version = publish_night(store, {"d3": "other text"}, ["d5"])
    expected = {**TEXTS, "d3": "other text"}
    del expected["d5"]
    assert texts_of(version) == texts_of(store.version()) == expected
    assert verify_store(store) == []
    with store.take_lease("test") as lease:
        store.rollback(lease)
        assert texts_of(store.version()) == TEXTS
        store.publish(2, lease)
        assert store.prune(lease, keep=1) == [1]
    assert verify_store(store) == []
    remove_files([store.version().path("scores.json")])
    assert len(verify_store(store)) == 1


def test_an_address_may_name_its_server(bucket, tmp_path):
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    uri = f"{bucket}/named?endpoint_override={endpoint}&scheme=http"
    store = Store.open_or_create(uri)
    publish_first(store, tmp_path, numbered(range(4)))
    assert Store.open(uri).version().count() == 4
    assert Store.open(join(bucket, "named")).version().count() == 4


def test_a_crash_on_s3_is_cleaned_up(bucket, tmp_path):
    store = Store.open_or_create(join(bucket, "crash"))
    publish_first(store, tmp_path, TEXTS)
    before = {n for n in list_files(store.uri) if not volatile(n)}
    with store.take_lease("test") as lease:
        change(store.begin(lease), {"d3": "other text"}, ["d5"])
    write_bytes(join(store.uri, "versions/2/scores.json"), b"{}")
    with store.take_lease("test") as lease:
        store.clean(lease)
    assert {n for n in list_files(store.uri) if not volatile(n)} == before
    assert texts_of(store.version()) == TEXTS


@pytest.fixture
def with_capitals(store):
    """A store with kept columns that have capitals and a blank."""
    kept = {name: pa.string() for name in ("Label", "label", "Topic Name")}
    schema = document_schema(pa.string(), kept, DIMENSION, pa.float32(), ENCODER.fingerprint)
    table = table_of(numbered(range(6)))
    for name in ("Label", "Topic Name"):
        values = pa.array(["Label" if n == 5 else "ab"[n % 2] for n in range(6)])
        table = table.append_column(name, values)
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        candidate.upsert(table.to_batches(), schema=schema, when=when(0))
        store.publish(candidate.seal(counts={}, scores={}).number, lease)
    return store.version()


@pytest.mark.parametrize(
    ("filter", "count"),
    [
        ("\"Label\" = 'a'", 3),
        ("Label = 'a'", 3),
        ("`Topic Name` = 'b'", 2),
        ("\"Topic Name\" = 'b' AND label = 'first'", 2),
        ("\"Label\" = 'Label'", 1),
        ("label = 'say \"Label\"' OR Label = 'it''s'", 0),
    ],
)
def test_a_filter_names_columns_with_capitals_and_blanks(with_capitals, filter, count):
    assert with_capitals.count(filter) == count
    assert len(with_capitals.search(vector_of("x"), 9, filter=filter)) == count


def test_a_name_that_is_no_column_is_told_with_the_spelling_of_all(with_capitals):
    with pytest.raises(InputError, match='"Topic" is no column, and text stands in single') as told:
        with_capitals.count("\"Topic\" = 'b'")
    assert "id, text, `Label`, label, `Topic Name`" in str(told.value)
    for read in (with_capitals.count, lambda filter: list(with_capitals.batches(filter=filter))):
        with pytest.raises(InputError, match="No field named color"):
            read("color = 'red'")


def test_a_name_with_a_dot_cannot_be_kept():
    with pytest.raises(InputError, match=r"'meta\.lang'.*keep 'meta' whole"):
        document_schema(pa.string(), {"meta.lang": pa.string()}, 4, pa.float32(), "f")


def test_all_versions_are_listed_from_their_records_alone(published, monkeypatch):
    publish_night(published, {"d1": "text of another night"})
    monkeypatch.setattr(store_module, "_open", None)
    assert [v.record.counts["documents"] for v in published.versions()] == [40, 40]
