"""What a person does with a store: look, publish, go back, prune, verify, export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.runtime.arrow import column_to_vectors
from pipelines.runtime.command import Answer
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    join,
    json_bytes,
    list_files,
    make_folder,
    open_filesystem,
    with_retries,
    write_bytes,
    write_table,
)
from pipelines.runtime.tables import PUBLISHED
from pipelines.store.backfill import show_backfills
from pipelines.store.columns import EMBEDDING, PASSAGE_COLUMNS
from pipelines.store.compare import compare_versions
from pipelines.store.config import (
    BackfillConfig,
    CompareConfig,
    EditConfig,
    ExportConfig,
    Format,
    ListConfig,
    PruneConfig,
    PublishConfig,
    RollbackConfig,
    ShowConfig,
    TagConfig,
    UntagConfig,
    VerifyConfig,
)
from pipelines.store.edits import edit_store
from pipelines.store.index import unit
from pipelines.store.records import read_record, sealed_numbers
from pipelines.store.store import Store
from pipelines.store.verify import verify_store
from pipelines.store.version import Version

FILE_BYTES = 128 << 20


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    rows: int
    files: tuple[str, ...]


def export(version: Version, output: str, kind: Format) -> Exported:
    """Write a version into a folder that is empty or missing; :class:`InputError` for any other.

    Every artifact of the version goes along, and ``export.json`` comes last: it says what of which
    store this is, and that it is whole.
    """
    files = list_files(output)
    if files:
        raise InputError(
            f"--output {output} is not empty (it holds {files[0]!r}): name a new folder"
        )
    exported = (
        _export_parquet(version, output) if kind == "parquet" else _export_faiss(version, output)
    )
    for name in version.artifacts():
        write_bytes(join(output, name), version.read(name))
    content = {
        "store": version.store,
        "version": version.number,
        "created_at": version.record.created_at,
        "encoder_fingerprint": version.record.fingerprint,
        "rows": exported.rows,
        "files": list(exported.files),
    }
    write_bytes(join(output, "export.json"), json_bytes(content))
    return exported


def _export_parquet(version: Version, output: str) -> Exported:
    """``documents/part-NNNNN.parquet`` with every column, about 128 MiB each."""
    make_folder(join(output, "documents"))
    files: list[str] = []
    pending: list[pa.RecordBatch] = []
    rows = 0

    def flush() -> None:
        name = f"documents/part-{len(files):05d}.parquet"
        write_table(join(output, name), pa.Table.from_batches(pending, version.schema))
        files.append(name)
        pending.clear()

    for batch in version.batches():
        pending.append(batch)
        rows += batch.num_rows
        if sum(part.nbytes for part in pending) >= FILE_BYTES:
            flush()
    if pending or not files:
        flush()
    return Exported(rows, tuple(files))


def _export_faiss(version: Version, output: str) -> Exported:
    """``index.faiss``, an exact inner-product index of unit vectors, and ``ids.parquet``.

    Row n of ``ids.parquet`` (columns ``position``, ``id``, and of passages whose they are and
    where) is vector n of the index.
    """
    make_folder(output)
    names = ["id", *(name for name in PASSAGE_COLUMNS if name in version.schema.names)]
    rows, dimension = version.count(), version.schema.field(EMBEDDING).type.list_size
    index = faiss.IndexFlatIP(dimension)
    index.codes.resize(rows * index.code_size)  # `add` would grow it by copying
    index.ntotal = rows
    vectors = faiss.rev_swig_ptr(index.get_xb(), rows * dimension).reshape(rows, dimension)
    batches, start = [], 0
    for batch in version.batches([*names, EMBEDDING]):
        vectors[start : start + batch.num_rows] = unit(column_to_vectors(batch.column(EMBEDDING)))
        batches.append(batch.select(names))
        start += batch.num_rows
    schema = pa.schema([version.schema.field(name) for name in names])
    table = pa.Table.from_batches(batches, schema)
    table = table.add_column(0, "position", pa.array(range(rows), pa.int64()))
    write_table(join(output, "ids.parquet"), table)
    _write_index(index, join(output, "index.faiss"))
    return Exported(rows, ("index.faiss", "ids.parquet"))


def _write_index(index: faiss.Index, address: str) -> None:
    """Write an index without a second copy of it in memory."""
    filesystem, inner = open_filesystem(address)
    if isinstance(filesystem, pafs.LocalFileSystem):
        part = Path(inner).with_name(".index.faiss")
        faiss.write_index(index, str(part))
        part.replace(inner)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "index.faiss"))
        faiss.write_index(index, path)
        local = pafs.LocalFileSystem()
        with_retries(lambda: pafs.copy_files(path, inner, local, filesystem), address)


_JOB = "manage_store"


def list_versions(config: ListConfig) -> Answer:
    """All versions, newest last."""
    store = Store.open(config.store)
    tags = store.tags()
    rows, data = [], []
    for number in sealed_numbers(config.store):
        record = read_record(config.store, number)
        names = [name for name, tagged in tags.items() if tagged == number]
        rows.append(
            [
                str(number),
                ", ".join(names) or ("refused" if record.reasons else ""),
                record.created_at,
                ", ".join(f"{name} {count:,}" for name, count in record.counts.items() if count),
                ", ".join(f"{k} {_figure(v)}" for k, v in flatten(record.scores).items()),
            ]
        )
        data.append(
            {
                "version": number,
                "tags": names,
                "published": PUBLISHED in names,
                "created_at": record.created_at,
                "base": record.base,
                "fingerprint": record.fingerprint,
                "counts": dict(record.counts),
                "scores": dict(record.scores),
                "reasons": list(record.reasons),
            }
        )
    columns = ("version", "state", "created", "counts", "scores")
    return Answer(data, f"{config.store}: {len(rows)} versions", columns, rows)


def show_version(config: ShowConfig) -> Answer:
    """Everything that a version's record says."""
    store = Store.open(config.store)
    version = store.version(config.version)
    record = version.record
    names = [name for name, number in store.tags().items() if number == version.number]
    artifacts = {name: version.path(name) for name in version.artifacts()}
    data = {**record.to_json(), "tags": names, "artifacts": artifacts}
    shown = {
        "tags": ", ".join(names) or "none",
        "created": record.created_at,
        "built from": "nothing" if record.base is None else f"version {record.base}",
        "encoder": record.fingerprint,
        "refused because": "; ".join(record.reasons),
        **{f"count: {name}": f"{count:,}" for name, count in record.counts.items()},
        **{f"score: {name}": _figure(value) for name, value in flatten(record.scores).items()},
        **{f"index: {name}": _figure(value) for name, value in (record.index or {}).items()},
        **{f"detail: {name}": _figure(value) for name, value in flatten(record.details).items()},
        **{f"artifact: {name}": path for name, path in artifacts.items()},
    }
    rows = [[name, value] for name, value in shown.items() if value]
    return Answer(data, f"{config.store}: version {version.number}", rows=rows)


