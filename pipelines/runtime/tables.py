"""Delta, Iceberg and Lance tables as the files that make up one version of them.

In: the address of a table's folder, and which version is wanted. Out: its data files, each with
what turns the file's rows and columns into the table's (:class:`TableView`): a table's folder also
holds rows that were deleted or replaced, and files of other versions.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    exists,
    first_line,
    in_threads,
    join,
    open_filesystem,
    s3_settings,
    split_options,
    with_retries,
)
from pipelines.runtime.table_folders import newest_metadata, table_kind
from pipelines.runtime.table_view import TableView, pack_rows

PUBLISHED = "published"
"""The tag that a store gives the version that readers are to see."""
STORE_DOCUMENTS = "documents.lance"
STORE_MARK = "store.json"
_CURRENT = "its current version"
_NONE_YET = "there was no version of the table yet"


@dataclass(frozen=True)
class TableFile:
    """One data file of a table's version; of Lance the dataset itself."""

    path: str
    """Its address."""
    size_bytes: int
    modified_ns: int
    view: TableView


def table_files(address: str, version: str = "") -> list[TableFile]:
    """The data files of a table in the order of their paths.

    Args:
        address: the table's folder.
        version: a version's number, an Iceberg snapshot's id, or a time (ISO 8601); the current
            version without one.

    Raises :class:`InputError` for a kind of table that is not read, for one whose extra is not
    installed, for a version that there is not, and for deletions that cannot be applied.
    """
    kind = table_kind(address)
    listings = {"delta": _delta_files, "iceberg": _iceberg_files, "lance": _lance_files}
    if kind not in listings:
        raise InputError(
            f"{address} is a Hudi table (.hoodie), which is not read: its folder holds rows that "
            "were deleted or replaced. Write the rows wanted to Parquet first"
        )
    return sorted(listings[kind](address, version), key=lambda file: file.path)


def _missing_extra(address: str, kind: str, extra: str) -> InputError:
    return InputError(
        f"{address} is {kind} table, whose folder also holds rows that were deleted or replaced; "
        f"reading its current version needs an extra: pip install 'shoal[{extra}]'"
    )


def _as_time(version: str) -> datetime.datetime | None:
    """A version that is a time, UTC unless it says otherwise; None for a number."""
    if version.lstrip("-").isdigit():
        return None
    try:
        time = datetime.datetime.fromisoformat(version)
    except ValueError as error:
        raise InputError(
            f"--version {version}: required is a version's number or a time such as "
            "2026-01-31T12:00:00"
        ) from error
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def _no_version(address: str, version: str, error: BaseException) -> InputError:
    return InputError(f"{address}: cannot read {version or _CURRENT}: {first_line(error)}")


# ---- Delta


def _delta_files(address: str, version: str) -> Iterator[TableFile]:
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise _missing_extra(address, "a Delta", "delta") from error
    time = _as_time(version) if version else None
    try:
        table = DeltaTable(
            plain_uri(address),
            version=int(version) if version and time is None else None,
            storage_options=_delta_options(address),
        )
        if time is not None:
            table.load_as_version(time)
            # of a time before all versions, deltalake gives the first one
            written_ms = table.history(1)[0].get("timestamp", 0)
            if written_ms > time.timestamp() * 1000:
                raise ValueError(_NONE_YET)
        found = pa.table(table.get_add_actions(flatten=False))
        actions = found.to_pylist()
        names = _delta_names(table)
        deleted = dict(_delta_deletions(table))
    except (DeltaError, OSError, ValueError) as error:
        raise _no_version(address, version, error) from error
    partitions = found["partition"] if "partition" in found.column_names else ()
    said = f"of Delta version {table.version()}"
    for place, action in enumerate(actions):
        path = unquote(action["path"])
        inner = "://" in path and unquote(urlsplit(path).path)
        partition = dict(partitions[place].items()) if action.get("partition") else {}
        yield TableFile(
            path if inner else join(address, path),
            action["size_bytes"],
            action["modification_time"] * 1_000_000,
            TableView.of_table(names, partition, deleted.get(path, ""), table=said),
        )


