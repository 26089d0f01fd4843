"""Nights over a corpus that brings its vectors along: nothing is embedded, nothing is stale."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import centroids_of, night, rows_of, text_of
from trivial_workers import tokens_of, topic_vector_of

from pipelines.embedding import job as embed
from pipelines.encoder.description import EncoderDescription
from pipelines.nightly.config import NightConfig
from pipelines.nightly.job import reindex
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import read_run
from pipelines.store.config import EditConfig
from pipelines.store.edits import edit_store
from pipelines.store.search import embed_query, find_document
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_model")
COUNT, WIDTH = 60, 64
TEXTS = {n: text_of(n) for n in range(COUNT)}


@pytest.fixture(autouse=True)
def no_encoder(monkeypatch):
    """Whoever encodes a text fails."""
    monkeypatch.setattr(embed, "WORKERS", None)


def vectors_of(texts):
    return {n: topic_vector_of(tokens_of(text)) for n, text in texts.items()}


def write(folder, texts, vectors, kind=None):
    folder.mkdir(exist_ok=True)
    kind = kind or pa.list_(pa.float32())
    values = [None if vectors[n] is None else list(vectors[n]) for n in texts]
    table = pa.table({"id": list(texts), "text": list(texts.values()), "v": pa.array(values, kind)})
    pq.write_table(table, folder / "part.parquet", row_group_size=25)


def run(tmp_path, **settings):
    given = {
        "vector_column": "v",
        "vectors_of": "paid-for",
        "num_clusters": "5",
        "map_documents": 9,
    }
    config = NightConfig(
        corpus=str(tmp_path / "corpus"), store=str(tmp_path / "store"), **{**given, **settings}
    )
    return reindex(config)


def counts_of(tmp_path):
    return read_run(str(tmp_path / "store" / "_work"))["counts"]


def check(tmp_path, texts, vectors):
    rows = rows_of(tmp_path / "store")
    assert {n: row["text"] for n, row in rows.items()} == texts
    for n, row in rows.items():
        assert np.array_equal(row["embedding"], np.asarray(vectors[n], np.float32))
    assert verify_store(Store.open(str(tmp_path / "store"))) == []
    return rows


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32()), pa.list_(pa.float64(), WIDTH), pa.large_list(pa.float64())],
    ids=str,
)
def test_vectors_of_a_column_are_stored_as_they_are(tmp_path, kind):
    vectors = vectors_of(TEXTS)
    write(tmp_path / "corpus", TEXTS, vectors, kind)
    assert not run(tmp_path).refusals
    check(tmp_path, TEXTS, vectors)
    assert counts_of(tmp_path)["embedded"] == 0
    assert "nothing changed" in run(tmp_path).summary


def test_where_nothing_changed_no_row_is_read(tmp_path, monkeypatch):
    vectors = vectors_of(TEXTS)
    write(tmp_path / "corpus", TEXTS, vectors)
    os.utime(tmp_path / "corpus" / "part.parquet", (1_700_000_000, 1_700_000_000))
    assert not run(tmp_path).refusals
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.nightly.job.find_changes", None)
        assert "nothing changed" in run(tmp_path).summary
    assert counts_of(tmp_path)["unchanged"] == COUNT
    write(tmp_path / "corpus", TEXTS, vectors_of(TEXTS | {3: text_of(4)}))
    assert not run(tmp_path).refusals
    assert counts_of(tmp_path)["changed"] == 1


def test_vectors_come_from_json_lines_and_csv_too(tmp_path):
    vectors = {n: [float(f"{x:.3f}") for x in v] for n, v in vectors_of(TEXTS).items()}
    (tmp_path / "corpus").mkdir()
    vectors = {f"d{n}": vector for n, vector in vectors.items()}
    texts = {f"d{n}": text for n, text in TEXTS.items()}
    rows = [{"id": n, "text": texts[n], "v": vectors[n]} for n in texts]
    lines = [json.dumps(row) for row in rows[:30]]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines) + "\n")
    cells = [f'{row["id"]},{row["text"]},"{row["v"]}"' for row in rows[30:]]
    (tmp_path / "corpus" / "b.csv").write_text("id,text,v\n" + "\n".join(cells) + "\n")
    assert not run(tmp_path).refusals
    check(tmp_path, texts, vectors)


SPARK = {"type": 1, "size": None, "indices": None, "values": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (
            pa.ExtensionArray.from_storage(
                pa.fixed_shape_tensor(pa.float32(), [2, 2]),
                pa.array([[1.0, 2.0, 3.0, 4.0]], pa.list_(pa.float32(), 4)),
            ),
            r"tensors of shape \(2, 2\)",
        ),
        (pa.array([b"1234"]), r"is binary; .* --vector-column"),
        (pa.array([[True]]), r"is list<item: bool>; .* --vector-column"),
        (pa.array([SPARK]), "Spark's VectorUDT; .* vector_to_array"),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_column_of_what_is_no_vector_is_refused(tmp_path, column, says, form):
    table = pa.table({"id": [1], "text": ["a"], "v": column})
    (tmp_path / "corpus").mkdir()
    if form == "parquet":
        pq.write_table(table, tmp_path / "corpus" / "a.parquet")
    else:
        with pa.ipc.new_file(str(tmp_path / "corpus" / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match=says):
        run(tmp_path)


def test_another_vector_of_the_same_text_is_a_change(tmp_path):
    texts, vectors = dict(TEXTS), vectors_of(TEXTS)
    write(tmp_path / "corpus", texts, vectors)
    run(tmp_path)
    vectors[7] = np.roll(vectors[7], 1)
    vectors[8] = -vectors[8]
    texts[9] = "aaa another text, the same vector"
    del texts[10]
    texts[100] = texts[11]
    vectors[100] = vectors[3]
    write(tmp_path / "corpus", texts, vectors)
    before = rows_of(tmp_path / "store")
    assert not run(tmp_path, max_drift=1.0).refusals
    counts = counts_of(tmp_path)
    assert (counts["new"], counts["changed"], counts["deleted"]) == (1, 3, 1)
    assert (counts["unchanged"], counts["embedded"]) == (COUNT - 4, 0)
    rows = check(tmp_path, texts, vectors)
    assert rows[7]["last_changed"] > before[7]["last_changed"]
    assert rows[7]["first_seen"] == before[7]["first_seen"]
    assert rows[20]["last_changed"] == before[20]["last_changed"]


@pytest.mark.parametrize("float16", [False, True])
def test_another_vector_is_a_change_where_all_documents_are_written_too(tmp_path, float16):
    vectors = vectors_of(TEXTS)
    write(tmp_path / "corpus", TEXTS, vectors)
    run(tmp_path)
    before = rows_of(tmp_path / "store")
    vectors[7] = np.roll(vectors[7], 1)
    write(tmp_path / "corpus", TEXTS, vectors)
    path = tmp_path / "corpus" / "part.parquet"
    pq.write_table(pq.read_table(path).append_column("date", pa.array(range(COUNT))), path)
    assert not run(tmp_path, keep_columns=("date",), float16=float16).refusals
    assert counts_of(tmp_path)["changed"] == 1
    rows = rows_of(tmp_path / "store")
    changed = [n for n in rows if rows[n]["last_changed"] > before[n]["last_changed"]]
    assert changed == [7]
    assert [row["first_seen"] for row in rows.values()] == [before[n]["first_seen"] for n in rows]


def test_by_cosine_centroids_that_a_night_adds_have_length_one_too(tmp_path):
    write(tmp_path / "corpus", TEXTS, {n: 10 * v for n, v in vectors_of(TEXTS).items()})
    run(tmp_path, metric="cosine")
    edit_store(EditConfig(store=str(tmp_path / "store"), split=0))
    texts = TEXTS | {1000 + n: text_of(n, "q") for n in range(30)}
    write(tmp_path / "corpus", texts, {n: 10 * v for n, v in vectors_of(texts).items()})
    assign = {"metric": "cosine", "clusters": "assign", "novel_documents": 10}
    assert not run(tmp_path, accept=("novel", "score"), **assign).refusals
    rows, centroids = rows_of(tmp_path / "store"), centroids_of(tmp_path / "store")
    (born,) = {rows[1000 + n]["cluster_id"] for n in range(30)}
    assert {row["cluster_id"] for n, row in rows.items() if n < COUNT} == centroids.keys() - {born}
    assert len(centroids) == 7
    assert np.linalg.norm(list(centroids.values()), axis=1) == pytest.approx(1, abs=1e-5)


def test_documents_of_one_text_keep_their_own_vectors(tmp_path):
    texts = TEXTS | dict.fromkeys((70, 71, 72), "aaa one text")
    vectors = vectors_of(texts)
    vectors[71] = np.roll(vectors[71], 3)
    write(tmp_path / "corpus", texts, vectors)
    assert not run(tmp_path).refusals
    check(tmp_path, texts, vectors)


def test_rows_without_a_usable_vector_are_rejected_with_the_reason(tmp_path):
    vectors = vectors_of(TEXTS)
    vectors[1] = None
    vectors[2] = vectors[2][:10]
    vectors[3] = np.full(WIDTH, np.nan)
    vectors[4] = np.full(WIDTH, np.inf)
    vectors[5] = np.full(WIDTH, 1e30)
    write(tmp_path / "corpus", TEXTS, vectors)
    assert not run(tmp_path).refusals
    kept = {n: text for n, text in TEXTS.items() if n not in (1, 2, 3, 4, 5)}
    check(tmp_path, kept, vectors)
    version = Store.open(str(tmp_path / "store")).version()
    name = next(n for n in version.artifacts() if n.startswith("rejected/"))
    rejected = pq.read_table(pa.BufferReader(version.read(name))).to_pylist()
    assert {row["id"]: row["reason"] for row in rejected} == {
        "1": "it has no vector",
        "2": "its vector has 10 numbers, not 64",
        "3": "its vector is not finite",
        "4": "its vector is not finite",
        "5": "its vector is longer than 1e+18",
    }


def test_a_zero_vector_is_stored_but_not_found_and_by_cosine_rejected(tmp_path):
    vectors = vectors_of(TEXTS)
    vectors[7] = np.zeros(WIDTH)
    write(tmp_path / "corpus", TEXTS, vectors)
    os.utime(tmp_path / "corpus" / "part.parquet", (1_700_000_000, 1_700_000_000))
    assert not run(tmp_path).refusals
    check(tmp_path, TEXTS, vectors)
    version = Store.open(str(tmp_path / "store")).version()
    with pytest.raises(InputError, match="document '7' of version 1 has a vector of zeros"):
        find_document(version, "7")
    assert not run(tmp_path, metric="cosine", max_drift=1.0).refusals
    check(tmp_path, {n: text for n, text in TEXTS.items() if n != 7}, vectors)
    assert counts_of(tmp_path)["rejected"] == 1
    version = Store.open(str(tmp_path / "store")).version()
    name = next(n for n in version.artifacts() if n.startswith("rejected/"))
    rejected = pq.read_table(pa.BufferReader(version.read(name))).to_pylist()
    said = {row["id"]: row["reason"] for row in rejected}
    assert said == {"7": "its vector is zero, so it has no direction"}
    assert "nothing changed" in run(tmp_path, metric="cosine").summary


def test_the_store_decides_the_width_of_the_next_nights(tmp_path):
    vectors = vectors_of(TEXTS)
    write(tmp_path / "corpus", TEXTS, vectors)
    run(tmp_path)
    short = {n: vector[:32] for n, vector in vectors.items()}
    write(tmp_path / "corpus", TEXTS, short)
    with pytest.raises(InputError, match="its vector has 32 numbers, not 64"):
        run(tmp_path)
    check(tmp_path, TEXTS, vectors)


def test_a_killed_night_goes_on(tmp_path, monkeypatch):
    vectors = vectors_of(TEXTS)
    write(tmp_path / "corpus", TEXTS, vectors)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.nightly.changes.write_result", None)
        with pytest.raises(TypeError):
            run(tmp_path, chunk_tokens=10)
    vectors[5] = np.roll(vectors[5], 1)
    write(tmp_path / "corpus", TEXTS, vectors)
    assert not run(tmp_path, chunk_tokens=10).refusals
    check(tmp_path, TEXTS, vectors)


def test_half_precision_is_compared_as_it_is_stored(tmp_path):
    vectors = vectors_of(TEXTS)
    write(tmp_path / "corpus", TEXTS, vectors)
    run(tmp_path, float16=True)
    halves = {n: vector.astype(np.float16) for n, vector in vectors.items()}
    check(tmp_path, TEXTS, halves)
    write(tmp_path / "corpus", TEXTS | {99: "aaa new"}, vectors | {99: vectors[3]})
    assert not run(tmp_path, float16=True).refusals
    counts = counts_of(tmp_path)
    assert (counts["new"], counts["changed"], counts["unchanged"]) == (1, 0, COUNT)


def test_another_name_is_another_encoder(tmp_path):
    write(tmp_path / "corpus", TEXTS, vectors_of(TEXTS))
    run(tmp_path)
    result = run(tmp_path, vectors_of="another")
    assert any(reason.startswith("encoder") for reason in result.refusals)
    assert Store.open(str(tmp_path / "store")).version().number == 1


def test_an_encoder_json_says_whose_they_are_and_embeds_queries(tmp_path, tiny_model_folder):
    from pipelines.encoder.describe import describe_encoder
    from pipelines.encoder.description import EncoderConfig
    from pipelines.encoder.encoder import Encoder

    model = str(tiny_model_folder)
    description = describe_encoder(EncoderConfig(model=model, dtype="float32"), device="cpu")
    description.save(str(tmp_path / "encoder"))
    matrix = Encoder.load(description, device="cpu").encode(list(TEXTS.values()))
    vectors = dict(zip(TEXTS, matrix, strict=True))
    vectors[50] = 3 * vectors[50]
    write(tmp_path / "corpus", TEXTS, vectors)
    assert not run(tmp_path, vectors_of=str(tmp_path / "encoder" / "encoder.json")).refusals
    kept = {n: text for n, text in TEXTS.items() if n != 50}
    check(tmp_path, kept, vectors)
    version = Store.open(str(tmp_path / "store")).version()
    assert version.record.fingerprint == description.fingerprint
    found = embed_query(version, TEXTS[4])
    assert version.search(found, 1)["id"].to_pylist() == [4]


def test_a_name_embeds_no_query_and_says_so(tmp_path):
    write(tmp_path / "corpus", TEXTS, vectors_of(TEXTS))
    run(tmp_path)
    version = Store.open(str(tmp_path / "store")).version()
    with pytest.raises(InputError, match="'paid-for' were made elsewhere"):
        embed_query(version, "a text")


def test_files_of_another_encoder_are_refused(tmp_path):
    write(tmp_path / "corpus", TEXTS, vectors_of(TEXTS))
    path = tmp_path / "corpus" / "part.parquet"
    told = pq.read_table(path).replace_schema_metadata({"shoal.encoder_fingerprint": "f" * 64})
    pq.write_table(told, path)
    with pytest.raises(InputError, match="says that its vectors are of encoder ffffffffffff"):
        run(tmp_path)


def test_vectors_need_ids_of_their_own(tmp_path):
    (tmp_path / "corpus").mkdir()
    vectors = [list(v) for v in vectors_of(TEXTS).values()]
    table = pa.table({"text": list(TEXTS.values()), "v": vectors})
    pq.write_table(table, tmp_path / "corpus" / "part.parquet")
    with pytest.raises(InputError, match="it has no id, which documents with vectors"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"vectors_of": ""}, "go together"),
        ({"vector_column": ""}, "go together"),
        ({"prompt": "none"}, "--prompt has no effect with --vector-column"),
        ({"keep_columns": ("v",)}, "also text, id or a kept column"),
        ({"vector_column": "nothing"}, "nothing"),
        ({"vectors_of": "no/such/encoder.json"}, "holds no encoder.json"),
    ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, flags, says):
    write(tmp_path / "corpus", TEXTS, vectors_of(TEXTS))
    with pytest.raises(InputError, match=says):
        run(tmp_path, **flags)


def test_a_dry_run_counts_the_vectors_to_take(tmp_path):
    write(tmp_path / "corpus", TEXTS, vectors_of(TEXTS))
    result = run(tmp_path, dry_run=True)
    assert result.summary["vectors to take"] == str(COUNT)
    assert not (tmp_path / "store").exists()


def test_a_model_may_follow_in_the_same_store(tmp_path, tiny_model_folder, monkeypatch):
    from nights import WORKERS

    write(tmp_path / "corpus", TEXTS, vectors_of(TEXTS))
    run(tmp_path)
    monkeypatch.setattr(embed, "WORKERS", WORKERS)
    corpus = str(tmp_path / "corpus")
    result = night(corpus, tmp_path / "store", tiny_model_folder, accept=("encoder", "drift"))
    assert not result.refusals
    assert counts_of(tmp_path)["embedded"] == COUNT


def test_names_of_other_widths_are_other_encoders():
    one, other = EncoderDescription.elsewhere("a", 3), EncoderDescription.elsewhere("a", 4)
    assert one.fingerprint != other.fingerprint != EncoderDescription.elsewhere("b", 4).fingerprint
    assert EncoderDescription.from_json(json.loads(json.dumps(one.to_json()))) == one
