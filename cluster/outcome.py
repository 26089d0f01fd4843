"""What a clustering found, as tables, scores and the report's content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.assign import NearestCentroids
from cluster.census import Census
from cluster.describe import Description, describe_clusters, descriptions_table
from cluster.kmeans import Fit
from cluster.layout import lay_out
from cluster.metrics import MEANINGS, explain_collapse, score_clustering
from cluster.report import MappedDocuments, Report, render_report
from cluster.sample import Sample, Scan
from cluster.storage import join, write_table, write_text

SCORED_DOCUMENTS = 10_000
"""Documents that scores without labels are computed on; the silhouette's cost is their square."""


@dataclass(frozen=True)
class Outcome:
    """One clustering, described and scored."""

    scan: Scan
    fits: Mapping[int, Fit]
    """Number of clusters -> fit; the largest number is the level that cluster_id speaks of."""
    census: Census
    documents: Sample
    """The sample that keywords, examples, the map and scores without labels come from."""
    cluster_ids: np.ndarray
    """int32 (n,), clusters of ``documents``."""
    clusters: list[Description]
    scores: dict[str, Any]
    notices: list[str] = field(default_factory=list)

    @property
    def fit(self) -> Fit:
        """The finest level's fit."""
        return self.fits[max(self.fits)]

    def fitted_on(self) -> str:
        """Which vectors the centroids were fitted on, in words."""
        fitted, rows = self.fit.vectors, self.scan.rows
        return f"all {rows:,} vectors" if fitted == rows else f"{fitted:,} of {rows:,} vectors"

    def counts(self) -> dict[str, int]:
        """For ``run.json``."""
        return {
            "documents": self.scan.rows + len(self.scan.rejected),
            "clustered": self.scan.rows,
            "rejected": len(self.scan.rejected),
            "zero_vectors": self.scan.zeros,
            "fitted_on": self.fit.vectors,
            "clusters": len(self.census.sizes),
            "empty_clusters": self.scores["empty_clusters"],
            "reseeded": self.fit.reseeded,
        }

    def summary(self) -> dict[str, str]:
        """For people."""
        sizes, internal = self.census.sizes, self.scores["internal"]
        rows = {
            "documents": f"{self.scan.rows:,}",
            "clusters": f"{len(sizes):,} of {sizes.min():,} to {sizes.max():,} documents",
            "centroids fitted on": self.fitted_on(),
        }
        against = self.scores["labels"] or {}
        for name in ("v_measure", "ari"):
            if against.get(name) is not None:
                labelled = f"({against['labelled_documents']:,} labelled documents)"
                rows[MEANINGS[name].title] = f"{against[name]:.3f} {labelled}"
        if internal["silhouette"] is not None:
            rows["Silhouette"] = (
                f"{internal['silhouette']:.3f} ± {internal['silhouette_standard_error']:.3f} "
                f"({internal['sample_size']:,} documents)"
            )
        rows |= {f"note {i}": text for i, text in enumerate(self.notices, 1)}
        return rows


def describe_outcome(
    scan: Scan, fits: Mapping[int, Fit], census: Census, documents: Sample, *, has_labels: bool
) -> Outcome:
    """Describe and score the finest level; ``documents`` is a sample of what was clustered."""
    assigned = NearestCentroids(fits[max(fits)].centroids).assign(documents.vectors)
    clusters = describe_clusters(census, documents, assigned.cluster_ids, assigned.distances)
    confusion = np.array(list(census.labels.values())).reshape(-1, len(census.sizes))
    scores = score_clustering(
        census.sizes,
        census.inertia,
        confusion if has_labels else None,
        documents.vectors[:SCORED_DOCUMENTS],
        assigned.cluster_ids[:SCORED_DOCUMENTS],
    )
    notices = find_notices(scan, census, documents)
    return Outcome(scan, fits, census, documents, assigned.cluster_ids, clusters, scores, notices)


