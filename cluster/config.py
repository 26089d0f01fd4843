"""Options of clustering, which nightly runs share in part, of deduplication and of assignment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from pipelines.runtime.errors import InputError
from pipelines.runtime.files import default_output
from pipelines.runtime.run_record import may_change

DECIDES_CLUSTERS = {"decides": "clusters"}
"""Metadata of a field on which the clusters of given vectors depend."""
_RESTARTS = 3


def _as_words(value: Any) -> Any:
    """What YAML reads as a number, a list or a truth value, as a command line would have it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    return str(value) if isinstance(value, int) else value


Words = Annotated[str, BeforeValidator(_as_words)]


@dataclass(frozen=True)
class ClusterOptions:
    """How vectors are clustered and shown, whichever job does it."""

    num_clusters: Words = field(default="auto", metadata=DECIDES_CLUSTERS)
    """How many clusters: a number, 'auto', or several ('10,20,50') for levels that nest."""
    metric: Literal["euclidean", "cosine"] = field(default="euclidean", metadata=DECIDES_CLUSTERS)
    """'cosine' scales vectors and centroids to length 1 (spherical k-means)."""
    fit: str = field(default="sample:200000", metadata=DECIDES_CLUSTERS)
    """Vectors to fit centroids on: 'sample:N' draws N rows by a hash of their ids, or 'all'."""
    max_iterations: int = field(default=25, metadata=DECIDES_CLUSTERS)
    """Iterations of k-means at most."""
    label_column: str | None = field(default=None, metadata=DECIDES_CLUSTERS)
    """Column of known labels to score against; rows without a label are left out of the scores."""
    sample_documents: int = field(default=20_000, metadata=DECIDES_CLUSTERS)
    """Documents drawn for keywords, diverse examples and scores without labels."""
    map_documents: int = 3_000
    """Documents drawn for the report's map; all others are placed among them."""
    seed: int = field(default=0, metadata=DECIDES_CLUSTERS)
    """Decides every draw; the same seed gives the same bits."""

    def check_options(self) -> None:
        """Raise :class:`InputError` for a value that cannot be used."""
        self.levels()
        self.fit_rows()
        for name in ("max_iterations", "sample_documents", "map_documents"):
            require_at_least_one(self, name)
        require_seed(self.seed)

    def levels(self) -> list[int]:
        """The numbers of clusters asked for, ascending; empty for 'auto'."""
        if self.num_clusters == "auto":
            return []
        try:
            levels = sorted({int(part) for part in self.num_clusters.split(",")})
        except ValueError as error:
            raise InputError(
                f"--num-clusters is {self.num_clusters!r}; it must be a number, 'auto', or numbers "
                "joined by commas"
            ) from error
        if levels[0] < 1:
            raise InputError(f"--num-clusters is {self.num_clusters}; at least 1 is needed")
        return levels

    def fit_rows(self) -> int | None:
        """Rows to fit on, None for all."""
        kind, _, number = self.fit.partition(":")
        if self.fit == "all":
            return None
        if kind == "sample" and number.isdecimal() and int(number) > 0:
            return int(number)
        raise InputError(f"--fit is {self.fit!r}; it must be 'all' or 'sample:N' with N above 0")


def require_at_least_one(config: object, name: str) -> None:
    """Raise :class:`InputError` unless the setting ``name`` is 1 or more."""
    if getattr(config, name) < 1:
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag} is {getattr(config, name)}; it must be at least 1")


def require_seed(seed: int) -> None:
    """Raise :class:`InputError` unless ``seed`` fits 31 bits."""
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed is {seed}; it must be from 0 to {2**31 - 1}")


@dataclass(frozen=True)
class NamingOptions:
    """Who names clusters, whichever job does it."""

    name_model: str | None = None
    """Instruct LLM that names each cluster from its keywords and documents; none by default."""
    name_url: str | None = None
    """Endpoint that has --name-model, by OpenAI's chat protocol (https://HOST/v1); its key is taken
    from OPENAI_API_KEY."""

    def check_naming(self) -> None:
        """Raise :class:`InputError` for an address that cannot be used or may hold a secret."""
        if self.name_url is None:
            return
        if self.name_model is None:
            raise InputError("--name-url needs --name-model, the name of a model at that endpoint")
        try:
            parts = urlsplit(self.name_url)
            plain = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            plain = False
        if not plain or {*"@?#"} & {*self.name_url} or any(map(str.isspace, self.name_url)):
            raise InputError(
                "--name-url takes an address such as https://HOST/v1, with neither user, key nor "
                "anything after a '?'; a key is taken from the variable OPENAI_API_KEY"
            )


