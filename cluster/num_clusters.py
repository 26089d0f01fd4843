"""Choosing the number of clusters: a grid is tried on a sample, and the reason is kept."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from cluster.assign import NearestCentroids
from cluster.kmeans import FitOptions, count_distinct, fit_in_memory
from cluster.metrics import internal_scores

TRIED_VECTORS = 8_000
"""Vectors the grid is tried on at most."""
_SILHOUETTE_VECTORS = 3_000
_RESAMPLES = 2
_STABLE = 0.7

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One number of clusters and what speaks for it."""

    k: int
    inertia: float
    silhouette: float
    silhouette_standard_error: float
    stability: float
    """ARI, over all vectors, of centroids fitted on one half and on the other."""
    elbow: float = 0.0
    """How far the inertia lies below the straight line from the first to the last candidate."""
    score: float = 0.0
    """Mean of silhouette, stability and elbow, each scaled to 0..1 over all candidates."""


@dataclass(frozen=True)
class Choice:
    """The number of clusters chosen, why, and all that was tried."""

    k: int
    reason: str
    candidates: list[Candidate]


def choose_num_clusters(
    vectors: np.ndarray, options: FitOptions, *, most: int | None = None
) -> Choice:
    """Choose from 2 to ``most`` clusters (default: the square root of n, 20 to 150).

    ``vectors``, float32 (n, d), are a random sample in random order. Tries a grid whose steps grow
    by a quarter, then the numbers around the best of it.
    """
    vectors = vectors[:TRIED_VECTORS]
    distinct = count_distinct(vectors)
    if distinct < 4:
        reason = f"only {distinct} different vectors: one cluster each"
        return Choice(distinct, reason, [])
    most = min(most or int(np.clip(np.sqrt(len(vectors)), 20, 150)), distinct // 2)
    options = replace(options, restarts=2, two_level=False)
    tried = {k: _try(vectors, k, options) for k in grid(most)}
    best = _scored(list(tried.values()))[0].k
    for k in _between(sorted(tried), best):
        tried[k] = _try(vectors, k, options)
    ranked = _scored(list(tried.values()))
    return Choice(ranked[0].k, _reason(ranked, len(vectors)), sorted(ranked, key=lambda c: c.k))


def grid(most: int) -> list[int]:
    """2 to 10 one by one, then a quarter more each step, up to ``most``."""
    numbers = list(range(2, min(10, most) + 1))
    while numbers and round(numbers[-1] * 1.25) < most:
        numbers.append(round(numbers[-1] * 1.25))
    return numbers if numbers and numbers[-1] == most else [*numbers, max(2, most)]


def _between(tried: list[int], best: int) -> list[int]:
    """At most eight numbers not yet tried between the best and its neighbours."""
    place = tried.index(best)
    low, high = tried[max(0, place - 1)], tried[min(len(tried) - 1, place + 1)]
    inside = [k for k in range(low + 1, high) if k not in tried]
    step = max(1, -(-len(inside) // 8))
    return inside[::step]


def _try(vectors: np.ndarray, k: int, options: FitOptions) -> Candidate:
    fit = fit_in_memory(vectors, k, options)
    head = vectors[:_SILHOUETTE_VECTORS]
    scores = internal_scores(head, NearestCentroids(fit.centroids).nearest(head)[:, 0]).values
    candidate = Candidate(
        k,
        fit.inertia,
        scores["silhouette"] or 0.0,
        scores["silhouette_standard_error"] or 0.0,
        _stability(vectors, k, options),
    )
    log.info(
        "%d clusters: silhouette %.3f, stability %.2f", k, candidate.silhouette, candidate.stability
    )
    return candidate


def _stability(vectors: np.ndarray, k: int, options: FitOptions) -> float:
    """Mean agreement of clusterings learned from disjoint random halves (Lange et al. 2004)."""
    from sklearn.metrics import adjusted_rand_score  # slow to load

    agreements = []
    for resample in range(_RESAMPLES):
        order = np.random.default_rng([options.seed, resample]).permutation(len(vectors))
        halves = np.array_split(order, 2)
        if min(count_distinct(vectors[half]) for half in halves) < k:
            return 0.0
        fits = [
            NearestCentroids(fit_in_memory(vectors[half], k, options).centroids) for half in halves
        ]
        first, second = (nearest.nearest(vectors)[:, 0] for nearest in fits)
        agreements.append(adjusted_rand_score(first, second))
    return float(np.mean(agreements))


def _scored(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates with elbow and score, best first; of equals the smaller number."""
    candidates = sorted(candidates, key=lambda candidate: candidate.k)
    numbers = _scaled([candidate.k for candidate in candidates])
    inertias = _scaled([candidate.inertia for candidate in candidates])
    elbows = 1 - inertias - numbers
    parts = [
        _scaled([candidate.silhouette for candidate in candidates]),
        _scaled([candidate.stability for candidate in candidates]),
        _scaled(elbows),
    ]
    scores = np.mean(parts, axis=0)
    candidates = [
        replace(candidate, elbow=float(elbow), score=float(score))
        for candidate, elbow, score in zip(candidates, elbows, scores, strict=True)
    ]
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.k))


def _scaled(values: list[int] | list[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    width = np.ptp(array)
    return (array - array.min()) / width if width else np.zeros(len(array))


def _reason(ranked: list[Candidate], vectors: int) -> str:
    best, numbers = ranked[0], sorted(candidate.k for candidate in ranked)
    reason = (
        f"{best.k} clusters have the best mean of silhouette ({best.silhouette:.3f} ± "
        f"{best.silhouette_standard_error:.3f}), stability ({best.stability:.2f}) and elbow "
        f"({best.elbow:.2f}), each scaled over the {len(ranked)} numbers tried, "
        f"{numbers[0]} to {numbers[-1]}, on {vectors:,} vectors."
    )
    if len(ranked) > 1:
        reason += f" Next best: {ranked[1].k}."
    if best.stability < _STABLE:
        reason += (
            " No number stands out: under resampling its clusters agree only in part "
            f"(ARI {best.stability:.2f}), so a nearby number serves as well."
        )
    return reason
