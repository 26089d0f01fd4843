"""Nights over documents that are cut: what is embedded, deleted and refused."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import night, prompt_of, rows_of, write_corpus
from trivial_workers import tokens_of, topic_vector_of

from pipelines.corpus.passages import PassageOptions, cut_texts
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import read_run
from pipelines.store.compare import Side, compare, summary_rows
from pipelines.store.config import EditConfig
from pipelines.store.edits import edit_store, read_edits
from pipelines.store.manage import export
from pipelines.store.records import put_artifact
from pipelines.store.store import Store
from pipelines.store.verify import verify_store, verify_version
from pipelines.store.version import Version

pytestmark = pytest.mark.usefixtures("no_model")
HOW = {"passages": "sentences:16", "num_clusters": "3", "label_column": None, "max_deleted": 1.0}


def sentence(number: int, place: int, version: int = 0) -> str:
    return f"{'ABCDE'[(number + place) % 5]}bc {number} {place} {version}."


def text_of(number: int, places=range(4)) -> str:
    return " ".join(sentence(number, place) for place in places)


TEXTS = {n: text_of(n) for n in range(12)} | {12: "Short."}


def counts_of(store) -> dict[str, int]:
    return {k: v for k, v in read_run(f"{store}/_work")["counts"].items() if v}


def check(store, texts, model, number=None) -> dict:
    """A version holds the passages of exactly these texts, each with its vector."""
    reader = PromptedTokenizer.load(EncoderConfig(model=str(model), prompt="one-word"))
    version = Store.open(str(store)).version(number)
    settings = json.loads(version.read("run.json"))["config"]
    cuts = PassageOptions(settings["passages"], settings["passage_overlap"]).cuts(256)
    expected = {}
    for row_id, text in texts.items():
        for place, (start, stop) in enumerate(cut_texts([text], cuts, reader)[0].tolist()):
            expected[f"{row_id}#{place}"] = (row_id, place, start, stop, text[start:stop])
    rows = rows_of(store, number)
    names = ("document_id", "passage", "start", "stop", "text")
    assert {i: tuple(row[n] for n in names) for i, row in rows.items()} == expected
    prompt = prompt_of(store, number)
    for row in rows.values():
        assert np.array_equal(row["embedding"], topic_vector_of(tokens_of(row["text"]), prompt))
    assert verify_store(Store.open(str(store))) == []
    counts = version.record.counts
    assert (counts["documents"], counts["passages"]) == (len(texts), len(expected))
    check_roll_up(pq.read_table(version.path("documents.parquet")), rows)
    return rows


def parquet_of(table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def check_roll_up(table, rows) -> None:
    """Every document with the clusters of its passages, that of most of them first."""
    found = {row.pop("document_id"): row for row in table.to_pylist()}
    clusters: dict = {}
    for row in rows.values():
        clusters.setdefault(row["document_id"], Counter())[row["cluster_id"]] += 1
    assert len(table) == len(found)
    assert found.keys() == clusters.keys()
    for row_id, counts in clusters.items():
        document, total = found[row_id], counts.total()
        assert document["passages"] == total
        assert document["shares"] == [n / total for _, n in counts.most_common()]
        places, shares = document["cluster_ids"], document["shares"]
        assert [counts[place] / total for place in places] == shares
        assert (document["cluster_id"], document["share"]) == (places[0], shares[0])


def write_lines(folder, texts) -> str:
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"id": i, "text": text}) for i, text in texts.items())
    (folder / "part.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(params=[write_corpus, write_lines], ids=["parquet", "jsonl"])
def cut_night(request, tmp_path, tiny_model_folder):
    def run(texts, **settings):
        corpus = request.param(tmp_path / "corpus", texts)
        return night(corpus, tmp_path / "store", tiny_model_folder, **{**HOW, **settings})

    return run


def test_a_night_embeds_only_the_passages_whose_text_changed(
    cut_night, tmp_path, tiny_model_folder
):
    store = tmp_path / "store"
    cut_night(TEXTS)
    rows = check(store, TEXTS, tiny_model_folder)
    first = counts_of(store)
    assert (first["documents"], first["passages"]) == (13, len(rows)) == (13, 4 * 12 + 1)
    assert "nothing changed" in cut_night(TEXTS).summary

    texts = dict(TEXTS)
    texts[3] = texts[3].replace(sentence(3, 2), sentence(3, 2, version=1))  # as long as before
    texts[4] = text_of(4, (0, 1))  # shrinks
    texts[5] = "A new one for 5. " + texts[5]  # what comes after has other numbers and places
    texts[6] = texts[6].replace(sentence(6, 0), "Abc 6 0 longer.")  # and here other places
    del texts[7]
    assert not cut_night(texts).refusals
    check(store, texts, tiny_model_folder)
    counts = counts_of(store)
    assert (counts["embedded"], counts["deleted"]) == (3, 2 + 4)
    assert (counts["documents"], counts["passages"]) == (12, 9 * 4 + 2 + 5 + 1)
    assert (counts["reused"], counts["retouched"]) == (4, 3)


def test_a_roll_up_knows_pins_is_exported_and_verified(cut_night, tmp_path, tiny_model_folder):
    store, out = str(tmp_path / "store"), tmp_path / "out"
    cut_night(TEXTS)
    rows = check(store, TEXTS, tiny_model_folder)
    other = next(c for r in rows.values() if (c := r["cluster_id"]) != rows["3#0"]["cluster_id"])
    with pytest.raises(InputError, match="the documents' ids are integers"):
        edit_store(EditConfig(store=store, pin=("3#0", other)))
    edit_store(EditConfig(store=store, pin=("3", other)))
    cut_night(TEXTS, max_drift=1.0)
    rows = check(store, TEXTS, tiny_model_folder, 2)
    assert {rows[f"3#{n}"]["cluster_id"] for n in range(4)} == {other}
    sides = (Side.of(Store.open(store).version(number)) for number in (1, 2))
    compared = compare(*sides, sample=0, seed=0)
    assert compared["moved"]["reasons"]["edit"] > 0
    assert ["passages", "49", "49"] in summary_rows(compared)
    version = Store.open(store).version(2)
    export(version, str(out), "parquet")
    check_roll_up(pq.read_table(out / "documents.parquet"), rows)
    table = pq.read_table(out / "documents.parquet").slice(1)
    fewer = replace(
        version.record,
        artifacts={
            "documents.parquet": put_artifact(store, 2, "documents.parquet", parquet_of(table))
        },
    )
    problems = verify_version(Version(store, fewer))
    assert [p for p in problems if "documents.parquet" in p] == [
        "documents.parquet has 12 documents of 45 passages, the version 13 of 49"
    ]


def test_a_pinned_document_keeps_its_cluster_however_it_is_cut(cut_night, tmp_path):
    store = str(tmp_path / "store")
    cut_night(TEXTS)
    clusters = {row["cluster_id"] for row in rows_of(store).values()}
    for cluster in sorted(clusters)[:2]:
        edit_store(EditConfig(store=store, pin=("4", cluster)))
        cut_night(TEXTS | {4: "A new one for 4. " + TEXTS[4]}, max_drift=1.0)
        rows = [row for row in rows_of(store).values() if row["document_id"] == 4]
        assert len(rows) == 5
        assert {row["cluster_id"] for row in rows} == {cluster}
        assert verify_store(Store.open(store)) == []
        edit_store(EditConfig(store=store, undo=len(read_edits(store))))


def test_rejected_documents_are_told_one_by_one(tmp_path, tiny_model_folder):
    store = tmp_path / "store"
    lines = [
        {"id": "a", "text": text_of(1)},
        {"id": "a", "text": text_of(2, range(6))},
        {"id": "b", "text": " "},
        {"id": "c", "text": text_of(1)},
        {"id": "a#1", "text": text_of(3)},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    night(str(tmp_path / "c.jsonl"), store, tiny_model_folder, **HOW, max_rejected_fraction=1.0)
    check(store, {"a": text_of(1), "c": text_of(1), "a#1": text_of(3)}, tiny_model_folder)
    counts = counts_of(store)
    assert (counts["rejected"], counts["embedded"], counts["passages"]) == (2, 8, 12)


@pytest.mark.parametrize(
    "other", [{"passages": ""}, {"passages": "sentences:20"}, {"passages": "tokens:16"}]
)
def test_a_store_of_other_passages_is_refused(cut_night, other):
    cut_night(TEXTS)
    with pytest.raises(InputError, match="holds passages of sentences:16, and this night asks for"):
        cut_night(TEXTS, **other)


def test_a_store_of_whole_documents_takes_no_passages(tonight):
    with pytest.raises(InputError, match=r"holds whole documents, and .* passages of tokens:20"):
        tonight({1: "Abc"}, passages="tokens:20")
