"""Questions to a store, with a real (tiny) encoder."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import SENTENCES
from tiny_stores import table_of, when

from pipelines.encoder.encoder import Encoder, EncoderConfig
from pipelines.runtime.command import run_query
from pipelines.store.columns import document_schema
from pipelines.store.config import SearchConfig
from pipelines.store.index import fuse
from pipelines.store.manage import export
from pipelines.store.search import search_store
from pipelines.store.store import Store

LABELS = ["animal", "method", "science", "sport", "money", "kitchen", "law", "music"]


SERIAL = "sn" + "0123456789abcdef" * 3


@pytest.fixture(scope="module")
def encoder(tiny_model_folder):
    return Encoder.load(EncoderConfig(model=str(tiny_model_folder), dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def store(encoder, tmp_path_factory):
    """Eight sentences with the vectors of a tiny model."""
    store = Store.open_or_create(str(tmp_path_factory.mktemp("search") / "store"))
    vectors = encoder.encode(SENTENCES)
    schema = document_schema(
        pa.int64(), {"label": pa.string()}, encoder.dimension, pa.float32(), encoder.fingerprint
    )
    table = pa.table(
        {
            "id": range(8),
            "text": SENTENCES,
            "label": LABELS,
            "text_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in SENTENCES],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.ravel()), encoder.dimension
            ),
        }
    )
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        candidate.upsert(table.to_batches(), schema=schema, when=when(0))
        candidate.put("encoder.json", json.dumps(encoder.description.to_json()).encode())
        store.publish(candidate.seal(counts={}, scores={}).number, lease)
    return store


@pytest.fixture
def search(store, monkeypatch, capsys):
    """Asks; (exit code, stdout, stderr)."""

    def run(*flags, uri=store.uri):
        arguments = ["search_store.py", "--store", uri, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            run_query("search_store", SearchConfig, search_store)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_a_text_finds_the_document_of_that_text_first(search):
    code, out, err = search("--query", SENTENCES[3], "--limit", 3, "--json")
    assert code == 0
    assert "version 1, 3 hits" in err
    hits = json.loads(out)
    assert len(hits) == 3
    assert hits[0]["id"] == 3
    assert hits[0]["text"] == SENTENCES[3]
    assert hits[0]["label"] == "sport"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)
    assert "embedding" not in hits[0]


def test_people_see_a_table_of_scores_and_texts(search):
    code, out, _ = search("--query", SENTENCES[3], "--limit", 2)
    assert code == 0
    assert "1.0000" in out
    assert "The goalkeeper saved two penalties" in out


def test_a_filter_leaves_only_what_satisfies_it(search):
    hits = json.loads(
        search("--query", SENTENCES[3], "--filter", "label IN ('law', 'music')", "--json")[1]
    )
    assert sorted(hit["label"] for hit in hits) == ["law", "music"]


def test_similar_to_a_document_does_not_find_the_document(search):
    hits = json.loads(search("--similar-to", 3, "--limit", 20, "--json")[1])
    assert sorted(hit["id"] for hit in hits) == [0, 1, 2, 4, 5, 6, 7]


def test_exact_search_answers_alike(search):
    first = json.loads(search("--query", "two eggs", "--json")[1])
    second = json.loads(search("--query", "two eggs", "--exact", "--json")[1])
    assert [h["id"] for h in first] == [h["id"] for h in second]


def test_a_prompt_for_questions_changes_the_querys_vector(search):
    plain = json.loads(search("--query", "two eggs", "--json")[1])
    asked = json.loads(
        search("--query", "two eggs", "--query-prompt", "Which recipe has {text}?", "--json")[1]
    )
    assert [h["score"] for h in plain] != [h["score"] for h in asked]


def test_the_query_prompt_comes_from_the_store(search, store, encoder, tmp_path):
    shutil.copytree(store.uri, tmp_path / "store")
    prompt = "Which recipe has {text}?"
    own = Store.open(str(tmp_path / "store"))
    with own.take_lease("test") as lease:
        candidate = own.begin(lease)
        described = replace(encoder.description, query_prompt=prompt).to_json()
        candidate.put("encoder.json", json.dumps(described).encode())
        own.publish(candidate.seal(counts={}, scores={}).number, lease)
    asked = search("--query", "two eggs", "--json", uri=own.uri)[1]
    assert asked == search("--query", "two eggs", "--query-prompt", prompt, "--json")[1]
    assert asked != search("--query", "two eggs", "--json")[1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "search takes --query TEXT or --similar-to ID"),
        (("--query", "  "), "search takes --query TEXT or --similar-to ID"),
        (("--query", "a", "--similar-to", "3"), "one of them"),
        (("--similar-to", "99"), "has no document with id '99'"),
        (("--similar-to", "x"), "the store's ids are integers"),
        (("--query", "a", "--limit", "0"), "--limit is 0"),
        (("--query", "a", "--filter", "colour = 'red'"), "No field named colour"),
        (("--query", "a", "--version", "7"), "has no version 7"),
        (("--similar-to", "3", "--query-prompt", "{text}"), "has no effect without --query"),
    ],
)
def test_a_mistake_is_one_clear_line(search, flags, told):
    code, _, err = search(*flags)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert told in lines[0]


def test_vectors_made_elsewhere_are_searched_by_document_only(search, tmp_path):
    other = Store.open_or_create(str(tmp_path / "store"))
    with other.take_lease("test") as lease:
        candidate = other.begin(lease)
        schema = document_schema(pa.string(), {}, 16, pa.float32(), "")
        candidate.upsert(table_of({"a": "b", "c": "d"}).to_batches(), schema=schema, when=when(0))
        other.publish(candidate.seal(counts={}, scores={}).number, lease)
    assert search("--similar-to", "a", uri=other.uri)[0] == 0
    code, _, err = search("--query", "b", uri=other.uri)
    assert code == 2
    assert "has no encoder.json" in err


@pytest.fixture(scope="module")
def worded(encoder, tmp_path_factory):
    """The same with an index of words; later changes are in it too."""
    store = Store.open_or_create(str(tmp_path_factory.mktemp("words") / "store"))
    schema = document_schema(
        pa.string(), {"label": pa.string()}, encoder.dimension, pa.float32(), encoder.fingerprint
    )
    sentences = {f"d{n}": text for n, text in enumerate(SENTENCES)}
    later = {
        "d3": "invoice 4711 of Müller", "d9": "東京タワーの夜景",
        "w0": "The Who", "w1": f"serial {SERIAL}", "w2": "RÉSUMÉ of a judge",
    }  # fmt: skip
    for night, texts in enumerate((sentences, later)):
        table = table_of(texts, schema)
        flat = pa.array(encoder.encode(list(texts.values())).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, encoder.dimension)
        table = table.set_column(4, "embedding", vectors)
        with store.take_lease("test") as lease:
            candidate = store.begin(lease)
            candidate.upsert(table.to_batches(), schema=schema, when=when(night))
            candidate.put("encoder.json", json.dumps(encoder.description.to_json()).encode())
            names = pa.table({"cluster_id": [None], "name": ["All of it"]})
            candidate.put_table("clusters.parquet", names)
            candidate.update_index(full_text=night == 0)
            store.publish(candidate.seal(counts={}, scores={}).number, lease)
    return store


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("4711", "d3"), ("東京", "d9"), ("müller", "d3"), ("muller", "d3"), ("the who", "w0"),
        (SERIAL, "w1"), ("resume", "w2"), ("résumé", "w2"),
    ],
)  # fmt: skip
def test_hybrid_search_finds_what_only_its_words_say(search, worded, query, first):
    code, out, _ = search("--query", query, "--hybrid", "--json", "--limit", 4, uri=worded.uri)
    hits = json.loads(out)
    assert code == 0
    assert first in {hit["id"] for hit in hits[:2]}
    assert len(hits) == 4
    assert hits == sorted(hits, key=lambda hit: -hit["score"])
    flags = ("--hybrid", "--json", "--filter", f"id <> '{first}'")
    out = search("--query", query, *flags, uri=worded.uri)[1]
    assert first not in {hit["id"] for hit in json.loads(out)}


def test_rankings_are_joined_by_reciprocal_ranks():
    fused = fuse([["a", "b", "c"], ["c", "d"]], 3)
    assert [row_id for row_id, _ in fused] == ["c", "a", "b"]
    assert fused[0][1] == pytest.approx(1 / 63 + 1 / 61)


def test_hybrid_search_needs_an_index_of_words(search):
    code, _, err = search("--query", "law", "--hybrid")
    assert (code, "a night with --full-text makes one" in err) == (2, True)


def test_hits_are_put_together_by_cluster(search, worded):
    flags = ("--query", SENTENCES[2], "--group-by", "cluster", "--limit", 3)
    (group,) = json.loads(search(*flags, "--json", uri=worded.uri)[1])
    assert (group["name"], len(group["hits"])) == ("All of it", 3)
    assert "All of it" in search(*flags, uri=worded.uri)[1]


def test_hybrid_hits_that_pass_a_filter_are_put_together_by_cluster(search, worded):
    flags = ("--query", "the invoice of Müller", "--hybrid", "--group-by", "cluster", "--json")
    condition = "label <> 'The' AND `first_seen` < `last_changed` OR \"label\" = 'invoice'"
    (group,) = json.loads(search(*flags, "--filter", condition, uri=worded.uri)[1])
    assert [hit["id"] for hit in group["hits"]] == ["d3"]
    (group,) = json.loads(search(*flags, "--filter", "label <> 'invoice'", uri=worded.uri)[1])
    found = [hit["id"] for hit in group["hits"]]
    assert "d3" not in found
    assert len(found) == len({*found}) == 10
    assert json.loads(search(*flags, "--filter", "label = 'nosuch'", uri=worded.uri)[1]) == []


@pytest.fixture(scope="module")
def passages(encoder, tmp_path_factory):
    """Each of four sentences twice, as passages of one document."""
    store = Store.open_or_create(str(tmp_path_factory.mktemp("search") / "passages"))
    kinds = {"document_id": pa.int64(), "passage": pa.int32(), "start": pa.int64()}
    schema = document_schema(
        pa.string(),
        kinds | {"stop": pa.int64()},
        encoder.dimension,
        pa.float32(),
        encoder.fingerprint,
    )
    texts = [SENTENCES[n // 2] + "!" * (n % 2) for n in range(8)]
    table = pa.table(
        {
            "id": [f"{n // 2}#{n % 2}" for n in range(8)],
            "text": texts,
            "document_id": pa.array([n // 2 for n in range(8)], pa.int64()),
            "passage": pa.array([n % 2 for n in range(8)], pa.int32()),
            "start": pa.array([100 * (n % 2) for n in range(8)], pa.int64()),
            "stop": pa.array([100 * (n % 2) + 50 for n in range(8)], pa.int64()),
            "text_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(encoder.encode(texts).ravel()), encoder.dimension
            ),
        }
    )
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        candidate.upsert(table.to_batches(), schema=schema, when=when(0))
        candidate.put("encoder.json", json.dumps(encoder.description.to_json()).encode())
        store.publish(candidate.seal(counts={}, scores={}).number, lease)
    return store


def test_a_passage_is_shown_with_its_document(search, passages):
    code, out, _ = search("--query", SENTENCES[1], "--limit", 1, uri=passages.uri)
    assert code == 0
    assert "1, passage 0: 0 to 50" in out
    assert SENTENCES[1] in out


def test_each_document_can_be_given_once(search, passages):
    def hits(*flags):
        return json.loads(search(*flags, "--json", uri=passages.uri)[1])

    query = ("--query", SENTENCES[2], "--limit", 3)
    assert len({hit["document_id"] for hit in hits(*query)}) < 3
    once = hits(*query, "--per-document")
    assert once[0]["document_id"] == 2
    assert len({hit["document_id"] for hit in once}) == 3
    everyone = hits("--query", SENTENCES[2], "--limit", 20, "--per-document")
    assert sorted(hit["document_id"] for hit in everyone) == [0, 1, 2, 3]
    others = hits("--similar-to", "2#0", "--per-document")
    assert sorted(hit["document_id"] for hit in others) == [0, 1, 3]


def test_whole_documents_have_no_passages_to_join(search):
    code, _, error = search("--query", "sea", "--per-document")
    assert code == 2
    assert "holds whole documents, no passages" in error


def test_an_exported_index_says_whose_passages_its_vectors_are(passages, tmp_path):
    export(passages.version(), str(tmp_path / "out"), "faiss")
    rows = pq.read_table(tmp_path / "out" / "ids.parquet").to_pylist()
    assert [row["position"] for row in rows] == list(range(8))
    for row in rows:
        assert row["id"] == f"{row['document_id']}#{row['passage']}"
        assert row["stop"] == row["start"] + 50 == 100 * row["passage"] + 50
