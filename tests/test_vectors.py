"""Vectors are found, cut into shards and checked, whatever format they come in."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import InputError
from cluster.sample import SamplePlan, merge_scans, scan_shard
from cluster.vectors import Columns, hash_ids, open_vectors, read_blocks, read_centroids

MATRIX = np.arange(24, dtype=np.float32).reshape(8, 3)


def read_all(source):
    blocks = [block for shard in source.shards for block in read_blocks(source, shard)]
    ids = [value for block in blocks for value in block.ids.to_pylist()]
    return ids, np.concatenate([block.vectors for block in blocks])


def write(path, kind, **columns):
    values = pa.array(MATRIX.tolist(), kind)
    pq.write_table(pa.table({"id": list(range(8)), "embedding": values, **columns}), path)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.list_(pa.float64(), 3),
    ],
)
def test_every_kind_of_list_becomes_float32(tmp_path, kind):
    write(tmp_path / "a.parquet", kind)
    ids, vectors = read_all(open_vectors(str(tmp_path / "a.parquet"), Columns()))
    assert ids == list(range(8))
    assert vectors.dtype == np.float32
    assert vectors.tolist() == MATRIX.tolist()


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "<i4"])
def test_npy_rows_are_numbered(tmp_path, dtype):
    np.save(tmp_path / "a.npy", MATRIX.astype(dtype))
    ids, vectors = read_all(open_vectors(str(tmp_path / "a.npy"), Columns()))
    assert ids == list(range(8))
    assert vectors.tolist() == MATRIX.tolist()


def test_npy_that_is_no_matrix_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(5))
    with pytest.raises(InputError, match=r"required is a matrix of numbers \(n, d\)"):
        open_vectors(str(tmp_path / "a.npy"), Columns())
    (tmp_path / "b.npy").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="is not a NumPy matrix"):
        open_vectors(str(tmp_path / "b.npy"), Columns())


def test_lance_datasets_are_read(tmp_path):
    lance = pytest.importorskip("lance", reason="the optional store extra is not installed")
    values = pa.FixedSizeListArray.from_arrays(pa.array(MATRIX.ravel()), 3)
    table = pa.table({"id": list(range(8)), "embedding": values})
    lance.write_dataset(table, str(tmp_path / "a.lance"), max_rows_per_file=3)
    for uri in (tmp_path, tmp_path / "a.lance"):
        ids, vectors = read_all(open_vectors(str(uri), Columns()))
        assert ids == list(range(8))
        assert vectors.tolist() == MATRIX.tolist()


def test_globs_pick_files_and_hidden_ones_are_passed_over(tmp_path):
    for name in ("a1.parquet", "a2.parquet", "b.parquet", "_c.parquet"):
        write(tmp_path / name, pa.list_(pa.float32()))
    assert open_vectors(f"{tmp_path}/a*.parquet", Columns()).rows == 16
    assert open_vectors(str(tmp_path), Columns()).rows == 24


def test_small_files_share_a_shard_and_row_groups_part_large_ones(tmp_path):
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        write(tmp_path / name, pa.list_(pa.float32()))
    shards = open_vectors(str(tmp_path), Columns(), rows_per_shard=16).shards
    assert [shard.rows for shard in shards] == [16, 8]


def test_unit_norm_scales_rows(tmp_path):
    from dataclasses import replace

    write(tmp_path / "a.parquet", pa.list_(pa.float32()))
    source = replace(open_vectors(str(tmp_path), Columns()), unit_norm=True)
    _, vectors = read_all(source)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_a_small_sample_is_the_beginning_of_a_large_one(tmp_path):
    random = np.random.default_rng(0)
    values = random.standard_normal((2_000, 2)).tolist()
    table = pa.table({"id": [f"d{i}" for i in range(2_000)], "embedding": values})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    source = open_vectors(str(tmp_path), Columns(), rows_per_shard=300)

    def draw(rows):
        plan = SamplePlan(source.rows, rows, 10, seed=3)
        scans = [scan_shard(source, shard, plan) for shard in source.shards]
        return merge_scans(scans, source, plan).sample.ids.to_pylist()

    small, large = draw(50), draw(400)
    assert len(small) == 50
    assert len(large) == 400
    assert large[:50] == small


def test_hashes_depend_on_the_seed_and_not_on_the_type_of_id():
    numbers, texts = pa.array([1, 2, 3]), pa.array(["1", "2", "3"])
    assert hash_ids(numbers, 0).tolist() == hash_ids(texts, 0).tolist()
    assert hash_ids(texts, 0).tolist() != hash_ids(texts, 1).tolist()


def test_centroids_come_back_in_the_order_of_their_numbers(tmp_path):
    table = pa.table({"cluster_id": [2, 0, 1], "centroid": MATRIX[:3].tolist()})
    pq.write_table(table, tmp_path / "c.parquet")
    assert read_centroids(str(tmp_path / "c.parquet")).tolist() == MATRIX[[1, 2, 0]].tolist()
    gap = table.set_column(0, "cluster_id", pa.array([0, 1, 5]))
    pq.write_table(gap, tmp_path / "c.parquet")
    with pytest.raises(InputError, match="must number the centroids from 0 to 2"):
        read_centroids(str(tmp_path / "c.parquet"))
