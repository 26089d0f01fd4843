"""Tables of Delta and Iceberg as their current versions, checked against their own readers."""

import builtins
import json
import struct
import sys
from datetime import UTC, date, datetime
from decimal import Decimal

import lance
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import FileScanTask
from pyiceberg.transforms import IdentityTransform
from pyiceberg.typedef import Record
from pyiceberg.types import DateType, LongType, NestedField, StringType
from pyroaring import BitMap

from pipelines.runtime.arrow import file_columns, read_parquet
from pipelines.runtime.errors import InputError
from pipelines.runtime.listing import match_files
from pipelines.runtime.table_folders import refuse_files_of_tables, require_table, table_kind
from pipelines.runtime.table_view import TableView, pack_rows, unpack_rows
from pipelines.runtime.tables import table_files

ROWS = pa.table(
    {
        "id": pa.array(range(30), pa.int64()),
        "text": [f"Text number {n}" for n in range(30)],
        "label": ["a/b=c d", "x", None] * 10,
    }
)


def read(address, version="", wanted=("id", "text", "label")):
    """Rows of a table, by id, as its files under their views give them."""
    rows = []
    for file in table_files(str(address), version):
        filesystem = pafs.LocalFileSystem()
        groups = pq.read_metadata(file.path).num_row_groups
        for batch in read_parquet(filesystem, file.path, file.view, wanted, range(groups), 4):
            rows += batch.to_pylist()
    return sorted(rows, key=lambda row: row["id"])