def _delta_options(address: str) -> dict[str, str]:
    if not address.startswith("s3://"):
        return {}
    settings = s3_settings(address)
    keys = {"endpoint": "AWS_ENDPOINT_URL", "region": "AWS_REGION"}
    options = {keys[name]: value for name, value in settings.items()}
    if settings.get("endpoint", "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options


def _delta_names(table: Any) -> dict[str, str | None] | None:
    """The file's name of each column, where the table maps them; partition columns left out."""
    mode = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mode == "none":
        return None
    fields = pa.schema(table.schema().to_arrow())
    key = b"delta.columnMapping.physicalName"
    partitions = set(table.metadata().partition_columns)
    return {
        field.name: (field.metadata or {}).get(key, field.name.encode()).decode()
        for field in fields
        if field.name not in partitions
    }


def _delta_deletions(table: Any) -> Iterator[tuple[str, str]]:
    """(path below the table, packed deleted rows) of every file that has a deletion vector."""
    root = unquote(urlsplit(table.table_uri).path).rstrip("/") + "/"
    for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors()):
        for path, kept in zip(batch.column(0).to_pylist(), batch.column(1), strict=True):
            inside = unquote(urlsplit(path).path).removeprefix(root)
            flags = kept.values.to_numpy(zero_copy_only=False)
            yield inside, pack_rows(np.flatnonzero(~flags.astype(bool)))


def _typed(value: Any, kind: pa.DataType) -> pa.Scalar:
    """A value of Iceberg's metadata, where days and microseconds are numbers."""
    as_text = isinstance(value, str | uuid.UUID)
    return pa.scalar(str(value)) if as_text else pa.scalar(value, kind)


def plain_uri(address: str) -> str:
    """An address without options, as libraries beside pyarrow take it."""
    return split_options(address)[0] if "://" in address else open_filesystem(address)[1]


# ---- Iceberg


def _iceberg_files(address: str, version: str) -> Iterator[TableFile]:
    try:
        from pyiceberg.exceptions import NotInstalledError, ValidationError
        from pyiceberg.table import StaticTable
    except ImportError as error:
        raise _missing_extra(address, "an Iceberg", "iceberg") from error
    properties = {}
    if address.startswith("s3://"):
        properties = {f"s3.{name}": value for name, value in s3_settings(address).items()}
    try:
        metadata = newest_metadata(address) or address
        table = StaticTable.from_metadata(plain_uri(metadata), properties)
        snapshot = _snapshot(table, version)
        if snapshot is None:
            raise ValueError("there is no such snapshot" if version else "it has no snapshot")
        # a snapshot has the columns of its time, the current state those of now
        scan = table.scan(snapshot_id=snapshot.snapshot_id) if version else table.scan()
        tasks = list(scan.plan_files())
        schema = scan.projection()
        deletions = _iceberg_deletions(address, tasks)
    except NotInstalledError as error:
        raise _missing_extra(address, "an Iceberg", "iceberg") from error
    except (OSError, ValueError, KeyError, ValidationError, NotImplementedError) as error:
        raise _no_version(address, version, error) from error
    said = f"of Iceberg snapshot {snapshot.snapshot_id}"
    for file in in_threads(lambda task: _iceberg_file(table, schema, task, deletions), tasks):
        yield replace(file, view=file.view._replace(table=said))


def _snapshot(table: Any, version: str) -> Any:
    if not version:
        return table.current_snapshot()
    time = _as_time(version)
    if time is None:
        return table.snapshot_by_id(int(version))
    return table.snapshot_as_of_timestamp(int(time.timestamp() * 1000))