def publish_version(config: PublishConfig) -> Answer:
    """Move the tag to a version."""
    store = Store.open(config.store)
    version = store.version(config.version)
    with store.take_lease(_JOB) as lease:
        before = store.published()
        store.publish(config.version, lease)
    notes = [f"a night refused this version: {reason}" for reason in version.record.reasons]
    return _moved(store, before, version, notes)


def roll_back(config: RollbackConfig) -> Answer:
    """Move the tag to the version that was published before."""
    store = Store.open(config.store)
    with store.take_lease(_JOB) as lease:
        before = store.published()
        version = store.rollback(lease)
    return _moved(store, before, version, [])


def _moved(store: Store, before: Version | None, after: Version, notes: list[str]) -> Answer:
    old = None if before is None else before.number
    rows = [
        ["published before", "none" if old is None else str(old)],
        ["published now", str(after.number)],
        ["documents", f"{after.count():,}"],
    ]
    data = {"previous": old, "published": after.number}
    return Answer(data, store.uri, rows=rows, notes=notes)


def prune_versions(config: PruneConfig) -> Answer:
    """Remove old versions."""
    store = Store.open(config.store)
    if config.keep < 1:
        raise InputError(f"--keep is {config.keep}; at least one version must stay")
    with store.take_lease(_JOB) as lease:
        removed = store.prune(lease, config.keep)
    left = sealed_numbers(config.store)
    rows = [
        ["removed", ", ".join(map(str, removed)) or "none"],
        ["left", ", ".join(map(str, left)) or "none"],
    ]
    return Answer({"removed": removed, "left": left}, config.store, rows=rows)


def verify_versions(config: VerifyConfig) -> Answer:
    """Check all versions."""
    store = Store.open(config.store)
    problems = verify_store(store)
    numbers = sealed_numbers(config.store)
    rows = [
        ["versions", str(len(numbers))],
        ["problems", str(len(problems)) if problems else "none"],
    ]
    data = {"versions": numbers, "problems": problems}
    return Answer(data, config.store, rows=rows, problems=problems)


def export_version(config: ExportConfig) -> Answer:
    """Write a version elsewhere."""
    version = Store.open(config.store).version(config.version)
    exported = export(version, config.output, config.format)
    rows = [
        ["version", str(version.number)],
        ["documents", f"{exported.rows:,}"],
        ["files", str(len(exported.files))],
        ["output", config.output],
    ]
    return Answer({"version": version.number, **asdict(exported)}, config.store, rows=rows)


def tag_version(config: TagConfig) -> Answer:
    """Name a version."""
    store = Store.open(config.store)
    with store.take_lease(_JOB) as lease:
        store.tag(config.version, config.name, lease)
    return _tags(store)


def untag_version(config: UntagConfig) -> Answer:
    """Take a name away."""
    store = Store.open(config.store)
    with store.take_lease(_JOB) as lease:
        store.untag(config.name, lease)
    return _tags(store)


def _tags(store: Store) -> Answer:
    tags = store.tags()
    return Answer(tags, store.uri, ("tag", "version"), [[k, str(v)] for k, v in tags.items()])


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as ``outer.inner``; what is None is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def _figure(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        entries = (
            {k: _figure(v) for k, v in entry.items() if k != "says" and v is not None}
            for entry in value
        )
        return "\n".join(", ".join(f"{k} {v}" for k, v in entry.items()) for entry in entries)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_ANSWERS: dict[type[Any], Callable[[Any], Answer]] = {
    ListConfig: list_versions,
    ShowConfig: show_version,
    PublishConfig: publish_version,
    RollbackConfig: roll_back,
    PruneConfig: prune_versions,
    VerifyConfig: verify_versions,
    ExportConfig: export_version,
    TagConfig: tag_version,
    UntagConfig: untag_version,
    EditConfig: edit_store,
    CompareConfig: compare_versions,
    BackfillConfig: show_backfills,
}


def manage_store(config: Any) -> Answer:
    """Do what one of :data:`pipelines.store.config.VERBS` asks for."""
    return _ANSWERS[type(config)](config)
