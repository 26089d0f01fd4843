"""What an unfinished run has settled, so that the same command goes on instead of starting over.

``_work/plan.json`` is written before the first unit of work, ``_work/scanned.json`` once every
shard has been read for its keys. Until then a file of the corpus may still change: what is new is
read. After that the corpus is settled, and another one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.corpus.files import CorpusFile, Shard, listing_of
from pipelines.corpus.kept_columns import resolve_type
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import join, read_bytes, write_bytes
from pipelines.runtime.units import Receipt

WORK_FOLDER = "_work"
PARTITION_BYTES = 64 << 20
MOST_PARTITIONS = 1024
MOST_CHUNKS = 20_000
USUAL_CHUNKS = 64
"""Of a small corpus: so many that its first vectors come soon and its actors end together."""
LAYOUT = 5
"""Of the files below ``_work/``; work that another layout was begun with is not gone on with."""
_NAME_DIGITS = 20
_KEY_BYTES = 60  # digests of id and text, and where the document is
_SHORTEST_DOCUMENT_BYTES = 20  # a guess for formats whose rows only reading can count


@dataclass(frozen=True)
class WorkPlan:
    """Settled before anything is read."""

    fingerprint: str
    partitions: int
    chunk_tokens: int
    shard_bytes: int
    float16: bool = False
    least_chunk_tokens: int = 0
    layout: int = LAYOUT

    @classmethod
    def load(cls, work: str) -> WorkPlan | None:
        """The plan of an earlier run in this folder; None without one, or of another layout."""
        try:
            found = json.loads(read_bytes(join(work, "plan.json")))
        except FileNotFoundError:
            return None
        return cls(**found) if found.get("layout") == LAYOUT else None

    def save(self, work: str) -> None:
        """Write ``plan.json``."""
        write_bytes(join(work, "plan.json"), json.dumps(asdict(self)).encode())

    def size_of_chunks(self, tokens: int) -> int:
        """Tokens of a chunk where so many are to be encoded.

        The plan's; less where they are few, more where there would be too many chunks.
        """
        few = max(self.least_chunk_tokens, tokens // USUAL_CHUNKS)
        return max(min(self.chunk_tokens, few), tokens // MOST_CHUNKS)


@dataclass(frozen=True)
class ScanResult:
    """Settled once everything is read: what the receipts of all shards say together.

    ``listing`` is the corpus that was read: path, size and time of change of every file.
    ``flushes`` names the files of keys in corpus order, each with the number of its shard.
    ``shards`` has of every shard the rows, the estimated tokens and a checksum of the texts.
    """

    listing: list[list[Any]]
    rows: int = 0
    accepted: int = 0
    tokens: int = 0
    flushes: list[list[Any]] = field(default_factory=list)
    shards: list[list[int]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    id_kinds: list[str] = field(default_factory=list)
    kept_kinds: dict[str, list[str]] = field(default_factory=dict)
    cut: int | None = None
    """Documents that the accepted rows are passages of; None where rows are documents."""

    @classmethod
    def load(cls, work: str) -> ScanResult | None:
        """The finished scan of an earlier run in this folder, or None."""
        try:
            return cls(**json.loads(read_bytes(join(work, "scanned.json"))))
        except FileNotFoundError:
            return None

    def save(self, work: str) -> None:
        """Write ``scanned.json``."""
        write_bytes(join(work, "scanned.json"), json.dumps(asdict(self)).encode())

    @property
    def documents(self) -> int:
        """Rows read, and one for each file that could not be read (any further)."""
        return self.rows + len(self.problems)

    @property
    def accepted_documents(self) -> int:
        """Documents that can be embedded."""
        return self.accepted if self.cut is None else self.cut

    @property
    def id_type(self) -> pa.DataType:
        """Integer where every document's id is one, else string."""
        return pa.int64() if self.id_kinds == ["int"] else pa.string()

    def kept_types(self) -> dict[str, pa.DataType]:
        """Types of the kept columns whose values came as JSON text."""
        return {name: resolve_type(kinds) for name, kinds in self.kept_kinds.items()}


def combine_receipts(
    files: Sequence[CorpusFile],
    shards: Mapping[str, Shard],
    receipts: Mapping[str, Receipt],
    *,
    cut: bool = False,
) -> ScanResult:
    """The receipts of all shards as one :class:`ScanResult`; ``cut`` where rows are passages."""
    reasons: Counter[str] = Counter()
    id_kinds: set[str] = set()
    kept_kinds: dict[str, set[str]] = {}
    problems = {file.path: file.problem for file in files if file.problem}
    for receipt in receipts.values():
        reasons.update(receipt["reasons"])
        id_kinds.update(receipt["id_kinds"])
        for name, kinds in receipt["kept_kinds"].items():
            kept_kinds.setdefault(name, set()).update(kinds)
        if receipt["problem"]:
            problems.setdefault(receipt["file"], receipt["problem"])
    return ScanResult(
        listing=listing_of(files),
        rows=sum(r["rows"] for r in receipts.values()),
        accepted=sum(r["accepted"] for r in receipts.values()),
        tokens=sum(r["tokens"] for r in receipts.values()),
        flushes=[
            [number, f"{name}-{i:04d}"]
            for number, name in enumerate(shards)
            for i in range(receipts[name]["flushes"])
        ],
        shards=[[receipts[n][kind] for kind in ("rows", "tokens", "checksum")] for n in shards],
        reasons=dict(reasons),
        problems=problems,
        id_kinds=sorted(id_kinds),
        kept_kinds={name: sorted(kinds) for name, kinds in kept_kinds.items()},
        cut=sum(r["documents"] for r in receipts.values()) if cut else None,
    )


def check_same_corpus(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> None:
    """Raise :class:`InputError`, naming a file, where a corpus differs from when it was read."""
    old = {path: tuple(state) for path, *state in before}
    new = {path: tuple(state) for path, *state in now}
    changed = sorted(p for p in old.keys() | new.keys() if old.get(p) != new.get(p))
    if changed:
        kind = "has changed" if changed[0] in old and changed[0] in new else "is new"
        kind = kind if changed[0] in new else "is gone"
        raise InputError(
            f"the corpus is not the one this run began with: {changed[0]} {kind} "
            f"({len(changed)} files differ). Choose another --output for the new corpus"
        )


def short_digest(content: Any) -> str:
    """A name that says what ``content``, of JSON, is."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_NAME_DIGITS]


def count_partitions(files: Sequence[CorpusFile]) -> int:
    """Partitions of about :data:`PARTITION_BYTES` of keys, but no more than a shuffle can bear."""
    rows = sum(
        file.text_bytes // _SHORTEST_DOCUMENT_BYTES if file.rows is None else file.rows
        for file in files
    )
    wanted = max(1, -(-rows * _KEY_BYTES // PARTITION_BYTES))
    # a power of two: keys that are kept from night to night are not sorted anew for a few more rows
    return min(MOST_PARTITIONS, 1 << (wanted - 1).bit_length())
