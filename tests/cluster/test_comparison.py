"""Two clusterings side by side: where each cluster went, and what moved."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_ray import run_inline
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from cluster.clustering import cluster_corpus
from cluster.comparison import compare, comparison_section
from cluster.config import ClusterConfig
from cluster.describe import Description
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord


def write_result(folder, ids, cluster_ids, names):
    (folder / "assignments").mkdir(parents=True)
    half = len(ids) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):
        table = pa.table({"id": ids[part], "cluster_id": pa.array(cluster_ids[part], pa.int32())})
        pq.write_table(table, folder / "assignments" / f"part-{number:05d}.parquet")
    (folder / "assignments" / "mine.parquet").write_bytes(b"foreign")
    clusters = {"cluster_id": range(len(names)), "name": names, "keywords": [["a", "b"]] * 3}
    pq.write_table(pa.table(clusters), folder / "clusters.parquet")
    return str(folder)


def test_counts_and_agreement_are_those_of_a_join(tmp_path):
    random = np.random.default_rng(0)
    left, right = random.integers(0, 3, 50), random.integers(0, 3, 60)
    right[:50][left == 0] = 2
    ids = [f"d{i}" for i in range(60)]
    one = write_result(tmp_path / "one", ids[10:50], left[10:], ["x", None, "z"])
    order = random.permutation(60)
    two = write_result(tmp_path / "two", [ids[i] for i in order], right[order], ["p", "q", None])
    found = compare(one, 3, two)
    expected = np.zeros((3, 3), dtype=int)
    np.add.at(expected, (left[10:], right[10:50]), 1)
    assert found.shared.tolist() == expected.tolist()
    assert (found.only_here, found.only_there) == (0, 20)
    assert found.names == ["p", "q", "a, b"]
    assert found.moved() == 40 - expected.max(axis=1).sum()
    agreement = found.agreement()
    assert agreement["ari"] == pytest.approx(adjusted_rand_score(right[10:50], left[10:]))
    assert agreement["ami"] == pytest.approx(adjusted_mutual_info_score(right[10:50], left[10:]))
    clusters = [Description(i, 1, 0.1, ["k"], [], [], 1.0, None, None) for i in range(3)]
    section = comparison_section(found, clusters)
    assert section.title == "Compared with two"
    first = next(row for row in section.lists[0].rows if row[0] == "0")
    assert first[3:] == ("2", "a, b", "100%")


def test_results_without_a_common_document_are_refused(tmp_path):
    one = write_result(tmp_path / "one", ["a", "b"], [0, 1], ["x", "y", "z"])
    two = write_result(tmp_path / "two", ["c", "d"], [0, 1], ["x", "y", "z"])
    with pytest.raises(InputError, match="have no id in common"):
        compare(one, 3, two)


def test_documents_that_are_noise_in_one_of_the_two_have_not_moved(tmp_path):
    one = write_result(tmp_path / "one", ["a", "b"], [-1, 1], ["x", "y", "z"])
    two = write_result(tmp_path / "two", ["a", "b"], [0, -1], ["x", "y", "z"])
    found = compare(one, 3, two)
    assert (found.shared.sum(), found.moved()) == (0, 0)
    clusters = [Description(i, 1, 0.1, ["k"], [], [], 1.0, None, None) for i in range(3)]
    section = comparison_section(found, clusters)
    assert section.note.startswith("0 documents are in clusters of both (0 are only here")
    assert not section.lists[0].rows


def test_the_report_tells_what_went_where(tmp_path, monkeypatch):
    run_inline(monkeypatch)
    vectors = np.repeat(9 * np.eye(4), 30, axis=0) + np.random.default_rng(0).normal(size=(120, 4))
    np.save(tmp_path / "in.npy", vectors)
    common = {"embeddings": str(tmp_path / "in.npy"), "map_documents": 10}
    two = ClusterConfig(output=str(tmp_path / "two"), num_clusters="2", **common)
    with pytest.raises(InputError, match="is not the output of a job"):
        cluster_corpus(ClusterConfig(output=str(tmp_path / "x"), compare=two.output, **common))
    with RunRecord(two.output, "cluster_corpus", asdict(two)) as record:
        cluster_corpus(two, record)
    four = ClusterConfig(
        output=str(tmp_path / "four"), num_clusters="4", compare=two.output, **common
    )
    cluster_corpus(four)
    page = (tmp_path / "four" / "report.html").read_text()
    assert "Compared with two" in page
    assert "120 documents are in clusters of both (0 are only here, 0 are only there)" in page
