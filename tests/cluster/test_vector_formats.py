"""Vectors as other tools leave them: every kind comes back as the same float32 rows and ids."""

import json
import uuid
from decimal import Decimal

import datasets
import faiss
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from cluster.matrix_files import open_matrix
from cluster.vectors import Columns, open_vectors, read_blocks
from pipelines.runtime.errors import InputError

MATRIX = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
IDS = list(range(30))


def read(uri, drop_bad=False, **columns):
    source = open_vectors(str(uri), Columns(**columns), optional_text="text")
    if drop_bad:
        from dataclasses import replace

        source = replace(source, drop_bad=True)
    blocks = [block for shard in source.shards for block in read_blocks(source, shard)]
    ids = [i for block in blocks for i in block.ids.to_pylist()]
    return ids, np.concatenate([block.vectors for block in blocks]), blocks


def fixed(matrix=MATRIX):
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])


def check(uri, ids=IDS, matrix=MATRIX, **arguments):
    found, vectors, _ = read(uri, **arguments)
    assert found == list(ids)
    np.testing.assert_allclose(vectors, matrix, rtol=1e-6)


def write_fvecs(path):
    rows = np.hstack([np.full((30, 1), 8, "<i4").view("<f4"), MATRIX])
    path.write_bytes(rows.astype("<f4").tobytes())


def write_fbin(path):
    path.write_bytes(np.array([30, 8], "<i4").tobytes() + MATRIX.tobytes())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.npy", lambda path: np.save(path, MATRIX)),
        ("a.npz", lambda path: np.savez(path, vectors=MATRIX)),
        ("b.npz", lambda path: np.savez_compressed(path, MATRIX, np.arange(30))),
        ("a.fvecs", write_fvecs),
        ("a.fbin", write_fbin),
    ],
)
def test_matrices_without_columns(tmp_path, name, write):
    write(tmp_path / name)
    check(tmp_path / name)
    check(tmp_path)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "b.npz", "a.fvecs", "a.fbin"])
def test_a_matrix_is_read_in_shards_where_its_rows_can_be_found(tmp_path, monkeypatch, name):
    monkeypatch.setattr("cluster.vector_files.ROWS_PER_SHARD", 7)
    names = [f"k{n}" for n in range(30)]
    writers = {
        "a.npy": lambda path: np.save(path, MATRIX.astype(np.float64)),
        "a.npz": lambda path: np.savez(path, ids=np.array(names), vectors=MATRIX),
        "b.npz": lambda path: np.savez_compressed(path, MATRIX, np.arange(30)),
        "a.fvecs": write_fvecs,
        "a.fbin": write_fbin,
    }
    writers[name](tmp_path / name)
    source = open_vectors(str(tmp_path / name), Columns(), rows_per_shard=7)
    assert [shard.rows for shard in source.shards] == ([30] if name == "b.npz" else [7] * 4 + [2])
    blocks = [block for shard in source.shards[::-1] for block in read_blocks(source, shard)]
    assert blocks[-1].ids.to_pylist()[0] == ("k0" if name == "a.npz" else 0)
    check(tmp_path / name, names if name == "a.npz" else IDS)


def test_a_row_of_another_width_than_the_first_is_refused(tmp_path):
    write_fvecs(tmp_path / "a.fvecs")
    content = bytearray((tmp_path / "a.fvecs").read_bytes())
    content[36:40] = np.int32(7).tobytes()
    (tmp_path / "a.fvecs").write_bytes(content)
    with pytest.raises(InputError, match=r"a.fvecs: its row 1 says the dimension 7, its first"):
        read(tmp_path / "a.fvecs")


def test_ids_of_64_unsigned_bits_in_an_npz_stay_as_they_are(tmp_path):
    for first in (5, 2**63):
        ids = np.arange(30, dtype=np.uint64) + np.uint64(first)
        np.savez(tmp_path / "a.npz", vectors=MATRIX, ids=ids)
        check(tmp_path / "a.npz", ids=ids.tolist())


