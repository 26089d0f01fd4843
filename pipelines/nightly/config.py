"""The options of the nightly job."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from cluster.config import DECIDES_CLUSTERS, ClusterOptions, NamingOptions, Words
from pipelines.corpus.files import CorpusOptions
from pipelines.corpus.passages import PASSAGE_COLUMNS, PassageOptions
from pipelines.embedding.config import ActorOptions, EmbedConfig
from pipelines.encoder.description import EncoderConfig
from pipelines.runtime.errors import InputError
from pipelines.runtime.files import default_output
from pipelines.store.columns import require_column_names

CheckName = Literal[
    "deleted", "rejected", "score", "drift", "imbalance", "encoder", "novel", "edits"
]

TEXT = "text"
STORE_COLUMNS = ("id", "text_sha256", "embedding", "cluster_id", "distance")
STORE_TIMES = ("first_seen", "last_changed")
DEMO_LABEL = "label"
NOTIFY_VARIABLE = "env:"
"""Begins a --notify that names the environment variable which holds the address."""
_FRACTIONS = ("max_deleted", "max_rejected_fraction", "max_drift", "max_imbalance")


def decides_clusters() -> set[str]:
    """Names of the settings that decide the clusters of given vectors."""
    return {f.name for f in fields(NightConfig) if f.metadata.get("decides") == "clusters"}


@dataclass(frozen=True)
class NightConfig(
    CorpusOptions, PassageOptions, ClusterOptions, NamingOptions, ActorOptions, EncoderConfig
):
    """Bring a store up to date with its corpus, and publish the result if nothing is wrong."""

    corpus: str = ""
    """File, folder or glob of documents, local or remote; empty is the demo corpus."""
    store: str = field(default_factory=lambda: default_output("store"))
    """The store, local or s3://; made where there is none."""
    text_column: str = "text"
    """Column of the text; the store calls it text."""
    id_column: str | None = None
    """Column of the id; by default `id` where a file has it, else the text's SHA-256 is the id."""
    vector_column: str = ""
    """Column of vectors that the corpus brings along, such as embedding: nothing is embedded."""
    vectors_of: str = ""
    """With --vector-column: whose vectors they are, an encoder.json or any name; another name is
    another encoder."""
    keep_columns: tuple[str, ...] = ()
    """Columns to carry along beside the text, such as a label or a date."""
    skip_unreadable_files: bool = False
    """Go on without files that cannot be read; their documents count as deleted."""
    reread: bool = False
    """Read every file, also one whose size and time of change are as they were."""
    float16: bool = False
    """Store vectors in half precision; decided by a store's first night."""
    full_text: bool = False
    """Make an index of words, for hybrid search; once made, every night keeps it up to date."""
    chunk_tokens: int = 0
    """Tokens of a unit of work, which a kill can cost; 0 suits the hardware."""
    max_embed_hours: float = 0.0
    """Embed for so many hours and then end, with the published version as it is; the same command
    goes on in the next night, and nights with the old encoder may run between. 0 for no limit."""
    num_clusters: Words = field(default="auto", metadata=DECIDES_CLUSTERS)
    """How many clusters: a number, or 'auto': chosen on the first night, then kept."""
    clusters: Literal["refit", "assign"] = "refit"
    """'assign' leaves clusters as they are: documents that are new or changed join the nearest."""
    refit_every: int = 0
    """With --clusters assign: fit anew in every Nth night that makes a version; 0 for never."""
    refit_drift: float = 0.0
    """With --clusters assign: fit anew in the night after documents lay farther from their
    centroids than when these were fitted, by this share of the mean square; 0 for never."""
    novel_deviations: float = 3.0
    """With --clusters assign: a document is novel where it is farther from its centroid than the
    cluster's mean distance by this many standard deviations."""
    novel_documents: int = 20
    """Novel documents that are alike make a new cluster where they are as many."""
    novel_similarity: float = 0.6
    """Mean cosine from which novel documents are alike."""
    warm: bool = field(default=True, metadata=DECIDES_CLUSTERS)
    """Go on from the centroids of the version before; without, cluster from scratch."""
    max_iterations: int = field(default=100, metadata=DECIDES_CLUSTERS)
    """Iterations of k-means at most, where it starts from scratch or with more clusters."""
    warm_iterations: int = field(default=0, metadata=DECIDES_CLUSTERS)
    """Iterations that go on from the version before, where few keep ids stable; 0: one for each
    percent of the documents that changed, 1 to 25."""
    label_column: str | None = field(default=None, metadata=DECIDES_CLUSTERS)
    """Column of known labels to score against; carried along."""
    map_method: Literal["pca", "tsne"] = "pca"
    """How the report's map is made: pca is quick and moves little from night to night."""
    max_deleted: float = 0.2
    """Check `deleted`: largest share of the documents that may vanish in one night."""
    max_rejected_fraction: float = 0.1
    """Check `rejected`: largest share of the corpus that may be rejected."""
    max_score_drop: float = 0.1
    """Check `score`: how much silhouette or V-measure may fall."""
    max_drift: float = 0.3
    """Check `drift`: largest share of untouched documents that may change clusters, and mean way
    that centroids may move, in parts of the clusters' radius."""
    max_imbalance: float = 0.5
    """Check `imbalance`: 0 where clusters are equal, 1 where one holds everything."""
    accept: tuple[CheckName, ...] = ()
    """Checks that may fail this time; `encoder` publishes the vectors of another encoder."""
    dry_run: bool = False
    """Tell what would be embedded and how long it would take; write nothing."""
    notify: str = ""
    """Where to post a JSON object when a night has published, was refused or found something novel:
    an http(s) address, or env:NAME for the environment variable that holds it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.store:
            raise InputError("store is empty: name a folder or an s3:// address")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not self.max_embed_hours >= 0:
            raise InputError(f"max_embed_hours is {self.max_embed_hours}; it must not be negative")
        if self.warm_iterations < 0:
            raise InputError(f"warm_iterations is {self.warm_iterations}; it must not be negative")
        if self.max_score_drop < 0:
            raise InputError(f"max_score_drop is {self.max_score_drop}; it must not be negative")
        for name in ("refit_every", "refit_drift"):
            if self.clusters == "refit" and getattr(self, name):
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} has no effect without --clusters assign")
        least = min(self.refit_every, self.refit_drift, self.novel_deviations)
        if not least >= 0 or self.novel_documents < 2:
            raise InputError(
                "refit_every, refit_drift and novel_deviations must not be negative, "
                "novel_documents at least 2"
            )
        if not 0 <= self.novel_similarity < 1:
            raise InputError(
                f"novel_similarity is {self.novel_similarity}; it must be from 0 to below 1"
            )
        require_notifiable(self.notify)
        self._check_vectors()
        if self.num_clusters != "auto" and not self.num_clusters.isdecimal():
            raise InputError(
                f"num_clusters is {self.num_clusters!r}; a night takes one number, or auto"
            )
        self.check_options()
        self.check_naming()
        self.check_reading()
        self.check_passages()
        unknown = sorted(set(self.accept) - set(get_args(CheckName)))
        if unknown:
            raise InputError(
                f"accept names no check: {unknown[0]!r}; the checks are "
                f"{', '.join(get_args(CheckName))}"
            )
        self._check_columns()

    def _check_vectors(self) -> None:
        if bool(self.vector_column) != bool(self.vectors_of):
            raise InputError(
                "--vector-column and --vectors-of go together: the column of the vectors, and "
                "whose they are, an encoder.json or a name"
            )
        if not self.vector_column:
            return
        for option in fields(EncoderConfig):
            if getattr(self, option.name) != option.default:
                flag = option.name.replace("_", "-")
                raise InputError(f"--{flag} has no effect with --vector-column; leave it out")
        if self.vector_column in (*self.kept, self.text_column, self.id_column):
            raise InputError(
                f"--vector-column {self.vector_column!r} is also text, id or a kept column"
            )
        if self.passages:
            raise InputError("--passages needs an encoder to cut by; leave --vector-column out")
        if self.max_embed_hours:
            raise InputError("--max-embed-hours has no effect with --vector-column; leave it out")

    def _check_columns(self) -> None:
        require_column_names((*self.keep_columns, self.label_column or ""))
        own = PASSAGE_COLUMNS if self.passages else ()
        taken = {*STORE_COLUMNS, *STORE_TIMES, *own} & {*self.keep_columns}
        if taken:
            raise InputError(
                f"keep_columns names {sorted(taken)[0]!r}, which the store has by itself; rename it"
            )
        if self.text_column != TEXT and TEXT in (*self.keep_columns, self.label_column):
            raise InputError(
                f"the text is column {self.text_column!r}, and the store calls it {TEXT!r}: "
                f"another column {TEXT!r} cannot be kept beside it; rename it"
            )

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns to carry along, the text's not among them."""
        wanted = self.keep_columns or (() if self.corpus else (DEMO_LABEL,))
        label = () if self.label_column is None else (self.label_column,)
        return tuple(name for name in dict.fromkeys((*wanted, *label)) if name != self.text_column)

    @property
    def stored(self) -> tuple[str, ...]:
        """Columns of the store that the corpus decides, text and id not among them."""
        return (*(PASSAGE_COLUMNS if self.passages else ()), *self.kept)

    def embed_config(self, output: str) -> EmbedConfig:
        """The embedding of what changed, in the folder ``output``."""
        shared = {f.name for f in fields(EmbedConfig)} & {f.name for f in fields(self)}
        given = {name: getattr(self, name) for name in shared}
        given |= {"keep_columns": (self.text_column, *self.kept), "output": output}
        return EmbedConfig(**given)


def require_notifiable(target: str) -> None:
    """Raise :class:`InputError` unless ``target`` is empty or something to post to."""
    if target and not target.startswith(("http://", "https://", NOTIFY_VARIABLE)):
        raise InputError(
            f"--notify {target!r}: it takes an http:// or https:// address, or env:NAME for an "
            "environment variable that holds one"
        )
