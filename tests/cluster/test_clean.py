"""Kept rows have all their columns, whatever their files are."""

import json

import lance
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from inline_ray import inline_units

from cluster.clean import whole_rows
from cluster.config import DeduplicateConfig
from cluster.deduplication import deduplicate_corpus
from cluster.vector_files import Columns, Piece
from cluster.vectors import VectorSource
from pipelines.runtime import units
from pipelines.runtime.arrow import FINGERPRINT_KEY
from pipelines.runtime.files import read_table
from pipelines.runtime.table_view import TableView, pack_rows

ROWS = [
    {"id": "007", "text": "One.", "rank": "01", "embedding": [1.0, 0.0]},
    {"id": "008", "text": "One again.", "rank": "02", "embedding": [1.0, 0.125]},
    {"id": "009", "text": "Another.", "rank": "03", "embedding": [0.0, 1.0]},
]


def table_of(rows=ROWS):
    table = pa.Table.from_pylist(rows)
    vectors = table["embedding"].combine_chunks().flatten().cast(pa.float32())
    fixed = pa.FixedSizeListArray.from_arrays(vectors, 2)
    return table.set_column(3, "embedding", fixed).replace_schema_metadata({FINGERPRINT_KEY: b"a"})


def write_lines(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path):
    rows = [{**row, "embedding": json.dumps(row["embedding"])} for row in ROWS]
    pa.csv.write_csv(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("in.parquet", lambda path: pq.write_table(table_of(), path)),
        ("in.pq", lambda path: pq.write_table(table_of(), path)),
        ("in", lambda path: pq.write_table(table_of(), path)),
        ("in.lance", lambda path: lance.write_dataset(table_of(), path)),
        ("in.jsonl", write_lines),
        ("in.csv", write_csv),
    ],
)
def test_files_of_all_kinds_keep_all_columns(tmp_path, monkeypatch, name, write):
    monkeypatch.setattr(units, "unit_dataset", inline_units)
    write(tmp_path / name)
    output = tmp_path / "out"
    deduplicate_corpus(
        DeduplicateConfig(embeddings=str(tmp_path / name), output=str(output), write_clean=True)
    )
    clean = pq.read_table(output / "clean")
    found = clean.select(["id", "text", "rank", "embedding"]).to_pylist()
    if name.endswith(".csv"):
        found = [{**row, "embedding": json.loads(row["embedding"])} for row in found]
    assert found == [ROWS[0], ROWS[2]]
    if not name.endswith((".jsonl", ".csv")):
        assert clean.schema.field("embedding").type.list_size == 2
        assert clean.schema.metadata[FINGERPRINT_KEY] == b"a"
    # pairs are shown with their texts
    page = (output / "report.html").read_text()
    assert json.dumps("One again.") in page


def test_buckets_are_cleaned_into_buckets(tmp_path, monkeypatch, s3_server):
    monkeypatch.setattr(units, "unit_dataset", inline_units)
    s3_server.create_bucket(Bucket="cleaned")
    pq.write_table(table_of(), tmp_path / "in.parquet")
    s3_server.upload_file(str(tmp_path / "in.parquet"), "cleaned", "my in/100%/0.parquet")
    config = DeduplicateConfig(
        embeddings="s3://cleaned/my in/100%", output="s3://cleaned/out", write_clean=True
    )
    deduplicate_corpus(config)
    assert read_table("s3://cleaned/out/clean/part-00000.parquet")["id"].to_pylist() == [
        "007",
        "009",
    ]
    assert read_table("s3://cleaned/out/removed.parquet")["kept_id"].to_pylist() == ["007"]


def test_rows_that_a_table_has_deleted_are_not_clean(tmp_path):
    rows = [{**ROWS[0], "id": f"doc-{i}"} for i in range(10)]
    pq.write_table(table_of(rows), tmp_path / "in.parquet")
    view = TableView(deleted=pack_rows(np.array([2, 5])))
    source = VectorSource(str(tmp_path), Columns(), 2, "string", ())
    piece = Piece(str(tmp_path / "in.parquet"), 0, 10, view=view)
    whole = pa.Table.from_batches(list(whole_rows(source, piece)))
    assert whole["id"].to_pylist() == [f"doc-{i}" for i in range(10) if i not in (2, 5)]
    assert set(whole.column_names) == {"id", "text", "rank", "embedding"}