def test_an_npz_of_a_matrix_and_its_ids(tmp_path):
    names = [f"k{n}" for n in range(30)]
    np.savez(tmp_path / "a.npz", ids=np.array(names), vectors=MATRIX)
    check(tmp_path / "a.npz", ids=names)
    np.savez(tmp_path / "c.npz", ids=np.array(names), vectors=MATRIX, labels=np.arange(30) % 3)
    check(tmp_path / "c.npz", ids=names)
    np.savez(tmp_path / "e.npz", vectors=MATRIX, weights=np.ones(30))
    check(tmp_path / "e.npz")
    for more, message in (
        ({"a": np.arange(30), "b": np.arange(30)}, "a, b beside the matrix"),
        ({"y": np.arange(30) % 3}, "'y' would be the ids, but holds some more than once"),
        ({"ids": np.array(names, dtype=object)}, "'ids' is of object; ids must be integers or str"),
    ):
        np.savez(tmp_path / "d.npz", vectors=MATRIX, **more)
        with pytest.raises(InputError, match=message):
            open_vectors(str(tmp_path / "d.npz"), Columns())
    np.savez(tmp_path / "b.npz", a=MATRIX, b=MATRIX)
    with pytest.raises(InputError, match="required is one matrix"):
        open_vectors(str(tmp_path / "b.npz"), Columns())


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("kind", ["Flat", "IVF4,Flat", "IDMap,Flat", "PCA8,Flat", "HNSW8"])
def test_faiss_indexes_give_all_their_vectors(tmp_path, monkeypatch, kind, local):
    index = faiss.index_factory(8, kind)
    index.train(MATRIX)
    ids = IDS
    if kind.startswith("IDMap"):
        ids = [100 + 10 * n for n in range(30)]
        index.add_with_ids(MATRIX, np.array(ids))
    else:
        index.add(MATRIX)
    faiss.write_index(index, str(tmp_path / "a.faiss"))
    monkeypatch.setattr("cluster.vector_files.ROWS_PER_SHARD", 7)
    filesystem = LocalFileSystem()
    if not local:
        filesystem = SubTreeFileSystem("/", filesystem)
    matrix = open_matrix(filesystem, str(tmp_path / "a.faiss"))
    assert matrix.sequential is not local
    blocks = list(matrix.read(7, 30, 5))
    assert np.concatenate([found for found, _ in blocks]).tolist() == ids[7:]
    vectors = np.concatenate([some for _, some in blocks])
    np.testing.assert_allclose(vectors, MATRIX[7:], atol=1e-5)
    found, vectors, _ = read(tmp_path / "a.faiss")
    assert found == ids
    np.testing.assert_allclose(vectors, MATRIX, atol=1e-5)
    monkeypatch.setattr("pipelines.runtime.machines.usable_memory_bytes", lambda: 1000)
    if local:
        open_matrix(filesystem, str(tmp_path / "a.faiss"))
    else:
        with pytest.raises(InputError, match=r"in memory at once, .*: copy the index to a local"):
            open_matrix(filesystem, str(tmp_path / "a.faiss"))
    content = (tmp_path / "a.faiss").read_bytes()
    (tmp_path / "a.faiss").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a.faiss is not a .faiss file"):
        open_vectors(str(tmp_path / "a.faiss"), Columns())


def test_a_faiss_index_whose_ids_are_no_places_is_refused(tmp_path):
    index = faiss.index_factory(8, "IVF4,Flat")
    index.train(MATRIX)
    index.add_with_ids(MATRIX, np.arange(30) * 7)
    faiss.write_index(index, str(tmp_path / "a.index"))
    with pytest.raises(InputError, match="whose ids are not 0 to 29"):
        open_vectors(str(tmp_path / "a.index"), Columns())


def test_arrow_files_are_named_as_what_they_are(tmp_path):
    rows = {"id": IDS, "embedding": MATRIX.tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="holds Arrow files, as of save_to_disk"):
        open_vectors(str(tmp_path / "saved"), Columns())
    pl.DataFrame(rows).write_ipc(tmp_path / "a.feather")
    with pytest.raises(InputError, match="is an Arrow file; vectors are read from Parquet"):
        open_vectors(str(tmp_path / "a.feather"), Columns())


def test_a_cut_file_of_vectors_is_named(tmp_path):
    write_fbin(tmp_path / "a.fbin")
    (tmp_path / "a.fbin").write_bytes((tmp_path / "a.fbin").read_bytes()[:-5])
    with pytest.raises(InputError, match=r"a\.fbin is not a \.fbin file: its 963 bytes are no"):
        open_vectors(str(tmp_path / "a.fbin"), Columns())


