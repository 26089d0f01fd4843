"""The job over documents that are cut, with a tiny model: what the rows say, and resuming."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow.dataset as pads
import pytest
from tiny_models import SENTENCES

from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.job import embed_corpus
from pipelines.encoder.encoder import Encoder
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run

pytestmark = pytest.mark.usefixtures("local_ray")
LONG = " ".join(SENTENCES)
ROWS = [
    {"id": 1, "text": LONG, "label": "all"},
    {"id": 2, "text": SENTENCES[0], "label": "one"},
    {"id": 3, "text": f"{LONG} \n", "label": None},
    {"id": 2, "text": LONG, "label": "again"},
    {"id": 4, "text": "  ", "label": "blank"},
    {"id": None, "text": LONG, "label": "no id"},
]


def run(config: EmbedConfig) -> dict:
    record = RunRecord.of("embed_corpus", config, keep_complete=True)
    with record:
        embed_corpus(config, record)
    return read_run(config.output)["counts"]


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_folder):
    folder = tmp_path_factory.mktemp("passages")
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return EmbedConfig(
        corpus=str(folder / "corpus.jsonl"),
        output=str(folder / "out"),
        model=str(tiny_model_folder),
        dtype="float32",
        keep_columns=("text", "label"),
        passages="tokens:40",
        passage_overlap=10,
    )


def test_each_row_is_a_passage_with_the_vector_of_its_text(config):
    counts = run(config)
    table = pads.dataset(f"{config.output}/embeddings").to_table()
    names = ["id", "document_id", "passage", "start", "stop", "text", "label"]
    assert table.column_names == [*names, "text_sha256", "embedding"]
    rows = {row["id"]: row for row in table.to_pylist()}
    documents = {row["id"]: row["text"] for row in ROWS[:3]}
    assert {row["document_id"] for row in rows.values()} == documents.keys()
    for row_id, row in rows.items():
        assert row_id == f"{row['document_id']}#{row['passage']}"
        assert row["text"] == documents[row["document_id"]][row["start"] : row["stop"]]
    assert rows["2#0"]["text"] == SENTENCES[0]
    assert rows["3#1"]["start"] == rows["1#1"]["start"]
    assert rows["3#1"]["embedding"] == rows["1#1"]["embedding"]
    encoder = Encoder.from_folder(config.output, device="cpu")
    vectors = encoder.encode([row["text"] for row in rows.values()])
    found = np.array([row["embedding"] for row in rows.values()], np.float32)
    assert np.abs(vectors - found).max() < 1e-5
    of_long = sum(row["document_id"] == 1 for row in rows.values())
    assert {**counts, "tokens": 0} == {
        "documents": 6, "passages": 2 * of_long + 1, "embedded": of_long + 1, "rejected": 3,
        "duplicates": of_long, "tokens": 0,
    }  # fmt: skip
    lost = pads.dataset(f"{config.output}/rejected").to_table().to_pylist()
    assert sorted((row["id"] or "", row["reason"]) for row in lost) == [
        ("", "id is null"), ("2", "duplicate id"), ("4", "text is empty"),
    ]  # fmt: skip


def test_a_run_with_other_passages_does_not_go_on_with_these(config):
    run(config)
    with pytest.raises(InputError, match="its passage_overlap is 10, this one's is 5"):
        run(EmbedConfig(**{**asdict(config), "passage_overlap": 5}))


def test_a_dry_run_tells_documents_and_passages(config, tmp_path):
    dry = EmbedConfig(**{**asdict(config), "dry_run": True, "output": str(tmp_path / "dry")})
    record = RunRecord(dry.output, "embed_corpus", asdict(dry))
    summary = embed_corpus(dry, record).summary
    assert (summary["documents"], summary["passages"]) != ("", "")
    assert int(summary["passages"].split()[1]) > int(summary["documents"].split()[1])
