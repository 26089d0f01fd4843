import numpy as np
import pyarrow as pa
import pytest
import tiny_stores
from tiny_stores import (
    DIMENSION,
    SCHEMA,
    change,
    publish_first,
    publish_night,
    table_of,
    vector_of,
    when,
)

from pipelines.store import index as vector_index
from pipelines.store.documents import Documents
from pipelines.store.index import unit
from pipelines.store.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with an index, and no more documents than that takes."""
    folder = tmp_path_factory.mktemp("indexed")
    store = Store.open_or_create(str(folder / "store"))
    publish_first(store, folder, {f"d{i}": f"text {i}" for i in range(vector_index.EXACT_BELOW)})
    return store


def test_few_vectors_are_compared_one_by_one(tmp_path):
    small = Store.open_or_create(str(tmp_path / "store"))
    version = publish_first(small, tmp_path, {f"d{i}": f"text {i}" for i in range(20)})
    assert version.record.index["kind"] == "exact"
    assert version.record.index["recall_at_10"] == 1.0


def test_an_index_finds_nearly_what_exact_search_finds(store):
    version = store.version(1)
    report = version.record.index
    assert report["kind"] == "IVF_SQ"
    assert report["trained"]
    assert report["recall_at_10"] >= 0.95
    queries = [vector_of(f"query {number}") for number in range(40)]
    found = [set(version.search(q, 10)["id"].to_pylist()) for q in queries]
    exact = [set(version.search(q, 10, exact=True)["id"].to_pylist()) for q in queries]
    assert np.mean([len(a & b) / 10 for a, b in zip(found, exact, strict=True)]) >= 0.95


def test_the_measured_recall_is_that_of_the_probes(store):
    documents = store.version(1).documents
    sample = vector_index._answer(documents, np.arange(0, 300, 10))
    for own, vector, least in zip(sample.ids, sample.vectors, sample.least, strict=True):
        exact = documents.nearest(vector, 11, ["id"])
        cosines = [1 - d for i, d in zip(*exact.to_pydict().values(), strict=True) if i != own]
        assert cosines[9] == pytest.approx(least, abs=1e-5)
    assert vector_index._recall(documents, sample, 10**6, 4) >= 0.97


def test_a_night_extends_the_index_and_finds_what_is_new(store):
    version = publish_night(store, {"new": "a new text", "d5": "a changed text"}, ["d6"])
    report = version.record.index
    assert not report["trained"]
    assert report["trained_rows"] == vector_index.EXACT_BELOW
    assert version.documents.index_rows() == (report["rows"], 0)
    assert version.search(vector_of("a new text"), 1)["id"].to_pylist() == ["new"]
    assert version.search(vector_of("a changed text"), 1)["id"].to_pylist() == ["d5"]
    assert "d6" not in version.search(vector_of("text 6"), 5)["id"].to_pylist()
    old = store.version(1).search(vector_of("text 6"), 1)
    assert old["id"].to_pylist() == ["d6"]


def test_a_filter_that_leaves_few_has_more_partitions_searched(store, monkeypatch):
    version, probes = store.version(1), []
    nearest = Documents.nearest
    monkeypatch.setitem(version.record.index, "probes", 1)
    monkeypatch.setattr(
        Documents, "nearest", lambda *a, **k: probes.append(k.get("probes")) or nearest(*a, **k)
    )
    version.search(vector_of("query"), 5)
    version.search(vector_of("query"), 5, filter="id <> 'd3'")
    assert len(version.search(vector_of("query"), 5, filter="id IN ('d3', 'd4')")) == 2
    assert len(version.search(vector_of("query"), 5, filter="id = 'unknown'")) == 0
    version.search(vector_of("query"), 5, filter="id = 'd3'", exact=True)
    assert version.record.index["partitions"] == 2
    assert probes == [1, 2, 2, 2, None]


def test_what_is_new_and_beyond_the_range_of_the_old_is_found(tmp_path, monkeypatch):
    """All numbers of the old vectors are positive, all of the new ones negative."""
    monkeypatch.setattr(
        tiny_stores, "vector_of", lambda text, *a: np.abs(vector_of(text, *a)) * sign_of(text)
    )
    store = Store.open_or_create(str(tmp_path / "store"))
    count = vector_index.EXACT_BELOW
    publish_first(store, tmp_path, {f"d{i}": f"text {i}" for i in range(count)})
    version = publish_night(store, {f"n{i}": f"minus {i}" for i in range(count // 4)}, [])
    queries = [tiny_stores.vector_of(f"minus query {number}") for number in range(40)]
    found = [set(version.search(q, 10)["id"].to_pylist()) for q in queries]
    exact = [set(version.search(q, 10, exact=True)["id"].to_pylist()) for q in queries]
    assert all(name.startswith("n") for names in exact for name in names)
    assert np.mean([len(a & b) / 10 for a, b in zip(found, exact, strict=True)]) >= 0.95
    assert version.record.index["trained"]


def sign_of(text):
    return -1 if text.startswith("minus") else 1


def test_parts_of_an_index_are_joined_before_they_are_many(store):
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        documents = candidate.documents
        for night in range(10):
            rows = {f"n{night}": f"night {night}"}
            change(candidate, rows, night=night)
            documents.extend_index()
            parts = documents._dataset.stats.index_stats("vectors")["num_indices"]
            assert parts <= 9
            assert documents.index_rows()[1] == 0
        store.clean(lease)


def test_an_index_that_has_become_bad_is_trained_anew(store, monkeypatch):
    trainings = []
    recall, train = vector_index._recall, Documents.train_index

    def training(documents):
        trainings.append(1)
        return train(documents)

    monkeypatch.setattr(vector_index, "_recall", lambda *a: recall(*a) if trainings else 0.5)
    monkeypatch.setattr(Documents, "train_index", training)
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        report = candidate.update_index()
        store.clean(lease)
    assert trainings == [1]
    assert report.trained
    assert report.recall_at_10 >= 0.95


def test_an_index_is_trained_anew_when_documents_have_doubled(store, monkeypatch):
    monkeypatch.setattr(vector_index, "_GROWTH", 0.5)
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        report = candidate.update_index()
        store.clean(lease)
    assert report.trained


def test_where_more_partitions_do_not_help_more_hits_are_compared(store, monkeypatch):
    tried = []

    def recall(_documents, _sample, probes, refine):
        tried.append((probes, refine))
        return 0.9 if refine < 16 else 0.97

    monkeypatch.setattr(vector_index, "_recall", recall)
    monkeypatch.setattr(vector_index, "FIRST_PROBES", 1)
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        report = candidate.update_index()
        store.clean(lease)
    assert tried == [(1, 4), (2, 4), (2, 16)]
    assert (report.probes, report.refine, report.recall_at_10) == (2, 16, 0.97)


def test_vectors_of_zeros_have_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_index, "EXACT_BELOW", 512)
    table = table_of({f"d{i}": f"text {i}" for i in range(600)}).drop_columns("embedding")
    zeros = pa.array(np.zeros(600 * DIMENSION, np.float32))
    vectors = pa.FixedSizeListArray.from_arrays(zeros, DIMENSION)
    store = Store.open_or_create(str(tmp_path / "store"))
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        batches = table.append_column("embedding", vectors).to_batches()
        candidate.upsert(batches, schema=SCHEMA, when=when(0))
        assert candidate.update_index().kind == "exact"


def test_equal_vectors_do_not_lower_the_recall(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_index, "EXACT_BELOW", 512)
    store = Store.open_or_create(str(tmp_path / "store"))
    texts = {f"d{i}": f"text {i % 20}" for i in range(600)}
    assert publish_first(store, tmp_path, texts).record.index["recall_at_10"] >= 0.95


def test_unit_scales_rows_and_leaves_zeros():
    found = unit(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert pa.types.is_fixed_size_list(SCHEMA.field("embedding").type)
    assert SCHEMA.field("embedding").type.list_size == DIMENSION


def bm25(texts, words):
    """By id what BM25 says of texts of equally many words, where it says anything."""
    scores: dict[str, float] = {}
    for word in words:
        counts = {i: text.split().count(word) for i, text in texts.items() if word in text.split()}
        rarity = np.log((len(texts) - len(counts) + 0.5) / (len(counts) + 0.5) + 1)
        for row_id, often in counts.items():
            scores[row_id] = scores.get(row_id, 0) + rarity * often * 2.2 / (often + 1.2)
    return scores


def test_words_are_found_as_by_ranking_all_documents_after_any_nights(tmp_path):
    random = np.random.default_rng(0)
    vocabulary = [f"w{n}" for n in range(80)]

    def write(numbers):
        return {f"d{n}": " ".join(random.choice(vocabulary, 12)) for n in numbers}

    store, texts = Store.open_or_create(str(tmp_path / "store")), write(range(600))
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        candidate.upsert(table_of(texts).to_batches(), schema=SCHEMA, when=when(0))
        candidate.update_index(full_text=True)
        store.publish(tiny_stores.finish(candidate).number, lease)
    for night in range(1, 6):
        changed = write(random.integers(0, 700, 50))
        gone = [row_id for row_id in list(texts)[night::60] if row_id not in changed]
        publish_night(store, changed, gone, night)
        texts = {i: text for i, text in (texts | changed).items() if i not in gone}
    documents = store.version().documents
    assert documents.count() == len(texts)
    for words in (random.choice(vocabulary, 3, replace=False).tolist() for _ in range(20)):
        for label in (None, words[0]):
            scores = bm25(texts, words)
            mine = {i: s for i, s in scores.items() if label in (None, texts[i].split()[0])}
            condition = None if label is None else f"label = '{label}'"
            found = vector_index.find_words(documents, " ".join(words), 10, filter=condition)
            best = sorted(mine.values(), reverse=True)[:10]
            assert [mine[row_id] for row_id in found] == pytest.approx(best, rel=0.05)
