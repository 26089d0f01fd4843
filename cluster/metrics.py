"""Scores of a clustering: against labels, and without them.

Every score says its range and which way is better. Where one is undefined it is None, and the
reason stands beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import csr_array

LABEL_SCORES = ("v_measure", "homogeneity", "completeness", "nmi", "ami", "ari")
COLLAPSED_SHARE = 0.5
_COLLAPSED_SHARE_OF_TWO = 0.95
_DISTANCES_MIB = 128
UNEVEN_FACTOR = 3.0
"""Imbalance from which sizes are called uneven; k-means on texts gives 1.2 to 2."""


@dataclass(frozen=True)
class Scores:
    """Values by name; for each that is None, the reason."""

    values: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Meaning:
    """How to read a score."""

    title: str
    range: str
    better: str
    says: str


MEANINGS = {
    "v_measure": Meaning("V-measure", "0 to 1", "higher", "labels and clusters tell each other"),
    "homogeneity": Meaning("Homogeneity", "0 to 1", "higher", "a cluster holds one label"),
    "completeness": Meaning("Completeness", "0 to 1", "higher", "a label lies in one cluster"),
    "nmi": Meaning("NMI", "0 to 1", "higher", "shared information, arithmetic mean: V-measure"),
    "ami": Meaning("AMI", "about 0 to 1", "higher", "NMI less what chance alone would give"),
    "ari": Meaning("ARI", "-0.5 to 1", "higher", "pairs of documents on which both agree"),
    "silhouette": Meaning("Silhouette", "-1 to 1", "higher", "nearer to its own than to the next"),
    "davies_bouldin": Meaning("Davies–Bouldin", "0 up", "lower", "spread over separation"),
    "calinski_harabasz": Meaning(
        "Calinski–Harabasz", "0 up", "higher", "spread between clusters over spread within"
    ),
}


def score_clustering(
    sizes: np.ndarray,
    inertia: float,
    confusion: np.ndarray | None,
    vectors: np.ndarray,
    cluster_ids: np.ndarray,
) -> dict[str, Any]:
    """The content of ``scores.json``.

    ``sizes`` int64 (k,) and ``inertia`` are of all documents, ``confusion`` int64 (labels, k) of
    the labelled ones (None without labels); ``vectors`` float32 (n, d) and ``cluster_ids`` int (n,)
    are the sample that scores without labels are computed on.
    """
    internal = internal_scores(vectors, cluster_ids)
    reasons = dict(internal.reasons)
    labels: dict[str, Any] | None = None
    if confusion is None:
        reasons["labels"] = "no label column was given"
    else:
        against = label_scores(confusion)
        reasons |= against.reasons
        labels = {**against.values, "labelled_documents": int(confusion.sum())}
        labels["labels"] = int((confusion.sum(axis=1) > 0).sum())
    return {
        "labels": labels,
        "internal": {**internal.values, "sample_size": len(vectors)},
        "num_clusters": len(sizes),
        "documents": int(sizes.sum()),
        "inertia": inertia,
        "imbalance": imbalance(sizes),
        "empty_clusters": int((sizes == 0).sum()),
        "undefined": reasons,
        "meanings": {name: asdict(meaning) for name, meaning in MEANINGS.items()},
    }


def label_scores(confusion: np.ndarray) -> Scores:
    """Scores of clusters against labels, from counts int64 (labels, clusters).

    All follow scikit-learn's definitions and equal its values; logarithms cancel out. With fewer
    than two labels there is nothing to recover, and every score is None.
    """
    counts = confusion[confusion.sum(axis=1) > 0][:, confusion.sum(axis=0) > 0].astype(np.int64)
    if counts.shape[0] < 2:
        reason = f"needs at least 2 labels, found {counts.shape[0]}"
        return Scores(dict.fromkeys(LABEL_SCORES), dict.fromkeys(LABEL_SCORES, reason))
    rows, columns = counts.sum(axis=1), counts.sum(axis=0)
    label_entropy, cluster_entropy = _entropy(rows), _entropy(columns)
    shared = max(0.0, label_entropy + cluster_entropy - _entropy(counts.ravel()))
    homogeneity = shared / label_entropy
    completeness = shared / cluster_entropy if cluster_entropy else 1.0
    both = homogeneity + completeness
    v_measure = 2 * homogeneity * completeness / both if both else 0.0
    values: dict[str, float | None] = {
        "v_measure": v_measure,
        "homogeneity": homogeneity,
        "completeness": completeness,
        "nmi": v_measure,
        "ami": _adjusted_information(counts, shared, (label_entropy + cluster_entropy) / 2),
        "ari": adjusted_rand(counts.ravel(), rows, columns),
    }
    return Scores(values)


def internal_scores(vectors: np.ndarray, cluster_ids: np.ndarray) -> Scores:
    """Scores without labels of vectors float32 (n, d) in clusters int (n,), by scikit-learn.

    ``silhouette_standard_error`` is that of a mean over n documents drawn at random. The scores
    need at least two clusters and fewer clusters than vectors.
    """
    names = ("silhouette", "silhouette_standard_error", "davies_bouldin", "calinski_harabasz")
    found = len(np.unique(cluster_ids))
    if found < 2 or found >= len(vectors):
        reason = (
            f"needs at least 2 clusters and fewer than vectors; the {len(vectors)} vectors scored "
            f"lie in {found}"
        )
        return Scores(dict.fromkeys(names), dict.fromkeys(names, reason))
    from sklearn import config_context, metrics  # slow to load, and workers do without

    vectors = vectors.astype(np.float64)  # once; else once for each block of distances
    with config_context(working_memory=_DISTANCES_MIB):
        silhouettes = metrics.silhouette_samples(vectors, cluster_ids)
    values: dict[str, float | None] = {
        "silhouette": float(silhouettes.mean(dtype=np.float64)),
        "silhouette_standard_error": float(silhouettes.std(ddof=1) / np.sqrt(len(silhouettes))),
        "davies_bouldin": float(metrics.davies_bouldin_score(vectors, cluster_ids)),
        "calinski_harabasz": float(metrics.calinski_harabasz_score(vectors, cluster_ids)),
    }
    return Scores(values)


def imbalance(sizes: np.ndarray) -> float:
    """FAISS's imbalance factor of sizes int64 (k,): 1 when all are equal, k when one has all."""
    shares = sizes / max(1, sizes.sum())
    return float(len(sizes) * np.sum(shares**2))


