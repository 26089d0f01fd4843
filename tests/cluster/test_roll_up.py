"""Passages back to documents: against pandas, in any number of partitions."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import run_inline

from cluster import roll_up
from cluster.clustering import cluster_corpus
from cluster.config import ClusterConfig
from cluster.known import read_clustering
from cluster.newcomers import AssignConfig, assign_clusters
from pipelines.runtime.run_record import RunRecord

CENTRES = 4 * np.eye(3, 8, dtype=np.float32)


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    run_inline(monkeypatch)


def write_passages(folder, id_of=str, documents=40, seed=0):
    """Passages of documents in files without an order, those of one document in several files."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 6, documents)
    owners = np.repeat(np.arange(documents), counts)
    numbers = np.concatenate([np.arange(n) for n in counts])
    points = CENTRES[random.integers(0, 3, len(owners))] + random.normal(0, 0.2, (len(owners), 8))
    order = random.permutation(len(owners))
    folder.mkdir()
    for number, part in enumerate(np.array_split(order, 3)):
        table = {
            "id": [f"{owners[i]}#{numbers[i]}" for i in part],
            "document_id": [id_of(owners[i]) for i in part],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(points[part].astype(np.float32).ravel()), 8
            ),
        }
        pq.write_table(pa.table(table), folder / f"{number}.parquet")
    return len(owners)


def expected_of(folder) -> dict:
    rows = pq.read_table(folder / "assignments").to_pandas()
    expected = {}
    for document, group in rows.groupby("document_id"):
        about = group.groupby("cluster_id").agg(n=("id", "size"), mean=("distance", "mean"))
        about = about.reset_index().sort_values(
            ["n", "mean", "cluster_id"], ascending=[False, True, True]
        )
        shares = (about["n"] / len(group)).tolist()
        ids = about["cluster_id"].tolist()
        expected[document] = (len(group), ids[0], shares[0], ids, shares)
    return expected


def check(folder) -> pd.DataFrame:
    table = pq.read_table(folder / "documents.parquet")
    names = ["passages", "cluster_id", "share", "cluster_ids", "shares"]
    rows = zip(*(table[name].to_pylist() for name in ["document_id", *names]), strict=True)
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == len(table)
    assert found == expected_of(folder)
    return table


@pytest.mark.parametrize("id_of", [str, int])
@pytest.mark.parametrize("a_partition", [10, 1000])
def test_a_document_lies_where_most_of_its_passages_do(tmp_path, monkeypatch, id_of, a_partition):
    monkeypatch.setattr(roll_up, "_PASSAGES_A_PARTITION", a_partition)
    passages = write_passages(tmp_path / "in", id_of)
    result = cluster_corpus(
        ClusterConfig(
            embeddings=str(tmp_path / "in"), output=str(tmp_path / "out"), num_clusters="3"
        )
    )
    assert (result.counts["documents"], result.counts["passages"]) == (40, passages)
    table = check(tmp_path / "out")
    assert table.schema.field("document_id").type == pa.array([id_of(1)]).type
    assert any(share < 1 for share in table["share"].to_pylist())


def test_new_passages_are_rolled_up_too(tmp_path):
    write_passages(tmp_path / "in")
    clusters = str(tmp_path / "out")
    config = ClusterConfig(embeddings=str(tmp_path / "in"), output=clusters, num_clusters="3")
    with RunRecord(clusters, "cluster_corpus", asdict(config)) as record:
        cluster_corpus(config, record)
    passages = write_passages(tmp_path / "new", documents=7, seed=1)
    result = assign_clusters(
        AssignConfig(
            embeddings=str(tmp_path / "new"), clusters=clusters, output=str(tmp_path / "given")
        ),
        read=lambda c: read_clustering(c.clusters, c.quantile),
    )
    assert (result.counts["documents"], result.counts["passages"]) == (7, passages)
    check(tmp_path / "given")


def test_rows_without_a_document_are_in_no_document_s_counts(tmp_path):
    table = pa.table(
        {
            "id": ["a#0", "x"],
            "document_id": pa.array(["a", None]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(CENTRES[:2].ravel()), 8),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    cluster_corpus(
        ClusterConfig(
            embeddings=str(tmp_path / "in.parquet"),
            output=str(tmp_path / "out"),
            num_clusters="2",
        )
    )
    assert pq.read_table(tmp_path / "out" / "documents.parquet")["document_id"].to_pylist() == ["a"]
