"""Vectors are found, cut into shards and checked, whatever format they come in."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import vector_files
from cluster.sample import SamplePlan, merge_scans, scan_shard
from cluster.vectors import (
    Columns,
    hash_ids,
    open_vectors,
    read_blocks,
    read_centroids,
    shorten_texts,
)
from pipelines.runtime.errors import InputError

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


def test_a_folder_called_like_a_file_is_searched_and_only_below_what_a_glob_matches(tmp_path):
    (tmp_path / "b.parquet").mkdir()
    (tmp_path / "c" / "d").mkdir(parents=True)
    for name in ("a.parquet", "b.parquet/part-0.parquet", "c/d/e.parquet"):
        write(tmp_path / name, pa.list_(pa.float32()))
    assert open_vectors(f"{tmp_path}/*.parquet", Columns()).rows == 16
    assert open_vectors(f"{tmp_path}/**/*.parquet", Columns()).rows == 24


def test_a_lance_dataset_whose_address_has_options_is_read_as_one(s3_server, monkeypatch):
    lance = pytest.importorskip("lance", reason="the optional store extra is not installed")
    server = os.environ["AWS_ENDPOINT_URL"]
    s3_server.create_bucket(Bucket="shoal-vectors")
    values = pa.FixedSizeListArray.from_arrays(pa.array(MATRIX.ravel()), 3)
    table = pa.table({"id": list(range(8)), "embedding": values})
    options = {"endpoint": server, "allow_http": "true"}
    lance.write_dataset(table, "s3://shoal-vectors/x.lance", storage_options=options)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    address = server.removeprefix("http://")
    uri = f"s3://shoal-vectors/x.lance?endpoint_override={address}&scheme=http&region=us-east-1"
    ids, vectors = read_all(open_vectors(uri, Columns()))
    assert ids == list(range(8))
    assert vectors.tolist() == MATRIX.tolist()


def test_a_file_damaged_behind_its_header_is_named_in_one_line(tmp_path):
    write(tmp_path / "a.parquet", pa.list_(pa.float32(), 3))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = b"\xff" * (len(content) - 4 - footer)
    (tmp_path / "a.parquet").write_bytes(content)
    source = open_vectors(str(tmp_path), Columns(), rows_per_shard=8)
    with pytest.raises(InputError, match=r"a\.parquet cannot be read to its end"):
        read_all(source)


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
    assert read_centroids(str(tmp_path / "c.parquet"))[0].tolist() == MATRIX[[1, 2, 0]].tolist()
    gap = table.set_column(0, "cluster_id", pa.array([0, 1, 5]))
    pq.write_table(gap, tmp_path / "c.parquet")
    with pytest.raises(InputError, match="must number the centroids from 0 to 2"):
        read_centroids(str(tmp_path / "c.parquet"))


def write_columns(path, **columns):
    vectors = columns.pop("embedding", MATRIX.tolist())
    pq.write_table(
        pa.table({"id": list(range(len(vectors))), "embedding": vectors} | columns), path
    )


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (pa.array(range(8), pa.int16()), "int64"),
        (pa.array([2**64 - 1 - i for i in range(8)], pa.uint64()), "uint64"),
        (pa.array(["it's", '"q"', "a,b", "<b>", "", " ", "ü", "\n"]), "string"),
        (pa.array(list("abcdefgh"), pa.large_string()), "string"),
        (pa.array(list("abcdefgh")).dictionary_encode(), "string"),
        (pa.array([letter.encode() for letter in "abcdefgü"], pa.binary()), "string"),
    ],
)
def test_ids_of_every_kind_come_back_as_they_are(tmp_path, ids, kind):
    write_columns(tmp_path / "a.parquet", id=ids)
    source = open_vectors(str(tmp_path), Columns())
    assert source.id_kind == kind
    assert read_all(source)[0] == ids.cast(kind).to_pylist()


@pytest.mark.parametrize(
    ("one", "other", "held"),
    [
        (pa.nulls(8), pa.array([7] * 8), [None, 7]),
        (pa.array([7] * 8, pa.int8()), pa.array([1.5] * 8), [7.0, 1.5]),
        (
            pa.array([{"a": 1}] * 8),
            pa.array([{"b": 2}] * 8),
            [{"a": 1, "b": None}, {"a": None, "b": 2}],
        ),
        (pa.array([["x"]] * 8, pa.large_list(pa.string())), pa.array([["y"]] * 8), [["x"], ["y"]]),
    ],
    ids=["nulls", "numbers", "fields", "lists"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_column_carried_along_has_a_type_that_holds_it_in_all_files(
    tmp_path, one, other, held, turned
):
    columns = [other, one] if turned else [one, other]
    for number, column in enumerate(columns):
        write_columns(tmp_path / f"{number}.parquet", k=column)
    source = open_vectors(str(tmp_path), Columns(keep=("k",)))
    kept = pa.concat_tables(
        [block.kept for shard in source.shards for block in read_blocks(source, shard)]
    )
    assert kept["k"].to_pylist()[7:9] == (held[::-1] if turned else held)


def test_columns_carried_along_that_no_type_holds_are_refused(tmp_path):
    write_columns(tmp_path / "a.parquet", k=pa.array(["x"] * 8))
    write_columns(tmp_path / "b.parquet", k=pa.array(range(8)))
    with pytest.raises(InputError, match=r"kept columns of .*b.parquet differ from other files"):
        open_vectors(str(tmp_path), Columns(keep=("k",)))


def test_an_id_of_bytes_that_are_no_text_is_refused(tmp_path):
    write_columns(tmp_path / "a.parquet", id=pa.array([b"\xff"] * 8))
    with pytest.raises(InputError, match="an id cannot be read as string"):
        read_all(open_vectors(str(tmp_path), Columns()))


@pytest.mark.parametrize("kind", [pa.float64(), pa.bool_(), pa.list_(pa.int8())])
def test_ids_of_other_kinds_are_refused(tmp_path, kind):
    values = {pa.bool_(): True, pa.list_(pa.int8()): [1]}.get(kind, 1.5)
    write_columns(tmp_path / "a.parquet", id=pa.array([values] * 8, kind))
    with pytest.raises(InputError, match="ids must be strings or integers"):
        open_vectors(str(tmp_path), Columns())


def test_files_of_pandas_and_polars_lie_together(tmp_path):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    rows = list(MATRIX.astype(np.float64))
    frame = pandas.DataFrame({"id": list("abcdefgh"), "embedding": rows, "text": ["x"] * 8})
    frame.to_parquet(tmp_path / "pandas.parquet")
    for name, kind in (("list", polars.List(polars.Float32)), ("array", polars.Array(float, 3))):
        ids = [f"{name}{i}" for i in range(8)]
        frame = polars.DataFrame(
            {"id": ids, "embedding": MATRIX.tolist(), "text": ["x"] * 8},
            schema_overrides={"embedding": kind},
        )
        frame.write_parquet(tmp_path / f"{name}.parquet", row_group_size=3)
    ids, vectors = read_all(open_vectors(str(tmp_path), Columns(), optional_text="text"))
    assert len(set(ids)) == 24
    assert vectors.tolist() == MATRIX.tolist() * 3


def test_strings_and_numbers_as_ids_become_strings(tmp_path):
    write_columns(tmp_path / "a.parquet")
    write_columns(tmp_path / "b.parquet", id=list("abcdefgh"))
    source = open_vectors(str(tmp_path), Columns())
    assert source.id_kind == "string"
    ids = [i for shard in source.shards for b in read_blocks(source, shard) for i in b.ids]
    assert [i.as_py() for i in ids] == [*map(str, range(8)), *"abcdefgh"]


def test_tensor_extension_types_are_vectors(tmp_path):
    flat = pa.FixedSizeListArray.from_arrays(pa.array(MATRIX.ravel()), 3)
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [3]), flat)
    write_columns(tmp_path / "a.parquet", embedding=tensors)
    assert read_all(open_vectors(str(tmp_path), Columns()))[1].tolist() == MATRIX.tolist()


def test_whole_numbers_are_vectors_too(tmp_path):
    write_columns(tmp_path / "a.parquet", embedding=MATRIX.astype(int).tolist())
    assert read_all(open_vectors(str(tmp_path), Columns()))[1].tolist() == MATRIX.tolist()


def test_vectors_too_long_for_float32_are_refused(tmp_path):
    write_columns(tmp_path / "a.parquet", embedding=[[1.0, 2.0], [1e25, 0.0]])
    with pytest.raises(InputError, match=r"id=1, is longer than 1e\+18"):
        read_all(open_vectors(str(tmp_path), Columns()))


def test_texts_and_labels_must_be_single_values(tmp_path):
    write_columns(tmp_path / "a.parquet", text=[["a", "list"]] * 8)
    with pytest.raises(InputError, match=r"'text' is list<.*must be strings or numbers"):
        open_vectors(str(tmp_path), Columns(), optional_text="text")
    with pytest.raises(InputError, match="'text' is list<"):
        open_vectors(str(tmp_path), Columns(label="text"))
    assert open_vectors(str(tmp_path), Columns(), optional_text="body").columns.text is None


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    values = pa.array(MATRIX.tolist())
    ids = pa.array(range(8))
    table = pa.Table.from_arrays([ids, ids, values], names=["id", "id", "embedding"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="has 2 columns 'id'"):
        open_vectors(str(tmp_path), Columns())


def test_names_with_brackets_blanks_and_marks_are_paths(tmp_path):
    folder = tmp_path / "run [1] 100% a*b"
    folder.mkdir()
    write_columns(folder / "a [x].parquet")
    for path in (folder, folder / "a [x].parquet", f"{folder}/*.parquet"):
        assert open_vectors(str(path), Columns()).rows == 8


def test_a_folder_named_like_a_file_is_looked_into(tmp_path):
    (tmp_path / "table.parquet").mkdir()
    write_columns(tmp_path / "table.parquet" / "part-0.parquet")
    for path in (tmp_path, tmp_path / "table.parquet"):
        assert open_vectors(str(path), Columns()).rows == 8


def test_long_texts_make_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "_TEXT_BYTES", 5_000)
    texts = [f"{i}" * 2_000 for i in range(8)]
    write_columns(tmp_path / "a.parquet", text=texts)
    source = open_vectors(str(tmp_path), Columns(), optional_text="text")
    blocks = [block for shard in source.shards for block in read_blocks(source, shard)]
    assert max(len(block.ids) for block in blocks) <= 3
    assert [t for block in blocks for t in block.texts.to_pylist()] == texts


def test_texts_are_shortened_by_characters_and_broken_bytes_replaced():
    offsets = pa.py_buffer(np.array([0, 4, 6, 9], dtype=np.int32))
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, offsets, pa.py_buffer(b"\xff\xfe\xffa" + "é".encode() + b"xyz")]
    )
    assert shorten_texts(broken, 2).to_pylist() == ["\ufffd\ufffd", "é", "xy"]
    assert shorten_texts(pa.array([12, None]), 9).to_pylist() == ["12", None]
    wanted = np.array([False, True])
    assert shorten_texts(pa.array(["a", "b"]), 9, wanted).to_pylist() == [None, "b"]