def _iceberg_file(
    table: Any, schema: Any, task: Any, deletions: Mapping[str, np.ndarray]
) -> TableFile:
    path = _file_address(task.file.file_path)
    kind = task.file.file_format.value
    if kind.upper() != "PARQUET":
        raise InputError(f"{path} is {kind}; of Iceberg tables only Parquet files are read")
    filesystem, inner = open_filesystem(path)
    try:
        info = with_retries(lambda: filesystem.get_file_info(inner), path)
        own = with_retries(lambda: pq.read_schema(inner, filesystem=filesystem), path, decodes=True)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is not there, though the table's metadata names it: an Iceberg table that was "
            "moved cannot be read"
        ) from error
    ids = {_field_id(field): field.name for field in own}
    by_name = set(ids) == {None}
    spec = table.specs()[task.file.spec_id]
    parts = {
        part.source_id: task.file.partition[place]
        for place, part in enumerate(spec.fields)
        if str(part.transform) == "identity"
    }
    names: dict[str, str | None] = {}
    regrouped: list[str] = []
    constants: dict[str, pa.Scalar] = {}
    kinds = schema.as_arrow()
    for field in schema.fields:
        there = field.name if by_name else ids.get(str(field.field_id).encode())
        if there is not None and there in own.names:
            names[field.name] = there
            if not by_name and _is_regrouped(own.field(there), kinds.field(field.name)):
                regrouped.append(field.name)
        elif field.field_id in parts:
            constants[field.name] = _typed(parts[field.field_id], kinds.field(field.name).type)
        elif getattr(field, "initial_default", None) is not None:
            constants[field.name] = _typed(field.initial_default, kinds.field(field.name).type)
        else:
            names[field.name] = None
    deleted = pack_rows(deletions.get(task.file.file_path, np.empty(0, np.int64)))
    view = TableView.of_table(names, constants, deleted, regrouped)
    return TableFile(path, info.size or 0, info.mtime_ns or 0, view)


def _is_regrouped(own: pa.Field, field: pa.Field) -> bool:
    """Whether fields of structs within have other names in the file than in the table.

    Iceberg knows them by their ids. Fields that were only added or dropped do not count.
    """
    there, here = _inner_fields(own.type), _inner_fields(field.type)
    if not pa.types.is_struct(field.type):
        return any(_is_regrouped(*pair) for pair in zip(there, here, strict=False))
    by_id = {_field_id(part): part for part in here}
    names = {part.name for part in here}
    for part in there:
        same = by_id.get(_field_id(part))
        if part.name in names if same is None else same.name != part.name:
            return True
        if same is not None and _is_regrouped(part, same):
            return True
    return False


