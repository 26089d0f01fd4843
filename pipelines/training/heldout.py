"""How good an adapter is on pairs it was not trained on, with and without labels.

The measures without labels are retrieval of a pair's partner among all held-out partners, and the
two of Wang and Isola 2020 (arXiv:2005.10242): alignment of partners, uniformity over the sphere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sklearn.cluster
import sklearn.metrics
import torch
from torch import Tensor

from pipelines.pooling import normalize

MEASURES = ("heldout_loss", "recall_at_1", "mrr", "alignment", "uniformity", "v_measure")
"""What a history may say of held-out pairs."""


def partner_measures(anchors: Tensor, positives: Tensor) -> dict[str, float]:
    """Measures of n held-out pairs, averaged over both directions.

    Args:
        anchors: float (n, d), not necessarily normalised.
        positives: float (n, d), in the same order.

    Returns:
        ``recall_at_1``: share of texts whose nearest partner is their own, 0 to 1, higher better.
        ``mrr``: mean of 1 / the own partner's rank, 0 to 1, higher better. ``alignment``: mean
        squared distance of partners, 0 to 4, lower better. ``uniformity``: log of the mean of
        exp(-2 squared distance) over different texts, at most 0, lower better; 0 for one pair.
    """
    anchors, positives = normalize(anchors), normalize(positives)
    cosines = anchors @ positives.T
    own = cosines.diagonal()
    ranks = torch.cat(
        [1 + (cosines > own[:, None]).sum(dim=1), 1 + (cosines > own[None, :]).sum(dim=0)]
    ).float()
    return {
        "recall_at_1": float((ranks == 1).float().mean()),
        "mrr": float((1 / ranks).mean()),
        "alignment": float((2 - 2 * own).mean()),
        "uniformity": (uniformity(anchors) + uniformity(positives)) / 2,
    }


def uniformity(vectors: Tensor) -> float:
    """log mean exp(-2 ‖x - y‖²) over different rows of unit length, float (n, d)."""
    if len(vectors) < 2:
        return 0.0
    return float(torch.pdist(vectors).square().mul(-2).exp().mean().log())


def label_measure(vectors: Tensor, labels: Sequence[str], seed: int = 0) -> float:
    """V-measure of k-means with as many clusters as labels, 0 to 1, higher better.

    Args:
        vectors: float (n, d).
        labels: n labels.
        seed: of k-means.
    """
    count = len(set(labels))
    means = sklearn.cluster.KMeans(count, n_init=5, random_state=seed)
    found = means.fit_predict(np.ascontiguousarray(normalize(vectors).cpu().numpy()))
    return float(sklearn.metrics.v_measure_score(labels, found))
