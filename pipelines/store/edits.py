"""What people decide about clusters: a journal that nights apply, whatever the next fit finds.

Each edit is a file ``edits/NNNNNNNN.json`` with the next number, which only one writer can create:
two people at once get two numbers, and the second is held against the first's edit. Nothing is
ever rewritten; an undo is an entry of its own. ``edits.parquet`` of a version says what became of
each edit in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa

from pipelines.runtime.command import Answer
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import (
    create_exclusively,
    in_threads,
    join,
    json_bytes,
    list_numbered,
    numbered_file,
    read_bytes,
)
from pipelines.store.columns import PASSAGE_COLUMNS
from pipelines.store.config import EditConfig
from pipelines.store.documents import Documents
from pipelines.store.store import Store
from pipelines.store.version import Version

Action = Literal["name", "merge", "split", "pin", "forbid", "note", "undo"]
Status = Literal["waiting", "applied", "lost", "undone"]

EDITS = "edits.parquet"
EDITS_KEY = "edits"
"""In a record's details: number of the last edit that the version knows of."""
_FOLDER = "edits"
SCHEMA = pa.schema(
    [
        ("edit", pa.int64()),
        ("action", pa.string()),
        ("cluster_ids", pa.list_(pa.int32())),
        ("document_id", pa.string()),
        ("text", pa.string()),
        ("note", pa.string()),
        ("who", pa.string()),
        ("at", pa.string()),
        ("status", pa.string()),
        ("since_version", pa.int64()),
        ("overrode", pa.string()),
        ("says", pa.string()),
    ]
)
"""``status`` is ``applied``, ``waiting`` (for what it needs), ``lost`` (its cluster died) or
``undone``; ``since_version`` the version that applied it first; ``overrode`` what would be there
without it, such as the name made of keywords."""


@dataclass(frozen=True)
class Edit:
    """One decision of a person."""

    number: int
    action: Action
    clusters: tuple[int, ...]
    """The cluster that it is about; of a merge the one that stays, then the one that joins it."""
    document: str
    text: str
    """The name that it gives; empty where it gives none."""
    note: str
    """Why, or the remark."""
    undoes: int | None
    who: str
    at: str
    version: int
    """The version that was published when it was made."""

    def describe(self) -> str:
        """What it says and by whom, for people."""
        what = " ".join([*([self.document] if self.document else []), *map(str, self.clusters)])
        text = "".join(f" {said!r}" for said in (self.text, self.note) if said)
        what = f"{what}{text}" if self.undoes is None else f"of edit {self.undoes}{text}"
        number = f"edit {self.number}" if self.number else "this edit"
        return f"{number} ({self.action} {what.strip()}, by {self.who} at {self.at})"


def read_edits(store: str) -> list[Edit]:
    """Every entry of the journal in order, undone ones and undos among them."""
    paths = list(list_numbered(join(store, _FOLDER)).values())
    contents = in_threads(lambda path: json.loads(read_bytes(path)), paths)
    # an entry of an earlier release has its note in its text
    return [
        Edit(**{"note": "", **content, "clusters": tuple(content["clusters"])})
        for content in contents
    ]


def active_edits(edits: Sequence[Edit]) -> list[Edit]:
    """The edits that hold: neither undone nor undos."""
    undone = {edit.undoes for edit in edits}
    return [edit for edit in edits if edit.action != "undo" and edit.number not in undone]


def merge_targets(edits: Sequence[Edit]) -> dict[int, int]:
    """For each cluster that was merged away, the one that it is part of, chains followed."""
    direct = merged_into(edits)
    return {cluster: follow(direct, cluster) for cluster in direct}


def merged_into(edits: Sequence[Edit]) -> dict[int, int]:
    """For each cluster that was merged away, the one that its own edit names."""
    return {e.clusters[1]: e.clusters[0] for e in edits if e.action == "merge"}


def home_of(cluster: int, merged: Mapping[int, int], published: Mapping[int, int]) -> int | None:
    """The cluster that one lives on as; None where it is no more.

    ``merged`` is of :func:`merged_into`; ``published`` has, by part, the cluster that it is
    published as. One that was merged and has no part any more lives on in what it was merged into.
    """
    while cluster not in published and cluster in merged:
        cluster = merged[cluster]
    return published.get(cluster)


def follow(direct: Mapping[int, int], cluster: int) -> int:
    """Where steps from one cluster to the next end."""
    while cluster in direct:
        cluster = direct[cluster]
    return cluster


def read_applied(version: Version) -> pa.Table:
    """``edits.parquet`` of a version, of :data:`SCHEMA`; empty where it has none."""
    if EDITS not in version.record.artifacts:
        return SCHEMA.empty_table()
    return version.read_table(EDITS)


