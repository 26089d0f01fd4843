"""What an unfinished run over shards has done, so that the same command goes on instead of over.

Everything lies under ``_work/`` of the output folder. ``state.json`` says what the run reads and
by which code; where that is no longer so, earlier work is dropped. A shard whose result lies in
``_work/STAGE/SHARD.arrow`` is done.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.on_ray import Travelling, run_on_shards
from cluster.vectors import Shard
from pipelines.runtime.command import JobResult
from pipelines.runtime.files import (
    exists,
    join,
    list_files,
    read_bytes,
    remove_files,
    remove_folder,
    write_bytes,
)
from pipelines.runtime.run_record import RunRecord, require_unchanged, source_digest

WORK_FOLDER = "_work"
_STATE = "state.json"


@dataclass(frozen=True)
class Work:
    """The folder of a run's unfinished work; ``folder`` None keeps nothing."""

    folder: str | None = None

    @classmethod
    def begin(cls, output: str, state: Mapping[str, Any]) -> Work:
        """The work of an earlier run in ``output`` with the same ``state``, or a new one."""
        folder = join(output, WORK_FOLDER)
        wanted = json.dumps({**state, "source_sha256": source_digest()}, sort_keys=True).encode()
        try:
            same = read_bytes(join(folder, _STATE)) == wanted
        except FileNotFoundError:
            same = False
        if not same:
            remove_folder(folder)
            write_bytes(join(folder, _STATE), wanted)
        return cls(folder)

    @classmethod
    def confirm(
        cls, record: RunRecord | None, output: str, name: str, digest: str
    ) -> JobResult | None:
        """The result of a run that is complete, where what it read is still so; else None.

        ``name`` is the metric with the ``digest`` of that. Raises :class:`InputError` where it has
        changed.
        """
        if record is None or not record.settled or record.previous is None:
            return None
        require_unchanged(output, record.previous, name, digest)
        cls(join(output, WORK_FOLDER)).end()
        return JobResult(summary={"nothing to do": f"{output} is complete, its input unchanged"})

    def end(self) -> None:
        """Let all of it go."""
        if self.folder is not None:
            remove_folder(self.folder)

    def on_shards(
        self,
        stage: str,
        function: Callable[[Shard], Travelling],
        shards: Sequence[Shard],
        **pool: Any,
    ) -> Iterator[dict[str, pa.Table]]:
        """The tables of ``function(shard)`` for every shard, those that are done from their files.

        ``stage`` names the folder of the results, so it must say what decides them beside the
        run's state.
        """
        folder = None if self.folder is None else join(self.folder, stage)
        done = set() if folder is None else set(list_files(folder))
        missing = [shard for shard in shards if f"{shard.name}.arrow" not in done]
        for shard in shards:
            if folder is not None and f"{shard.name}.arrow" in done:
                yield _from_bytes(read_bytes(join(folder, f"{shard.name}.arrow")))
        if not missing:
            return
        for tables in run_on_shards(
            _Named(function), missing, stage=stage.partition("-")[0], **pool
        ):
            name = tables.pop(_SHARD).column(0)[0].as_py()
            if folder is not None:
                write_bytes(join(folder, f"{name}.arrow"), _to_bytes(tables))
            yield tables

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` returned the first time: arrays, numbers and texts by name."""
        if self.folder is None:
            return make()
        path = join(self.folder, f"{name}.npz")
        if not exists(path):
            buffer = io.BytesIO()
            np.savez(buffer, **make())
            write_bytes(path, buffer.getvalue())
        with np.load(io.BytesIO(read_bytes(path))) as kept:
            return {key: kept[key] if kept[key].ndim else kept[key].item() for key in kept}


_SHARD = "shard"


class _Named:
    """A function of shards whose results say which shard they are of."""

    def __init__(self, function: Callable[[Shard], Travelling]) -> None:
        self._function = function

    def __call__(self, shard: Shard) -> _Tables:
        tables = self._function(shard).to_tables()
        return _Tables({**tables, _SHARD: pa.table({"name": [shard.name]})})


@dataclass(frozen=True)
class _Tables:
    tables: dict[str, pa.Table]

    def to_tables(self) -> dict[str, pa.Table]:
        return self.tables


def _to_bytes(tables: Mapping[str, pa.Table]) -> pa.Buffer:
    """Named tables as Arrow streams, one after the other; the first holds the names."""
    sink = pa.BufferOutputStream()
    for table in (pa.table({"name": list(tables)}), *tables.values()):
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return sink.getvalue()


def _from_bytes(content: bytes) -> dict[str, pa.Table]:
    source = pa.BufferReader(content)
    names = pa.ipc.open_stream(source).read_all().column("name").to_pylist()
    return {name: pa.ipc.open_stream(source).read_all() for name in names}


def remove_stale(folder: str, own: str, written: set[str]) -> None:
    """Delete what an earlier run of this job left in ``folder``, and nothing else.

    That is a file whose whole name matches the pattern ``own`` and is not in ``written``.
    """
    names = [name for name in list_files(folder) if re.fullmatch(own, name)]
    remove_files([join(folder, name) for name in names if name not in written])
