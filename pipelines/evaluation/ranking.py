"""Candidates ranked, and how sure the ranking is.

With labels a candidate's score is its V-measure, a mean over runs of k-means. Without, it is made
of two things that need the texts alone. The halves of a document are on one topic, so good vectors
put both into one cluster (``half_agreement``: the information that the clusters of the first
halves share with those of the second), and near to each other among all halves
(``partner_rank``). Each alone can be fooled: the first by an encoder that puts nearly all into
one cluster, the second by one that sees words and no topics. Each is measured in standard
deviations over the candidates, and the score is their mean.

How sure: all is computed again for resamples of the documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.trial import Trial, agreement

RESAMPLES = 100


@dataclass(frozen=True)
class Ranking:
    """Every candidate's scores, in the order of the trials; float64 (candidates,) each.

    ``v_measure`` is None without labels, ``half_agreement`` and ``partner_rank`` with them.
    ``standard_error`` is the score's, ``behind_error`` that of its distance to the winner;
    ``probability_best`` says in how many resamples of the documents a candidate came first.
    """

    score: np.ndarray
    standard_error: np.ndarray
    behind_error: np.ndarray
    probability_best: np.ndarray
    v_measure: np.ndarray | None = None
    half_agreement: np.ndarray | None = None
    partner_rank: np.ndarray | None = None

    @property
    def winner(self) -> int:
        """The candidate with the highest score."""
        return int(np.argmax(self.score))

    @property
    def as_good(self) -> int:
        """Candidates that are less than two standard errors behind the winner, itself included."""
        behind = self.score[self.winner] - self.score
        return int((behind <= 2 * self.behind_error).sum())


def rank_candidates(
    trials: Sequence[Trial], labels: Sequence[str] | None, *, seed: int = 0
) -> Ranking:
    """Rank the candidates of some prompts on one sample.

    Args:
        trials: one a prompt, all of the same documents.
        labels: a label a document, or None to score by the documents alone.
        seed: of the resamples.
    """
    clusterings = np.concatenate([trial.clusterings for trial in trials])
    documents = clusterings.shape[-1] if labels is not None else clusterings.shape[-1] // 2
    draws = np.random.default_rng(seed).multinomial(
        documents, np.full(documents, 1 / documents), size=RESAMPLES
    )
    once = np.ones(documents)
    if labels is not None:
        numbered = np.unique(labels, return_inverse=True)[1].astype(np.int16)
        score = label_scores(clusterings, numbered, once)
        resampled = np.stack([label_scores(clusterings, numbered, w) for w in draws])
        return _certainty(score, resampled, v_measure=score)
    ranks = np.concatenate([t.log_ranks for t in trials if t.log_ranks is not None])
    halves = half_agreement(clusterings, once)
    score = label_free_score(halves, partner_score(ranks, once))
    resampled = np.stack(
        [label_free_score(half_agreement(clusterings, w), partner_score(ranks, w)) for w in draws]
    )
    return _certainty(
        score,
        resampled,
        half_agreement=halves,
        partner_rank=np.exp(-partner_score(ranks, once)),
    )


def label_scores(clusterings: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """V-measure of each candidate, float64 (candidates,), a mean over its runs.

    ``clusterings`` int16 (candidates, runs, n), ``labels`` int16 (n,), ``weights`` float (n,).
    """
    every = np.broadcast_to(labels, clusterings[:, 0].shape)
    runs = [agreement(every, clusterings[:, run], weights) for run in _runs(clusterings)]
    return np.mean(runs, axis=0)


def half_agreement(clusterings: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What the clusters of first halves say of those of second ones, a mean over runs.

    ``clusterings`` int16 (candidates, runs, 2n), ``weights`` float (n,); float64 (candidates,)
    from 0 to 1.
    """
    documents = len(weights)
    runs = [
        agreement(clusterings[:, run, :documents], clusterings[:, run, documents:], weights)
        for run in _runs(clusterings)
    ]
    return np.mean(runs, axis=0)


def partner_score(log_ranks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Minus the mean logarithm of the partner's rank, float64 (candidates,); higher is better."""
    return -(log_ranks @ weights) / weights.sum()


def label_free_score(halves: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """Mean of both, each in standard deviations over the candidates, float64 (candidates,)."""
    return (_standardised(halves) + _standardised(partners)) / 2


def _certainty(score: np.ndarray, resampled: np.ndarray, **parts: np.ndarray) -> Ranking:
    """Errors and shares from scores of resamples, float64 (resamples, candidates)."""
    winner = int(np.argmax(score))
    first = np.bincount(resampled.argmax(axis=1), minlength=len(score))
    return Ranking(
        score=score,
        standard_error=resampled.std(axis=0, ddof=1),
        behind_error=(resampled[:, [winner]] - resampled).std(axis=0, ddof=1),
        probability_best=first / len(resampled),
        **parts,
    )


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-12)


def _runs(clusterings: np.ndarray) -> range:
    return range(clusterings.shape[1])