def entry_of(edit: Edit) -> dict[str, Any]:
    """What ``edits.parquet`` has of an edit itself, whatever became of it."""
    return {
        "edit": edit.number,
        "action": edit.action,
        "cluster_ids": list(edit.clusters),
        "document_id": edit.document or None,
        "text": edit.text,
        "note": edit.note,
        "who": edit.who,
        "at": edit.at,
    }


def known_edits(version: Version) -> int:
    """Number of the last edit that a version knows of; 0 for none."""
    return int(version.record.details.get(EDITS_KEY, 0))


def add_edit(store: Store, edit: Edit, done: Collection[int] = ()) -> Edit:
    """Enter an edit under the next number, which it gets here; ``done`` as in the check.

    Raises :class:`InputError` where the journal holds one that says otherwise; both are named.
    """
    while True:
        edits = read_edits(store.uri)
        if edits and len(edits) < edits[-1].number:
            edits = read_edits(store.uri)  # a listing may miss what was made while it went on
        number = edits[-1].number + 1 if edits else 1
        require_no_conflict(replace(edit, number=0), edits, done)
        edit = replace(edit, number=number)
        path = numbered_file(join(store.uri, _FOLDER), number)
        if create_exclusively(path, json_bytes(asdict(edit))):
            return edit


def require_no_conflict(edit: Edit, edits: Sequence[Edit], done: Collection[int] = ()) -> None:
    """Raise :class:`InputError` where an edit and one that holds cannot both be followed.

    ``done`` are numbers of edits that have been done once for all, and ask for nothing more.
    """
    active = active_edits(edits)
    if edit.action == "undo":
        if edit.undoes not in {other.number for other in active}:
            numbers = ", ".join(str(other.number) for other in active) or "none"
            raise InputError(
                f"edit {edit.undoes} does not hold, so it cannot be undone; those that hold: "
                f"{numbers}"
            )
        return
    active = [other for other in active if other.number not in done]
    targets = merge_targets(active)
    for other in active:
        reason = _conflict(edit, other) or _merged_away(edit, other, targets)
        if reason:
            raise InputError(
                f"{edit.describe()} against {other.describe()}: {reason}; undo that one first "
                f"(edit --undo {other.number})"
            )
    _require_apart(edit, active, targets)


def _conflict(edit: Edit, other: Edit) -> str:
    """Why two edits cannot both hold; empty where they can."""
    kinds = {edit.action, other.action}
    both = set(edit.clusters) & set(other.clusters)
    if kinds == {"name"} and both:
        return f"cluster {edit.clusters[0]} has a name already"
    if kinds == {"pin"} and edit.document == other.document:
        return f"document {edit.document!r} is pinned already"
    if kinds == {"split"} and both:
        return f"cluster {edit.clusters[0]} is to be split already"
    if kinds == {"merge", "split"} and both:
        return "a cluster is merged and split"
    if kinds == {"merge", "name"}:
        merge, name = (edit, other) if edit.action == "merge" else (other, edit)
        if merge.clusters[1] == name.clusters[0]:
            return f"cluster {name.clusters[0]} is named, and part of another"
    if kinds == {"forbid"} and set(edit.clusters) == set(other.clusters):
        return "these two are kept apart already"
    return ""


def _merged_away(edit: Edit, other: Edit, targets: dict[int, int]) -> str:
    """Why an edit is about a cluster that ``other``, a merge, took away; empty where it is not."""
    if other.action != "merge" or other.clusters[1] not in edit.clusters:
        return ""
    gone = other.clusters[1]
    return f"cluster {gone} is part of cluster {targets[gone]}"


def _require_apart(edit: Edit, active: Sequence[Edit], targets: dict[int, int]) -> None:
    """Raise where clusters that are kept apart would be one, through whatever other merges."""
    if edit.action not in ("merge", "forbid"):
        return
    first, second = edit.clusters
    if first == second:
        raise InputError(f"{edit.action} takes two clusters; {first} is given twice")
    groups = merge_targets([*active, edit])
    for other in [*active, edit]:
        if other.action == "forbid":
            ends = {groups.get(cluster, cluster) for cluster in other.clusters}
            if len(ends) < 2:
                blamed = edit
                if edit.action == "forbid":
                    merges = [e for e in active if e.action == "merge"]
                    blamed = next(m for m in merges if set(m.clusters) & set(edit.clusters))
                pair = (edit, other) if other is not edit else (edit, blamed)
                raise InputError(
                    f"{pair[0].describe()} against {pair[1].describe()}: clusters that are kept "
                    f"apart would be one; undo that one first (edit --undo {pair[1].number})"
                )