def _inner_fields(kind: pa.DataType) -> list[pa.Field]:
    return [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []


def _field_id(field: pa.Field) -> bytes | None:
    """Iceberg's id of a field, as its Parquet files have it."""
    return (field.metadata or {}).get(b"PARQUET:field_id")


def _iceberg_deletions(address: str, tasks: Iterable[Any]) -> dict[str, np.ndarray]:
    """The deleted rows of each data file, from position deletes and deletion vectors."""
    wanted: dict[str, dict[str, None]] = {}
    sources: dict[str, Any] = {}
    for task in tasks:
        for file in task.delete_files:
            if str(file.content.name) == "EQUALITY_DELETES":
                raise InputError(
                    f"{address} has equality deletes, which are not applied: compact the table "
                    "(rewrite_data_files) or write its rows to Parquet first"
                )
            sources[file.file_path] = file
            wanted.setdefault(file.file_path, {})[task.file.file_path] = None
    deleted_rows: dict[str, list[np.ndarray]] = {}
    for path, positions in zip(
        sources, in_threads(_read_positions, list(sources.values())), strict=True
    ):
        for data_file, rows in positions.items():
            if data_file in wanted[path]:
                deleted_rows.setdefault(data_file, []).append(rows)
    return {path: np.concatenate(rows) for path, rows in deleted_rows.items()}


def _read_positions(file: Any) -> dict[str, np.ndarray]:
    path = _file_address(file.file_path)
    filesystem, inner = open_filesystem(path)
    kind = file.file_format.value.upper()
    if kind == "PUFFIN":
        from pyiceberg.table.deletion_vector import deletion_vectors_from_puffin_file
        from pyiceberg.table.puffin import PuffinFile

        with filesystem.open_input_stream(inner) as stream:
            puffin = PuffinFile(stream.read())
        vectors = deletion_vectors_from_puffin_file(puffin)
        return {v.referenced_data_file: v.to_vector().to_numpy() for v in vectors}
    if kind != "PARQUET":
        raise InputError(f"{path}: deletes in {kind} are not read; compact the table")
    table = pq.read_table(inner, filesystem=filesystem, columns=["file_path", "pos"])
    paths = table["file_path"].to_numpy(zero_copy_only=False)
    rows = table["pos"].to_numpy()
    return {name: rows[paths == name] for name in set(paths)}


def _file_address(location: str) -> str:
    """A file's location as Iceberg writes it, as an address."""
    scheme, _, rest = location.partition("://")
    if scheme == "file":
        return rest
    if location.startswith("file:"):
        return location.removeprefix("file:")
    return f"s3://{rest}" if scheme in ("s3a", "s3n") else location


# ---- Lance


def lance_options(address: str) -> dict[str, str]:
    """How Lance reaches an address."""
    if "://" not in address:
        return {}
    settings = s3_settings(address)
    options = {f"aws_{name}": value for name, value in settings.items()}
    if settings.get("endpoint", "").startswith("http://"):
        options["allow_http"] = "true"
    return options


def open_lance(address: str, version: str | int = "") -> Any:
    """A Lance dataset at a version, a tag or a time.

    Without one: the published version of a store, whose newest may be one that was refused or a
    night's that is not finished; the newest of any other. Raises :class:`InputError` where there
    is none.
    """
    import lance  # slow, and few inputs are of this kind

    time = _as_time(str(version)) if version else None
    number = int(version) if version and time is None else None
    try:
        options = lance_options(address)
        dataset = lance.dataset(plain_uri(address), number, storage_options=options)
        if time is not None:
            return dataset.checkout_version(_lance_version_at(dataset, time))
        tags = {} if version else dataset.tags.list()
        if PUBLISHED in tags:
            return dataset.checkout_version(tags[PUBLISHED]["version"])
    except (ValueError, OSError) as error:
        if version:
            raise _no_version(address, str(version), error) from error
        raise InputError(f"{address} is not a Lance dataset: {first_line(error)}") from error
    base, given = split_options(address)
    store, _, name = base.rpartition("/")
    if not version and name == STORE_DOCUMENTS and exists(join(store, STORE_MARK) + given):
        raise InputError(f"{store} is a store that has published no version yet")
    return dataset


def _lance_version_at(dataset: Any, time: datetime.datetime) -> int:
    """The newest version of that time; Lance's own ``asof`` knows no time zone (14.0.2)."""
    numbers = [
        version["version"]
        for version in dataset.versions()
        if version["timestamp"].timestamp() <= time.timestamp()
    ]
    if not numbers:
        raise ValueError(_NONE_YET)
    return max(numbers)


def _lance_files(address: str, version: str) -> Iterator[TableFile]:
    dataset = open_lance(address, version)
    size, time = lance_state(dataset)
    said = f"version {dataset.version}"
    yield TableFile(address, size or 1, time, TableView(version=dataset.version, table=said))


def lance_state(dataset: Any) -> tuple[int, int]:
    """Bytes of a Lance dataset's version, and when it was written, in nanoseconds.

    A dataset that was deleted and written again has the same numbers of versions, from 1 on.
    """
    written = next(v for v in dataset.versions() if v["version"] == dataset.version)["timestamp"]
    size = sum(
        file.file_size_bytes or 0
        for fragment in dataset.get_fragments()
        for file in fragment.metadata.files
    )
    return size, int(written.timestamp() * 1_000_000) * 1000