def test_json_lines_and_csv_of_vectors(tmp_path):
    rows = [{"id": n, "text": f"t{n}", "embedding": v.tolist()} for n, v in enumerate(MATRIX)]
    rows[0]["embedding"] = [round(x) for x in rows[0]["embedding"]]
    matrix = MATRIX.copy()
    matrix[0] = rows[0]["embedding"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(tmp_path / "a.jsonl", matrix=matrix)
    texts = [json.dumps(row["embedding"]) for row in rows]
    frame = pd.DataFrame({"id": IDS, "embedding": texts, "text": "one, two"})
    for name, sep in (("a.csv", ","), ("a.csv.gz", ","), ("a.tsv", "\t")):
        frame.to_csv(tmp_path / name, sep=sep, index=False)
        check(tmp_path / name, ids=map(str, IDS), matrix=matrix)


def test_strings_in_json_lines_stay_strings(tmp_path):
    days = [f"2026-01-{n + 1:02d}" for n in range(30)]
    rows = [
        {"id": day, "embedding": str(row.tolist()), "label": f"{day}T00:00:00"}
        for day, row in zip(days, MATRIX, strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.jsonl").touch()
    ids, vectors, (block,) = read(tmp_path, label="label")
    assert ids == days
    np.testing.assert_allclose(vectors, MATRIX, rtol=1e-6)
    assert block.labels.to_pylist() == [row["label"] for row in rows]
    with pytest.raises(InputError, match=r"a.jsonl has no column 'vector'; its columns are id"):
        read(tmp_path, embedding="vector")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"a.jsonl is a JSON array; it must be JSON lines"):
        read(tmp_path)


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_the_header_of_a_csv_of_vectors_tells_its_delimiter(tmp_path, delimiter):
    frame = pd.DataFrame({"id": IDS, "embedding": [str(row.tolist()) for row in MATRIX]})
    frame.to_csv(tmp_path / "a.csv", sep=delimiter, index=False)
    ids, vectors, _ = read(tmp_path / "a.csv")
    assert ids == [str(number) for number in IDS]
    np.testing.assert_allclose(vectors, MATRIX, rtol=1e-6)


def test_ids_and_labels_of_csv_stay_as_they_are_written(tmp_path):
    rows = ["id,label,embedding", '007,NA,"[1,2]"', '7,null,"[3,4]"', 'nan,,"[5,6]"']
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    found, vectors, (block,) = read(tmp_path / "a.csv", label="label")
    assert found == ["007", "7", "nan"]
    assert block.labels.to_pylist() == ["NA", "null", None]
    assert vectors.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_vectors_as_text_of_pgvector_and_as_sparks_type(tmp_path):
    texts = [json.dumps(vector.tolist()) for vector in MATRIX]
    pq.write_table(pa.table({"id": IDS, "embedding": texts}), tmp_path / "pg.parquet")
    check(tmp_path / "pg.parquet")
    dense = [{"type": 1, "size": None, "indices": None, "values": v.tolist()} for v in MATRIX]
    dense[3] = {"type": 0, "size": 8, "indices": [2, 5], "values": [1.0, 2.0]}
    matrix = MATRIX.copy()
    matrix[3] = [0, 0, 1, 0, 0, 2, 0, 0]
    kind = pa.struct(
        [
            ("type", pa.int8()),
            ("size", pa.int32()),
            ("indices", pa.list_(pa.int32())),
            ("values", pa.list_(pa.float64())),
        ]
    )
    table = pa.table({"id": IDS, "embedding": pa.array(dense, kind)})
    pq.write_table(table, tmp_path / "spark.parquet")
    check(tmp_path / "spark.parquet", matrix=matrix)
    pq.write_table(pa.table({"id": IDS, "embedding": ["a"] * 30}), tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"text that is not of the form \[1,2,3\]"):
        open_vectors(str(tmp_path / "bad.parquet"), Columns())


def test_tensors_that_are_no_vectors_are_refused(tmp_path):
    tensor = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (2, 4)), fixed())
    pq.write_table(pa.table({"id": IDS, "embedding": tensor}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"tensors of shape \(2, 4\); required is one vector"):
        open_vectors(str(tmp_path), Columns())
    flat = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (8,)), fixed())
    pq.write_table(pa.table({"id": IDS, "embedding": flat}), tmp_path / "a.parquet")
    check(tmp_path)