def edit_store(config: EditConfig) -> Answer:
    """Enter an edit, or list all; no lease is taken, as nothing but the journal is written."""
    store = Store.open(config.store)
    edit = _edit_of(config)
    if edit is None:
        return list_edits(store)
    version = store.version()
    if edit.document:
        edit = replace(edit, document=str(document_id(edit.document, version)))
    edit, done = replace(edit, version=version.number), splits_done(version)
    require_no_conflict(edit, read_edits(store.uri), done)
    _require_there(edit, version)
    if edit.undoes in done:
        raise InputError(
            f"edit {edit.undoes} has been done ({done[edit.undoes]}): --merge the two clusters "
            "instead"
        )
    edit = add_edit(store, edit, done)
    rows = [["entered", edit.describe()], ["takes effect", "with the next night"]]
    return Answer(asdict(edit), config.store, rows=rows)


def list_edits(store: Store) -> Answer:
    """All edits with what the published version made of them."""
    edits, published = read_edits(store.uri), store.published()
    applied = (
        {} if published is None else {r["edit"]: r for r in read_applied(published).to_pylist()}
    )
    holds = {edit.number for edit in active_edits(edits)}
    data = []
    for edit in edits:
        became = applied.get(edit.number, {})
        status = became.get("status", "waiting") if edit.number in holds else "undone"
        status = "" if edit.action == "undo" else status
        extra = {"status": status, "overrode": became.get("overrode"), "says": became.get("says")}
        data.append({**asdict(edit), **extra})
    rows = [[e.describe(), d["status"], d["says"] or ""] for e, d in zip(edits, data, strict=True)]
    return Answer(data, f"{store.uri}: {len(edits)} edits", ("edit", "status", ""), rows)


def splits_done(version: Version) -> dict[int, str]:
    """Numbers of the splits that a version has behind it, with what came out of each."""
    return {
        row["edit"]: row["says"]
        for row in read_applied(version).to_pylist()
        if row["action"] == "split" and row["status"] == "applied"
    }


def _edit_of(config: EditConfig) -> Edit | None:
    """The edit that the flags ask for, not yet checked; None without one."""
    clusters: tuple[int, ...] = ()
    document, text, undoes = "", "", None
    action: Action = "note"
    if config.name is not None:
        action, clusters, text = "name", (config.name[0],), config.name[1].strip()
    elif config.merge is not None:
        action, clusters = "merge", config.merge
    elif config.split is not None:
        action, clusters = "split", (config.split,)
    elif config.pin is not None:
        action, document, clusters = "pin", config.pin[0], (config.pin[1],)
    elif config.forbid is not None:
        action, clusters = "forbid", config.forbid
    elif config.undo is not None:
        action, undoes = "undo", config.undo
    elif not config.note:
        return None
    at = datetime.now(UTC).isoformat(timespec="seconds")
    who = config.who or os.environ.get("USER") or "unknown"
    return Edit(0, action, clusters, document, text, config.note, undoes, who, at, 0)


def _require_there(edit: Edit, version: Version) -> None:
    """Raise :class:`InputError` for a cluster or a document that the version does not have."""
    known = set(cluster_ids_of(version))
    for cluster in edit.clusters:
        if cluster not in known:
            raise InputError(
                f"version {version.number} has no cluster {cluster}; it has "
                f"{', '.join(map(str, sorted(known)[:20]))}{' …' if len(known) > 20 else ''}"
            )
    if edit.document and not pinned_rows([edit.document], version.documents)[edit.document]:
        raise InputError(f"version {version.number} has no document with id {edit.document!r}")


def cluster_ids_of(version: Version) -> list[int]:
    """Ids of a version's clusters, each once."""
    if "centroids.parquet" not in version.record.artifacts:
        raise InputError(f"version {version.number} of {version.store} has no clusters to edit")
    return sorted(set(version.read_table("centroids.parquet")["cluster_id"].to_pylist()))


def pinned_rows(names: Sequence[str], documents: Documents) -> dict[str, list[Any]]:
    """For each document, by its id as people write it, ids of its rows; of passages all of its."""
    rows: dict[str, list[Any]] = {name: [] for name in names}
    if rows:
        column = _document_column(documents)
        written = {document_id(name, documents): name for name in rows}
        for table in documents.holding(column, list(written), dict.fromkeys((column, "id"))):
            for own, row_id in zip(table[column].to_pylist(), table["id"].to_pylist(), strict=True):
                rows[written[own]].append(row_id)
    return rows


def _document_column(source: Any) -> str:
    """The column of documents' ids; rows that are passages have others of their own."""
    return PASSAGE_COLUMNS[0] if {*PASSAGE_COLUMNS} <= {*source.schema.names} else "id"


def document_id(text: str, source: Any) -> str | int:
    """An id as people write it, in the store's type; ``source`` has the documents' ``schema``."""
    if not pa.types.is_integer(source.schema.field(_document_column(source)).type):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"id {text!r}: the documents' ids are integers") from error
