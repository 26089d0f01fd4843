"""A file that is as it was is not read: keys of files are kept in the store from night to night.

Keys are a function of a file's state (path, size, time of change) and of how it is read. They are
kept in ``STORE/keys/READING/`` under a name that digests the state, where ``READING`` digests how.
A file that was replaced by another of the same size and time is not noticed, as in any tool that
goes by these; ``--reread`` looks at every file. Where a store tells no time, files are always read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.corpus.files import CorpusFile, listing_of
from pipelines.embedding.config import EmbedConfig
from pipelines.embedding.job import EmbedRun, reading_of
from pipelines.embedding.plan import short_digest
from pipelines.encoder.description import EncoderConfig
from pipelines.runtime.files import (
    join,
    open_filesystem,
    remove_files,
    remove_folder,
    with_retries,
)
from pipelines.runtime.run_record import deciding_settings

FOLDER = "keys"
YOUNG_NS = 2_000_000_000
"""A file may be written once more within a tick of its store's clock: so young a state is not
trusted to be the one that was read."""


def with_known_files(
    run: EmbedRun, store: str, types: Mapping[str, pa.DataType], *, reread: bool, backfills: bool
) -> EmbedRun:
    """``run`` with the keys of files in the store; what is of no use there any more is removed.

    ``types`` are those in which kept columns are digested. With ``reread`` none are kept. While
    there are ``backfills``, nights of two encoders take turns, and each leaves the other's keys.
    """
    root = join(store, FOLDER)
    if reread:
        remove_folder(root)
        return run
    reading = short_digest(_reading(run, types))
    _tidy(root, reading, run.files, spare_others=backfills)
    return replace(run, scan=replace(run.scan, keys=(root, reading)))


def corpus_digest(
    config: EmbedConfig, files: Sequence[CorpusFile], fingerprint: str, began_ns: int
) -> str | None:
    """What must be equal for a night to have nothing to do; None where that cannot be told.

    ``began_ns`` is when the files were listed.
    """
    if any(not file.modified_ns or file.modified_ns > began_ns - YOUNG_NS for file in files):
        return None
    # the fingerprint says what the encoder is; --dtype auto becomes the store's after a first night
    left_out = {"output", *(option.name for option in fields(EncoderConfig))}
    asked = deciding_settings(config)
    settings = {name: value for name, value in asked.items() if name not in left_out}
    return short_digest([settings, config.skip_unreadable_files, listing_of(files), fingerprint])


def _reading(run: EmbedRun, types: Mapping[str, pa.DataType]) -> list[Any]:
    """All that decides the keys of a file beside its state."""
    kinds = sorted((name, str(kind)) for name, kind in types.items())
    return [*reading_of(run.scan, run.files), kinds]


def _tidy(root: str, reading: str, files: Sequence[CorpusFile], *, spare_others: bool) -> None:
    """Remove keys of other readings and states, and the receipts of states that were too young."""
    modified = {shard.name: file.modified_ns for file in files for shard in file.shards()}
    filesystem, inner = open_filesystem(root)
    selector = pafs.FileSelector(inner, recursive=True, allow_not_found=True)
    gone = []
    for info in with_retries(lambda: filesystem.get_file_info(selector), root):
        folder, _, name = info.path.rpartition("/")
        shard, _, rest = name.replace(".", "-", 1).partition("-")
        is_mine = folder.endswith(f"/{reading}")
        if info.type != pafs.FileType.File or (spare_others and not is_mine):
            continue
        time_ns = modified.get(shard) if is_mine else None
        is_young = not time_ns or (info.mtime_ns or 0) < time_ns + YOUNG_NS
        if time_ns is None or (rest == "json" and is_young):
            gone.append(join(root, info.path.removeprefix(f"{inner}/")))
    remove_files(gone)