def find_notices(scan: Scan, census: Census, documents: Sample) -> list[str]:
    """What a reader of the result must know: collapse, empty clusters, zeros, rows left out."""
    notices = []
    collapse = explain_collapse(census.sizes, documents.vectors)
    if collapse:
        notices.append(collapse)
    empty = int((census.sizes == 0).sum())
    if empty:
        notices.append(f"{empty} clusters have no documents: ask for fewer, or fit on more.")
    if scan.zeros:
        notices.append(f"{scan.zeros:,} vectors are zero; they were clustered as points.")
    if scan.rejected:
        notices.append(f"{len(scan.rejected):,} vectors were left out; rejected.parquet says why.")
    return notices


def write_outcome(outcome: Outcome, folder: str, settings: Mapping[str, Any]) -> None:
    """Write tables, scores and report into ``folder``, each whole or not at all."""
    write_table(join(folder, "centroids.parquet"), centroids_table(outcome))
    clusters = descriptions_table(outcome.clusters, outcome.documents.ids.type)
    write_table(join(folder, "clusters.parquet"), clusters)
    if outcome.scan.rejected:
        write_table(join(folder, "rejected.parquet"), rejected_table(outcome))
    text = json.dumps(outcome.scores, indent=2, ensure_ascii=False) + "\n"
    write_text(join(folder, "scores.json"), text)
    report = build_report(outcome, settings)
    write_text(join(folder, "report.html"), render_report(report))


def centroids_table(outcome: Outcome) -> pa.Table:
    """``centroids.parquet``: cluster_id, size, centroid (d floats)."""
    k, dimension = outcome.fit.centroids.shape
    flat = pa.array(outcome.fit.centroids.ravel(), pa.float32())
    return pa.table(
        {
            "cluster_id": pa.array(range(k), pa.int32()),
            "size": pa.array(outcome.census.sizes, pa.int64()),
            "centroid": pa.FixedSizeListArray.from_arrays(flat, dimension),
        }
    )


def rejected_table(outcome: Outcome) -> pa.Table:
    """``rejected.parquet``: id, reason."""
    ids = pa.array([row[0] for row in outcome.scan.rejected], outcome.documents.ids.type)
    return pa.table({"id": ids, "reason": [row[1] for row in outcome.scan.rejected]})


def build_report(outcome: Outcome, settings: Mapping[str, Any]) -> Report:
    """The content of ``report.html``."""
    documents = outcome.documents.head(settings["map_documents"])
    texts = documents.texts.to_pylist() if documents.texts is not None else None
    layout = lay_out(documents.vectors, settings["seed"])
    mapped = MappedDocuments(
        layout, outcome.cluster_ids[: len(documents)], documents.ids.to_pylist(), texts
    )
    name = str(settings["embeddings"]).rstrip("/").rsplit("/", 1)[-1]
    lead = (
        f"k-means put {outcome.scan.rows:,} documents of {settings['embeddings']} into "
        f"{len(outcome.census.sizes):,} clusters. Centroids were fitted on {outcome.fitted_on()}; "
        f"keywords come from {len(outcome.documents):,} documents."
    )
    if texts is None:
        lead += " The vectors came without texts, so there are no keywords."
    return Report(
        title=f"Clusters of {name}",
        lead=lead,
        notices=outcome.notices,
        census=outcome.census,
        clusters=outcome.clusters,
        scores=outcome.scores,
        mapped=mapped,
        facts=_facts(outcome, settings),
        has_texts=texts is not None,
    )


def _facts(outcome: Outcome, settings: Mapping[str, Any]) -> dict[str, str]:
    fit = outcome.fit
    return {
        "Vectors": f"{outcome.scan.rows:,} of {fit.centroids.shape[1]} numbers",
        "Metric": str(settings["metric"]),
        "Fitted on": outcome.fitted_on(),
        "Iterations": f"{fit.iterations} in the last or longest fit",
        "Empty clusters re-seeded while fitting": str(fit.reseeded),
        "Inertia": f"{outcome.census.inertia:,.6g} (sum of squared distances, all documents)",
        "Imbalance": f"{outcome.scores['imbalance']:.2f} (1 when all clusters are equal)",
        "Seed": str(settings["seed"]),
    }
