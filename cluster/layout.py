"""Vectors to points of a map."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA

_UMAP_FROM = 20
"""Documents below which neighbourhoods mean little and a linear map is used."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MapLayout:
    """Where each document lies on the map, and how that came about."""

    points: np.ndarray
    """float32 (n, 2)."""
    method: str
    """'UMAP' or 'PCA'."""
    note: str
    """For people: what distances on the map mean, and why this method."""


def lay_out(vectors: np.ndarray, seed: int, *, linear: bool = False) -> MapLayout:
    """Place ``vectors``, float32 (n, d), on a plane: UMAP where installed, else PCA.

    ``linear`` asks for PCA: quick, and nearly the same map for nearly the same vectors.
    """
    if linear:
        points, shown = _pca(vectors)
        note = f"PCA: two directions that hold {shown:.0%} of the variance."
        return MapLayout(points, "PCA", note)
    has_umap = importlib.util.find_spec("umap") is not None
    if has_umap and len(vectors) >= _UMAP_FROM:
        return MapLayout(_umap(vectors, seed), "UMAP", "UMAP: near means similar, far says little.")
    reason = f"fewer than {_UMAP_FROM} documents" if has_umap else "umap-learn is not installed"
    log.warning("the map is made by PCA: %s", reason)
    points, shown = _pca(vectors)
    note = f"PCA, as {reason}: two directions that hold {shown:.0%} of the variance."
    return MapLayout(points, "PCA", note)


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    from umap import UMAP

    with warnings.catch_warnings():
        # UMAP warns that a fixed seed costs it parallelism, which is what is wanted here.
        warnings.filterwarnings("ignore", message="n_jobs value")
        warnings.filterwarnings("ignore", message="Spectral initialisation failed")
        neighbours = min(15, len(vectors) - 1)
        reducer = UMAP(n_neighbors=neighbours, min_dist=0.15, random_state=seed, n_jobs=1)
        return np.asarray(reducer.fit_transform(vectors), dtype=np.float32)


def _pca(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """(points, share of variance shown); one-dimensional input lies on a line."""
    count = min(2, *vectors.shape)
    if count == 0 or not np.ptp(vectors, axis=0).any():
        return np.zeros((len(vectors), 2), dtype=np.float32), 0.0
    reducer = PCA(count, svd_solver="full" if min(vectors.shape) < 500 else "covariance_eigh")
    points = np.zeros((len(vectors), 2), dtype=np.float32)
    points[:, :count] = reducer.fit_transform(vectors)
    return points, float(reducer.explained_variance_ratio_.sum())