def z85(data):
    digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
    data += b"\0" * (-len(data) % 4)
    text = ""
    for start in range(0, len(data), 4):
        value = int.from_bytes(data[start : start + 4], "big")
        text += "".join(digits[value // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return text


def delete_by_vector(path, rows):
    """Add a commit in which every data file loses these of its rows by a deletion vector."""
    log = path / "_delta_log"
    lines = [json.loads(line) for line in (log / f"{0:020}.json").read_text().splitlines()]
    vector = struct.pack("<iqi", 1681511377, 1, 0) + BitMap(rows).serialize()
    about = {
        "storageType": "i",
        "pathOrInlineDv": z85(vector),
        "sizeInBytes": len(vector),
        "cardinality": len(rows),
    }
    commit = []
    for add in (line["add"] for line in lines if "add" in line):
        commit.append({"remove": {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}})
        commit.append({"add": {**add, "deletionVector": about}})
    (log / f"{1:020}.json").write_text("".join(json.dumps(line) + "\n" for line in commit))


def test_row_numbers_packed_and_unpacked():
    rows = np.array([5, 0, 2**40, 5])
    assert unpack_rows(pack_rows(rows)).tolist() == [0, 5, 2**40]
    assert pack_rows(np.empty(0, np.int64)) == ""


def test_delta_versions_and_times(tmp_path):
    path = tmp_path / "t"
    write_deltalake(str(path), ROWS, partition_by=["label"])
    DeltaTable(str(path)).delete("id < 3")
    DeltaTable(str(path)).update(predicate="id = 5", updates={"text": "'the corrected text'"})
    rows = read(path)
    assert [row["id"] for row in rows] == list(range(3, 30))
    assert rows == sorted(
        DeltaTable(str(path)).to_pyarrow_table().select(["id", "text", "label"]).to_pylist(),
        key=lambda row: row["id"],
    )
    assert read(path, "0") == ROWS.to_pylist()
    (info,) = match_files(str(tmp_path))  # a folder with a table in it: the table, not its files
    assert info.path == str(path)
    assert len(read(path, "2099-01-01")) == 27
    with pytest.raises(InputError, match=r"cannot read 2020-01-01: there was no version"):
        table_files(str(path), "2020-01-01")
    with pytest.raises(InputError, match="cannot read 99"):
        table_files(str(path), "99")
    with pytest.raises(InputError, match="required is a version's number or a time"):
        table_files(str(path), "yesterday")


@pytest.mark.parametrize("partition", [None, ["label"]])
def test_delta_deletion_vectors(tmp_path, partition):
    path = tmp_path / "t"
    write_deltalake(
        str(path),
        ROWS,
        partition_by=partition,
        configuration={"delta.enableDeletionVectors": "true"},
    )
    before = [file.view.deleted for file in table_files(str(path))]
    delete_by_vector(path, [0, 1, 7])
    files = table_files(str(path))
    assert not any(before)
    assert all(file.view.deleted for file in files)
    assert len(read(path)) == 30 - 3 * len(files)
    if partition is None:
        assert [row["id"] for row in read(path)] == [n for n in range(30) if n not in (0, 1, 7)]


def test_delta_columns_that_a_later_version_added_are_null(tmp_path):
    path = tmp_path / "t"
    write_deltalake(str(path), ROWS.select(["id", "text"]))
    more = pa.table({"id": pa.array([30], pa.int64()), "text": ["new"], "label": ["y"]})
    write_deltalake(str(path), more, mode="append", schema_mode="merge")
    assert [row["label"] for row in read(path)] == [None] * 30 + ["y"]


def test_partition_columns_of_delta_have_the_types_of_the_table(tmp_path):
    day, time = date(2026, 1, 2), datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    table = pa.table(
        {
            "id": pa.array([1, 2], pa.int64()),
            "text": ["one", "two"],
            "day": pa.array([day, None]),
            "time": pa.array([time, None], pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.50"), None], pa.decimal128(5, 2)),
            "small": pa.array([7, None], pa.int32()),
            "flag": pa.array([True, None]),
            "name": ["a/b c", None],
        }
    )
    names = table.column_names[2:]
    write_deltalake(str(tmp_path / "t"), table, partition_by=names)
    rows = read(tmp_path / "t", wanted=("id", *names))
    assert rows == table.select(["id", *names]).to_pylist()
    for file in table_files(str(tmp_path / "t")):
        view = TableView(*json.loads(json.dumps(file.view)))  # as a worker gets it
        types = file_columns(pa.schema([("id", pa.int64())]), view).schema
        assert [types.field(name).type for name in names[:5]] == [
            table.schema.field(name).type for name in names[:5]
        ]


@pytest.fixture
def catalog(tmp_path):
    made = SqlCatalog(
        "c", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}/warehouse"
    )
    made.create_namespace("n")
    yield made
    made.engine.dispose()


def plain(rows):
    return sorted(rows.select(["id", "text", "label"]).to_pylist(), key=lambda row: row["id"])


def test_iceberg_snapshots_and_evolved_schemas(tmp_path, catalog):
    table = catalog.create_table("n.t", schema=ROWS.schema)
    table.append(ROWS.slice(0, 10))
    first = table.current_snapshot().snapshot_id
    table.append(ROWS.slice(10, 10))
    table.overwrite(ROWS.slice(20, 10))
    path = tmp_path / "warehouse" / "n" / "t"
    assert read(path) == ROWS.slice(20, 10).to_pylist()
    assert read(path, str(first)) == ROWS.slice(0, 10).to_pylist()
    with table.update_schema() as update:
        update.rename_column("text", "body")
    with table.update_schema() as update:
        update.add_column("text", StringType())
    table.append(ROWS.slice(0, 5).rename_columns(["id", "body", "label"]))
    rows = read(path, wanted=("id", "text", "body", "label"))
    expected = table.scan().to_arrow().select(["id", "text", "body", "label"]).to_pylist()
    assert rows == sorted(expected, key=lambda row: row["id"])
    assert {row["text"] for row in rows} == {None}
    for none in ("12345", "2020-01-01"):
        with pytest.raises(InputError, match="there is no such snapshot"):
            table_files(str(path), none)


def test_iceberg_columns_renamed_since_the_last_snapshot(tmp_path, catalog):
    """The current state has the columns of now, a snapshot those of its time."""
    table = catalog.create_table("n.t", schema=ROWS.schema)
    table.append(ROWS)
    path = tmp_path / "warehouse" / "n" / "t"
    (before,) = table_files(str(path))
    with table.update_schema() as update:
        update.rename_column("text", "body")
    with table.update_schema() as update:
        update.add_column("text", StringType())
    rows = read(path, wanted=("id", "text", "body"))
    expected = table.scan().to_arrow().select(["id", "text", "body"]).to_pylist()
    assert rows == sorted(expected, key=lambda row: row["id"])
    assert rows[7] == {"id": 7, "text": None, "body": "Text number 7"}
    assert read(path, str(table.current_snapshot().snapshot_id)) == ROWS.to_pylist()
    (after,) = table_files(str(path))
    assert (before.path, before.size_bytes) == (after.path, after.size_bytes)
    assert before.view.state != after.view.state  # so that a night reads the file again


def test_iceberg_fields_renamed_within_a_column_are_refused_where_it_is_wanted(tmp_path, catalog):
    docs = pa.array([{"text": text, "n": 1} for text in ROWS["text"].to_pylist()])
    table = catalog.create_table("n.t", schema=(rows := ROWS.append_column("doc", docs)).schema)
    table.append(rows)
    path = tmp_path / "warehouse" / "n" / "t"
    with table.update_schema() as update:
        update.add_column(("doc", "more"), StringType())
    assert read(path, wanted=("id", "doc.text"))[7] == {"id": 7, "doc.text": "Text number 7"}
    assert read(path, wanted=("id", "doc.more"))[7] == {"id": 7, "doc.more": None}
    with table.update_schema() as update:
        update.rename_column(("doc", "text"), "body")
    assert read(path, wanted=("id", "text"))[7] == {"id": 7, "text": "Text number 7"}
    for name in ("doc", "doc.body", "doc.text"):
        with pytest.raises(InputError, match="column 'doc' of the table has fields that were ren"):
            read(path, wanted=("id", name))


def test_iceberg_partitions_and_deletes_by_copy(tmp_path, catalog):
    schema = Schema(
        NestedField(1, "id", LongType()),
        NestedField(2, "text", StringType()),
        NestedField(3, "label", StringType()),
    )
    spec = PartitionSpec(PartitionField(3, 1000, IdentityTransform(), "label"))
    table = catalog.create_table("n.t", schema=schema, partition_spec=spec)
    table.append(ROWS)
    table.delete("id < 7")
    path = tmp_path / "warehouse" / "n" / "t"
    assert read(path) == plain(table.scan().to_arrow()) == ROWS.slice(7).to_pylist()


def test_values_that_only_icebergs_metadata_has_are_of_their_column_s_type(tmp_path, catalog):
    """As in tables that were made of Hive's folders: their files lack the partition's column."""
    schema = Schema(NestedField(1, "id", LongType()), NestedField(2, "day", DateType()))
    spec = PartitionSpec(PartitionField(2, 1000, IdentityTransform(), "day"))
    table = catalog.create_table("n.t", schema=schema, partition_spec=spec)
    table.append(pa.table({"id": pa.array([1], pa.int64()), "day": pa.array([date(2026, 1, 2)])}))
    path = tmp_path / "warehouse" / "n" / "t"
    (data,) = path.glob("data/**/*.parquet")
    pq.write_table(pq.read_table(data).select(["id"]), data)
    assert read(path, wanted=("id", "day")) == [{"id": 1, "day": date(2026, 1, 2)}]


def with_deletes(monkeypatch, files):
    """Scans say that each data file has these delete files."""
    from pyiceberg.table import DataScan

    plan = DataScan.plan_files

    def planned(self):
        return [FileScanTask(task.file, delete_files=set(files(task))) for task in plan(self)]

    monkeypatch.setattr(DataScan, "plan_files", planned)


def delete_file(path, content):
    return DataFile.from_args(
        content=content,
        file_path=f"file://{path}",
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=2,
        file_size_in_bytes=path.stat().st_size,
    )


def test_iceberg_position_deletes_are_applied_and_equality_deletes_refused(
    tmp_path, catalog, monkeypatch
):
    table = catalog.create_table("n.t", schema=ROWS.schema)
    table.append(ROWS)
    (task,) = table.scan().plan_files()
    deletes = pa.table(
        {
            "file_path": [task.file.file_path] * 3 + ["another"],
            "pos": pa.array([0, 5, 29, 1], pa.int64()),
        }
    )
    pq.write_table(deletes, tmp_path / "deletes.parquet")
    path = tmp_path / "warehouse" / "n" / "t"
    content = [DataFileContent.POSITION_DELETES]
    with_deletes(monkeypatch, lambda _: [delete_file(tmp_path / "deletes.parquet", content[0])])
    assert [row["id"] for row in read(path)] == [n for n in range(30) if n not in (0, 5, 29)]
    content[0] = DataFileContent.EQUALITY_DELETES
    with pytest.raises(InputError, match="equality deletes, which are not applied"):
        table_files(str(path))


def test_lance_versions_and_times(tmp_path):
    path = str(tmp_path / "t.lance")
    dataset = lance.write_dataset(ROWS, path)
    dataset.delete("id < 3")
    first, second = (version["timestamp"] for version in dataset.versions())
    between = first + (second - first) / 2
    asked = {"": 2, "1": 1, "2099-01-01": 2, between.astimezone(UTC).isoformat(): 1}
    for version, number in asked.items():
        (file,) = table_files(path, version)
        assert file.view.version == number
    with pytest.raises(InputError, match=r"cannot read 2020-01-01: there was no version"):
        table_files(path, "2020-01-01")


@pytest.mark.parametrize("kind", ["delta", "iceberg", "hudi"])
def test_what_lies_within_a_table_is_not_read_without_it(tmp_path, catalog, kind):
    folder = tmp_path / "warehouse" / "n" / "t"
    data = folder
    if kind == "delta":
        write_deltalake(str(folder), ROWS, partition_by=["label"])
        data = folder / "label=x"
    elif kind == "iceberg":
        catalog.create_table("n.t", schema=ROWS.schema).append(ROWS)
        data = folder / "data"
    else:
        (folder / ".hoodie").mkdir(parents=True)
        pq.write_table(ROWS, folder / "a.parquet")
    some = next(path for path in data.glob("*.parquet"))
    named = [some, f"{data}/*.parquet", f"{tmp_path}/**/*.parquet", f"{folder.parent}/*/**/*.pa*"]
    if kind != "hudi":
        named.append(data)
    for address in named:
        infos = match_files(str(address))
        with pytest.raises(InputError, match=rf"names files within a table \({folder}\)"):
            refuse_files_of_tables(str(address), infos)
    beside = folder.parent / "other" / "data" / "label=x"
    beside.mkdir(parents=True)
    (beside / "a.parquet").touch()
    (folder / "metadata").mkdir(exist_ok=True)
    (folder / "metadata" / "v1.metadata.json").touch()
    for address in (beside, beside / "a.parquet", f"{beside.parent}/*/*", f"{tmp_path}/**/*.json"):
        refuse_files_of_tables(str(address), match_files(str(address)))


def test_a_version_of_what_is_no_table_has_no_effect(tmp_path):
    pq.write_table(ROWS, tmp_path / "a.parquet")
    infos = match_files(str(tmp_path))
    require_table("", str(tmp_path), infos)
    with pytest.raises(InputError, match=r"--version 3 has no effect: .* holds no Delta"):
        require_table("3", str(tmp_path), infos)


def test_a_hudi_table_is_refused_by_name(tmp_path):
    (tmp_path / "t" / ".hoodie").mkdir(parents=True)
    (tmp_path / "t" / ".hoodie" / "hoodie.properties").write_text("x")
    pq.write_table(ROWS, tmp_path / "t" / "a.parquet")
    (info,) = match_files(str(tmp_path / "t"))
    with pytest.raises(InputError, match="is a Hudi table"):
        table_files(info.path)


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [("a Delta", "deltalake", "delta"), ("an Iceberg", "pyiceberg", "iceberg")],
)
def test_without_its_extra_a_table_is_refused_in_one_line(
    tmp_path, monkeypatch, kind, module, extra
):
    folder = tmp_path / "t"
    mark = folder / ("_delta_log" if extra == "delta" else "metadata")
    mark.mkdir(parents=True)
    (mark / "00000-1.metadata.json").write_text("{}")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    assert table_kind(str(folder)) == extra
    with pytest.raises(InputError, match=rf"is {kind} table.*pip install 'shoal\[{extra}\]'"):
        table_files(str(folder))