@dataclass(frozen=True)
class VectorColumns:
    """Where vectors stand in their files."""

    id_column: str = "id"
    """Column of unique ids, strings or integers."""
    embedding_column: str = "embedding"
    """Column of vectors."""


@dataclass(frozen=True)
class Workers:
    """Who reads and assigns vectors; decides no result."""

    num_workers: int = may_change(0)
    """Workers that read and assign; 0 for one a CPU of the Ray cluster."""
    cpus_per_worker: float = may_change(1.0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: int = may_change(0)
    """GPUs that Ray reserves for a worker; FAISS uses them where its GPU build is installed."""

    def check_workers(self) -> None:
        """Raise :class:`InputError` for numbers that cannot be."""
        if self.num_workers < 0 or self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise InputError(
                f"--num-workers is {self.num_workers}, --cpus-per-worker {self.cpus_per_worker}, "
                f"--gpus-per-worker {self.gpus_per_worker}; CPUs must be above 0, the others not "
                "below"
            )


@dataclass(frozen=True)
class ClusterConfig(Workers, VectorColumns, NamingOptions, ClusterOptions):
    """Settings of one clustering run."""

    embeddings: str = field(default_factory=lambda: default_output("embed_corpus"))
    """Vectors: output of embed_corpus, a store, or files of Parquet, NumPy, Lance, Delta, FAISS."""
    output: str = field(default_factory=lambda: default_output("cluster_corpus"))
    """Folder to write to; an unfinished run in it is gone on with."""
    text_column: str = "text"
    """Column of texts for keywords and examples; without it the report has none."""
    version: str = ""
    """Version or time (ISO 8601) of a Delta, Iceberg or Lance table; its current one by default."""
    keep_columns: tuple[str, ...] = ()
    """Columns to carry along to map.parquet and to tell of by cluster, such as a date."""
    restarts: int = _RESTARTS
    """Independent k-means++ starts, of which the best is kept."""
    two_level: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_as_words)] = "auto"
    """Cluster coarsely first, then within: much faster for many clusters; auto: from 2,000 on."""
    initial_centroids: str | None = None
    """Start from these centroids (centroids.parquet of an earlier run) and keep their numbers."""
    max_clusters: int = 0
    """Most clusters that 'auto' tries; 0 for the square root of the sample, 20 to 150."""
    duplicate_similarity: float = 0.98
    """Cosine from which documents are near-duplicates; 0 for no search."""
    noise: bool = False
    """Give documents that belong to no dense region cluster_id -1."""
    compare: str | None = None
    """Another clustering of these documents, for the report: which cluster went where."""
    drop_bad_vectors: bool = False
    """Leave out vectors that cannot be clustered and list them, instead of stopping."""

    def __post_init__(self) -> None:
        self.check_options()
        self.check_workers()
        self.check_naming()
        require_at_least_one(self, "restarts")
        if not 0 <= self.duplicate_similarity <= 1:
            raise InputError(
                f"--duplicate-similarity is {self.duplicate_similarity}; it must be from 0 to 1"
            )
        taken = {"id", "x", "y", "cluster_id"} & {*self.keep_columns}
        if taken or len(set(self.keep_columns)) < len(self.keep_columns):
            raise InputError(
                f"--keep-columns {' '.join(self.keep_columns)}: each column once, and not id, x, y "
                "or cluster_id, which map.parquet has by itself"
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse settings that would have no effect beside the others."""
        if self.max_clusters and self.num_clusters != "auto":
            raise InputError("--max-clusters bounds --num-clusters auto; leave one of them out")
        if self.max_clusters < 0 or self.max_clusters == 1:
            raise InputError(f"--max-clusters is {self.max_clusters}; it must be at least 2")
        if self.initial_centroids is None:
            return
        if len(self.levels()) != 1:
            raise InputError("--initial-centroids needs --num-clusters with one number")
        for name, default in (("restarts", _RESTARTS), ("two_level", "auto")):
            if getattr(self, name) != default:
                raise InputError(
                    f"--{name.replace('_', '-')} has no effect beside --initial-centroids, which "
                    "are the one start: leave one of them out"
                )


_SIMILARITY = {"vectors": 0.98, "text": 0.8}


@dataclass(frozen=True)
class DeduplicateConfig(VectorColumns):
    """Settings of one deduplication."""

    embeddings: str = field(default_factory=lambda: default_output("embed_corpus"))
    """Documents: output of embed_corpus, or any Parquet, .npy or Lance; for text any Parquet."""
    output: str = field(default_factory=lambda: default_output("deduplicate_corpus"))
    """Folder to write to."""
    similarity: float | None = None
    """Least similarity of what is removed to what is kept; vectors: cosine 0.98, text: 0.8."""
    keep: str = "first"
    """Kept of those alike: 'first' in the corpus, 'longest' text, most 'central', 'column:NAME'."""
    method: Literal["vectors", "text"] = "vectors"
    """'vectors' compares meaning (cosine), 'text' wording (Jaccard of 5-character shingles)."""
    against: str | None = None
    """Another set: remove what is like one of its documents, instead of like each other."""
    write_clean: bool = False
    """Write the rows that are kept, with all their columns, to clean/*.parquet."""
    text_column: str = "text"
    """Column of texts: compared by --method text, measured by 'longest', shown on the page."""
    drop_bad_vectors: bool = False
    """Leave out vectors that cannot be compared and list them, instead of stopping."""
    seed: int = 0
    """Decides every draw, and the order of documents that the rule holds equal."""

    def __post_init__(self) -> None:
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise InputError(f"--similarity is {self.similarity}; it must be above 0 and at most 1")
        kind, _, name = self.keep.partition(":")
        if self.keep not in ("first", "longest", "central") and not (kind == "column" and name):
            raise InputError(
                f"--keep is {self.keep!r}; it must be first, longest, central or column:NAME"
            )
        require_seed(self.seed)
        if self.against is not None and self.keep != "first":
            raise InputError("--against keeps nothing by a rule of its own; leave --keep out")
        if self.method == "text" and self.keep == "central":
            raise InputError("--keep central needs vectors; take another with --method text")
        if self.method == "text" and self.drop_bad_vectors:
            raise InputError("--method text reads no vectors; leave --drop-bad-vectors out")

    def threshold(self) -> float:
        """The similarity that is asked for."""
        return _SIMILARITY[self.method] if self.similarity is None else self.similarity


@dataclass(frozen=True)
class AssignConfig(Workers, VectorColumns):
    """Give new vectors to the clusters there are."""

    embeddings: str = field(default_factory=lambda: default_output("embed_corpus"))
    """Vectors: output of embed_corpus, a store, or any Parquet, .npy or Lance."""
    clusters: str = field(default_factory=lambda: default_output("cluster_corpus"))
    """The clusters: output folder of cluster_corpus, or a store."""
    clusters_version: int | None = None
    """Version of the store in --clusters; the published one by default."""
    output: str = field(default_factory=lambda: default_output("assign_clusters"))
    """Folder to write to; an unfinished run in it is gone on with."""
    quantile: float = 0.99
    """A document is novel beyond this quantile of its cluster's own distances, 0 to 1."""
    text_column: str = "text"
    """Column of texts for the keywords of what is novel; without it there are none."""
    version: str = ""
    """Version or time (ISO 8601) of a Delta, Iceberg or Lance table; its current one by default."""
    drop_bad_vectors: bool = False
    """Leave out vectors that cannot be assigned and list them, instead of stopping."""
    seed: int = 0
    """Decides which novel documents are looked at together."""

    def __post_init__(self) -> None:
        self.check_workers()
        if not 0 < self.quantile <= 1:
            raise InputError(f"--quantile is {self.quantile}; it must be above 0 and at most 1")