def explain_collapse(sizes: np.ndarray, vectors: np.ndarray) -> str | None:
    """Why most documents may lie in one cluster, or None where they do not.

    ``vectors``, float32 (n, d), are a sample: a long mean vector next to short differences says
    that all vectors point the same way.
    """
    share = sizes.max() / max(1, sizes.sum())
    if len(sizes) < 2 or share < (COLLAPSED_SHARE if len(sizes) > 2 else _COLLAPSED_SHARE_OF_TWO):
        return None
    wide = vectors.astype(np.float64)
    common = float(np.sum(wide.mean(axis=0) ** 2) / max(np.mean(np.sum(wide**2, axis=1)), 1e-300))
    found = f"One cluster holds {share:.0%} of the documents."
    if common > 0.9:
        return (
            f"{found} {common:.0%} of the vectors' length is common to all of them: the encoder "
            "hardly tells these documents apart. Try another prompt, pooling or adapter."
        )
    return (
        f"{found} A few vectors far from the rest may have taken the other clusters: look at the "
        "outliers, try --metric cosine, more --restarts, or fewer clusters."
    )


def explain_imbalance(sizes: np.ndarray) -> str | None:
    """What uneven sizes, int64 (k,), mean for a reader, or None where they are ordinary."""
    factor = imbalance(sizes)
    if len(sizes) < 3 or factor < UNEVEN_FACTOR:
        return None
    half = int(np.searchsorted(np.cumsum(np.sort(sizes)[::-1]), sizes.sum() / 2)) + 1
    return (
        f"Sizes are uneven: {half:,} of {len(sizes):,} clusters hold half of the documents "
        f"(imbalance {factor:.1f}; 1 when all are equal). More clusters part large ones, fewer "
        "gather small ones."
    )


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def _adjusted_information(counts: np.ndarray, shared: float, mean_entropy: float) -> float:
    total = int(counts.sum())
    if counts.shape[0] == counts.shape[1] == total:
        return 1.0
    from sklearn.metrics.cluster import expected_mutual_information  # slow to load

    expected = expected_mutual_information(csr_array(counts), total)
    tiny = np.finfo(np.float64).eps
    difference = mean_entropy - expected
    difference = min(difference, -tiny) if difference < 0 else max(difference, tiny)
    return float((shared - expected) / difference)


def adjusted_rand(cells: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """ARI of two groupings: how many points each two groups share, and each group of either has.

    int64 (any,), each; groups that share nothing may be left out of ``cells``.
    """

    def pairs(groups: np.ndarray) -> int:
        return sum(n * (n - 1) // 2 for n in groups[groups > 1].tolist())  # beyond 63 bits

    total = int(rows.sum())
    both, ours, theirs = pairs(cells), pairs(rows), pairs(columns)
    every = total * (total - 1) // 2
    expected = ours * theirs / every if every else 0.0
    possible = (ours + theirs) / 2
    return float((both - expected) / (possible - expected)) if possible != expected else 1.0
