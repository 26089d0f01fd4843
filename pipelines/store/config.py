"""What a person may ask of a store: the flags of its two jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from pipelines.encoder.prompts import PromptTemplate
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import default_output

Format = Literal["parquet", "faiss"]


@dataclass(frozen=True)
class StoreOptions:
    """Which store, whatever is asked of it."""

    store: str
    """The store: a folder or an s3:// address."""


@dataclass(frozen=True)
class ListConfig(StoreOptions):
    """List the versions with their counts and scores."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ShowConfig(StoreOptions):
    """Show one version: counts, scores, index, what belongs to it."""

    version: int | None = None
    """Which version; by default the published."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class PublishConfig(StoreOptions):
    """Publish a version by moving the tag."""

    version: int
    """Which version; one that a night refused may be published so."""


@dataclass(frozen=True)
class RollbackConfig(StoreOptions):
    """Go back to the version that was published before."""


@dataclass(frozen=True)
class PruneConfig(StoreOptions):
    """Remove old versions; the published and named ones stay."""

    keep: int
    """How many of the newest versions stay."""


@dataclass(frozen=True)
class VerifyConfig(StoreOptions):
    """Check every invariant of the store by reading all of it; exit code 1 if one is broken."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ExportConfig(StoreOptions):
    """Write a version as Parquet files, or as a FAISS index file with its map of ids."""

    output: str
    """A new folder, local or remote."""
    version: int | None = None
    """Which version; by default the published."""
    format: Format = "parquet"
    """documents/*.parquet with every column, or index.faiss and ids.parquet."""


@dataclass(frozen=True)
class TagConfig(StoreOptions):
    """Give a version a name, which keeps it from being pruned."""

    version: int
    """Which version."""
    name: str
    """The name: letters, digits, dots, dashes, underscores."""


@dataclass(frozen=True)
class UntagConfig(StoreOptions):
    """Take a name away from a version."""

    name: str
    """The name."""


@dataclass(frozen=True)
class EditConfig(StoreOptions):
    """Decide about clusters, for all nights to come; without an action, list what was decided."""

    name: tuple[int, str] | None = None
    """ID NAME: call a cluster so, whatever its keywords are."""
    merge: tuple[int, int] | None = None
    """A B: publish the documents of cluster B as cluster A."""
    split: int | None = None
    """ID: fit two clusters where this one is."""
    pin: tuple[str, int] | None = None
    """DOCUMENT CLUSTER: this document, of passages all of its, is in this cluster, wherever its
    vector lies."""
    forbid: tuple[int, int] | None = None
    """A B: refuse a night that makes these two one."""
    undo: int | None = None
    """NUMBER: take an edit back."""
    note: str = ""
    """Why; alone, a remark for the report."""
    who: str = ""
    """By whom, as free text; by default the name of the account."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        given = [a for a in ("name", "merge", "split", "pin", "forbid", "undo") if self.asks(a)]
        if len(given) > 1:
            flags = " and ".join(f"--{action}" for action in given)
            raise InputError(f"{flags} are given; an edit does one thing")
        if self.name is not None and not self.name[1].strip():
            raise InputError("--name takes a cluster and a name that is not empty")

    def asks(self, action: str) -> bool:
        """Whether this action's flag is given."""
        return getattr(self, action) is not None


@dataclass(frozen=True)
class CompareConfig(StoreOptions):
    """Compare two versions: neighbours, clusters, documents that moved, search, scores, cost."""

    version: int
    """The version that may be published."""
    with_: Annotated[int | None, tyro.conf.arg(name="with")] = None
    """The version it is compared with; by default the published."""
    sample: int = 200
    """Documents whose nearest neighbours are compared."""
    output: str = ""
    """A file for a page of the same, such as compare.html."""
    seed: int = 0
    """Decides the sample."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.sample < 2:
            raise InputError(f"--sample is {self.sample}; it must be at least 2")


@dataclass(frozen=True)
class BackfillConfig(StoreOptions):
    """Show the backfills that are under way, or cancel one."""

    cancel: str = ""
    """Give up the backfill of the encoder whose fingerprint begins so, and remove its vectors."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class SearchConfig:
    """Search a store by meaning."""

    store: str = field(default_factory=lambda: default_output("store"))
    """The store: a folder or an s3:// address."""
    query: str = ""
    """The text to search for; embedded by the version's own encoder and prompt."""
    similar_to: str = ""
    """Id of a document of the store, whose nearest others are wanted, instead of --query."""
    limit: int = 10
    """How many documents."""
    filter: str = ""
    """Condition in SQL on columns, such as "cluster_id = 3 AND label = 'sport'"."""
    version: int | None = None
    """Which version; by default the published."""
    query_prompt: str = ""
    """A template with {text} for the query in place of the encoder's own query prompt."""
    exact: bool = False
    """Compare with every vector instead of using the index."""
    hybrid: bool = False
    """Join the nearest documents with those that have the query's words, by their ranks."""
    group_by: Literal["none", "cluster"] = "none"
    """Put the hits together by cluster, the cluster of the best hit first."""
    per_document: bool = False
    """Of a store of passages, give each document once, by its best passage."""
    json: bool = False
    """Print JSON: the list of hits."""

    def __post_init__(self) -> None:
        if bool(self.query.strip()) == bool(self.similar_to):
            raise InputError("search takes --query TEXT or --similar-to ID, one of them")
        if self.limit < 1:
            raise InputError(f"--limit is {self.limit}; it must be at least 1")
        if self.query_prompt:
            if not self.query:
                raise InputError("--query-prompt has no effect without --query")
            PromptTemplate.parse(self.query_prompt)
        if self.hybrid and (self.exact or not self.query):
            raise InputError("--hybrid needs --query, and goes without --exact")


VERBS: dict[str, type[Any]] = {
    "list": ListConfig,
    "show": ShowConfig,
    "publish": PublishConfig,
    "rollback": RollbackConfig,
    "prune": PruneConfig,
    "verify": VerifyConfig,
    "export": ExportConfig,
    "tag": TagConfig,
    "untag": UntagConfig,
    "edit": EditConfig,
    "compare": CompareConfig,
    "backfill": BackfillConfig,
}
"""What ``manage_store`` does, by the word that it is asked with."""