def test_null_vectors_first_are_left_out_like_others(tmp_path):
    vectors = pa.array([None] * 1100 + MATRIX.tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": range(1130), "embedding": vectors}), tmp_path / "b.parquet")
    nulls = pa.table({"id": [5000], "embedding": pa.nulls(1)})
    pq.write_table(nulls, tmp_path / "a.parquet")
    check(tmp_path, ids=range(1100, 1130), drop_bad=True)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(InputError, match="every vector is null or empty"):
        open_vectors(str(tmp_path), Columns())


def test_ids_texts_and_labels_of_every_writer(tmp_path):
    keys = [uuid.uuid4() for _ in IDS]
    storage = pa.array([key.bytes for key in keys], pa.binary(16))
    columns = {
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), storage),
        "decimal": pa.array([Decimal(n) for n in IDS], pa.decimal128(20, 0)),
        "view": pa.array([f"k{n}" for n in IDS], pa.string_view()),
        "text": pa.array([b"caf\xe9 %d" % n for n in IDS], pa.binary()),
        "label": pa.array([f"l{n % 3}" for n in IDS], pa.string_view()),
        "embedding": fixed(),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    check(tmp_path, ids=[str(key) for key in keys], id="uuid")
    check(tmp_path, ids=[str(n) for n in IDS], id="decimal")
    check(tmp_path, ids=[f"k{n}" for n in IDS], id="view")
    _, _, (block,) = read(tmp_path, id="view", label="label")
    assert block.labels.to_pylist() == [f"l{n % 3}" for n in IDS]


def test_labels_are_the_names_of_a_class_label(tmp_path):
    names = {"label": datasets.ClassLabel(names=["neg", "pos"])}
    kinds = {"id": datasets.Value("int64"), "embedding": datasets.List(datasets.Value("float32"))}
    rows = {"id": IDS, "embedding": MATRIX.tolist(), "label": [n % 3 - 1 for n in IDS]}
    datasets.Dataset.from_dict(rows, datasets.Features(kinds | names)).to_parquet(
        tmp_path / "a.parquet"
    )
    _, _, (block,) = read(tmp_path, label="label")
    assert block.labels.to_pylist() == [None, "neg", "pos"] * 10


def test_labels_in_folder_names(tmp_path):
    for name in ("cat", "a%2Fb"):
        (tmp_path / f"label={name}").mkdir()
        table = pa.table({"id": IDS, "embedding": fixed()})
        pq.write_table(table, tmp_path / f"label={name}" / "a.parquet")
    _, _, blocks = read(tmp_path, label="label")
    assert {label for block in blocks for label in block.labels.to_pylist()} == {"cat", "a/b"}


def test_ids_in_the_index_of_pandas(tmp_path):
    frame = pd.DataFrame({"id": range(100, 400, 10), "embedding": list(MATRIX)}).set_index("id")
    frame.to_parquet(tmp_path / "a.parquet")
    check(tmp_path, ids=range(100, 400, 10))


def test_a_delta_table_is_read_without_its_deleted_rows(tmp_path):
    table = pa.table({"id": IDS, "text": [f"t{n}" for n in IDS], "embedding": fixed()})
    write_deltalake(str(tmp_path / "t"), table)
    DeltaTable(str(tmp_path / "t")).delete("id < 3")
    check(tmp_path / "t", ids=IDS[3:], matrix=MATRIX[3:])
    source = open_vectors(str(tmp_path / "t"), Columns(), version="0")
    assert source.rows == 30
    with pytest.raises(InputError, match="names files within a table"):
        open_vectors(f"{tmp_path}/t/*.parquet", Columns())


def test_files_of_polars_delta_are_read(tmp_path):
    pl.DataFrame({"id": IDS, "text": ["x"] * 30, "embedding": MATRIX.tolist()}).write_delta(
        str(tmp_path / "t")
    )
    check(tmp_path / "t")


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"\x89HDF\r\n", "HDF5"), (b"\x80\x04abc", "pickle"), (b"PK\x03\x04", "zip"), (b"?", "unkn")],
)
def test_a_kind_that_is_not_read_is_named(tmp_path, content, kind):
    (tmp_path / "vectors.bin").write_bytes(content)
    with pytest.raises(InputError, match=f"vectors.bin is .*{kind}"):
        open_vectors(str(tmp_path / "vectors.bin"), Columns())


def test_parquet_under_any_name_is_read(tmp_path):
    pq.write_table(pa.table({"id": IDS, "embedding": fixed()}), tmp_path / "vectors")
    check(tmp_path / "vectors")
