"""Settings of a clustering run, checked before any work."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from cluster.errors import InputError


def _default_folder(job: str) -> str:
    home = Path(os.environ.get("SHOAL_HOME") or "~/.cache/shoal").expanduser().absolute()
    return str(home / "outputs" / job)


def _as_words(value: Any) -> Any:
    """What YAML reads as a number, a list or a truth value, as a command line would have it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    return str(value) if isinstance(value, int) else value


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of one clustering run."""

    embeddings: str = field(default_factory=lambda: _default_folder("embed_corpus"))
    """Vectors: output of embed_corpus, or any Parquet, .npy or Lance; file, folder or glob."""
    output: str = field(default_factory=lambda: _default_folder("cluster_corpus"))
    """Folder to write to."""
    num_clusters: Annotated[str, BeforeValidator(_as_words)] = "auto"
    """How many clusters: a number, 'auto', or several ('10,20,50') for one level each."""
    label_column: str | None = None
    """Column of known labels to score against; rows without a label are left out of the scores."""
    text_column: str = "text"
    """Column of texts for keywords and examples; without it the report has none."""
    id_column: str = "id"
    """Column of unique ids, strings or integers."""
    embedding_column: str = "embedding"
    """Column of vectors."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """'cosine' scales vectors and centroids to length 1 (spherical k-means)."""
    fit: str = "sample:200000"
    """Vectors to fit centroids on: 'sample:N' draws N rows by a hash of their ids, or 'all'."""
    restarts: int = 3
    """Independent k-means++ starts, of which the best is kept."""
    two_level: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_as_words)] = "auto"
    """Cluster coarsely first, then within: much faster for many clusters; auto: from 2,000 on."""
    initial_centroids: str | None = None
    """Start from these centroids (centroids.parquet of an earlier run) and keep their numbers."""
    max_clusters: int = 0
    """Most clusters that 'auto' tries; 0 for the square root of the sample, 20 to 150."""
    max_iterations: int = 25
    """Iterations of k-means at most."""
    sample_documents: int = 20_000
    """Documents drawn for keywords, diverse examples and scores without labels."""
    map_documents: int = 3_000
    """Documents drawn for the report's map."""
    duplicate_similarity: float = 0.98
    """Cosine from which documents of a cluster are near-duplicates; 0 for no search."""
    name_model: str | None = None
    """Instruct LLM that names each cluster from its keywords and documents; none by default."""
    drop_bad_vectors: bool = False
    """Leave out vectors that cannot be clustered and list them, instead of stopping."""
    num_workers: int = 0
    """Workers that read and assign; 0 for one a CPU of the Ray cluster."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: int = 0
    """GPUs that Ray reserves for a worker; FAISS uses them where its GPU build is installed."""
    seed: int = 0
    """Decides every draw; the same seed gives the same bits."""

    def __post_init__(self) -> None:
        self.levels()
        self.fit_rows()
        for name in ("restarts", "max_iterations", "sample_documents", "map_documents"):
            if getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.duplicate_similarity <= 1:
            raise InputError(
                f"--duplicate-similarity is {self.duplicate_similarity}; it must be from 0 to 1"
            )
        self._check_combinations()
        if self.num_workers < 0 or self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise InputError(
                f"--num-workers is {self.num_workers}, --cpus-per-worker {self.cpus_per_worker}, "
                f"--gpus-per-worker {self.gpus_per_worker}; CPUs must be above 0, the others not "
                "below"
            )
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed is {self.seed}; it must be from 0 to {2**31 - 1}")

    def _check_combinations(self) -> None:
        """Refuse settings that would have no effect, or none together."""
        if self.max_clusters and self.num_clusters != "auto":
            raise InputError("--max-clusters bounds --num-clusters auto; leave one of them out")
        if self.max_clusters < 0 or self.max_clusters == 1:
            raise InputError(f"--max-clusters is {self.max_clusters}; it must be at least 2")
        if self.initial_centroids is not None and len(self.levels()) != 1:
            raise InputError("--initial-centroids needs --num-clusters with one number")

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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
