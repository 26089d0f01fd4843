"""Unfinished work of nights: a folder a night, to be gone on with or drawn on.

``STORE/_work/NAME/`` belongs to one state of the corpus, one version it is compared with and one
set of options: ``NAME`` is a digest of them. A night that is the same goes on in its folder;
another one takes the vectors that are there over, and then removes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.corpus import CorpusFile
from pipelines.embedding.embed_config import MAY_CHANGE, EmbedConfig
from pipelines.embedding.vectors import find_done_chunks
from pipelines.embedding.work_plan import WORK_FOLDER, WorkPlan, listing_of
from pipelines.storage import join, list_files, remove_folder

_NAME_DIGITS = 20


@dataclass(frozen=True)
class Leftover:
    """Vectors that another night computed: its work folder and chunks, by partition of texts."""

    work: str
    chunks: dict[str, list[int]]


def night_folder(
    root: str,
    config: EmbedConfig,
    files: Sequence[CorpusFile],
    fingerprint: str,
    versions: Sequence[int],
) -> str:
    """The folder of this night under ``root``; ``versions`` are those it is compared with."""
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    settings.pop("output")
    deciding = [settings, listing_of(files), fingerprint, list(versions)]
    text = json.dumps(deciding, sort_keys=True, default=str)
    return join(root, hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS])


def find_leftovers(root: str, mine: str, fingerprint: str) -> list[Leftover]:
    """Vectors of the same encoder in the folders of other nights."""
    found = []
    for folder in other_folders(root, mine):
        work = join(folder, WORK_FOLDER)
        plan = WorkPlan.load(work)
        if plan is None or plan.fingerprint != fingerprint:
            continue
        chunks: dict[str, list[int]] = {}
        for name in sorted(find_done_chunks(work)):
            partition, number = name.rsplit("-", 1)
            chunks.setdefault(partition, []).append(int(number))
        if chunks:
            found.append(Leftover(work, chunks))
    return found


def other_folders(root: str, mine: str) -> list[str]:
    """Folders under ``root`` that are not this night's."""
    names = {name.split("/")[0] for name in list_files(root) if "/" in name}
    return [join(root, name) for name in sorted(names) if join(root, name) != mine]


def remove_work(folders: Sequence[Any]) -> None:
    """Delete folders of work."""
    for folder in folders:
        remove_folder(folder)
