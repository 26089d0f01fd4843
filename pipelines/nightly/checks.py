"""What must hold before a version is published: each check with its figure and its limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.drift import Drift
from pipelines.nightly.config import CheckName, NightConfig


@dataclass(frozen=True)
class Check:
    """One figure held against its limit."""

    name: CheckName
    value: float | None
    """None where it cannot be measured, as on the first night."""
    limit: float
    passed: bool
    accepted: bool
    """Whether it may fail this time (``--accept``)."""
    says: str
    """What is wrong; empty where it passed."""

    @property
    def refuses(self) -> bool:
        """Whether it speaks against publishing."""
        return not self.passed and not self.accepted

    @property
    def reason(self) -> str:
        """Why it refuses, and what to do."""
        return f"{self.says} (--accept {self.name} publishes it all the same)"


@dataclass(frozen=True)
class NightFigures:
    """What the checks look at."""

    counts: Mapping[str, int]
    documents_before: int
    scores: Mapping[str, Any]
    scores_before: Mapping[str, Any] | None
    drift: Drift | None
    encoder_before: str | None
    """Fingerprint of the version before, where it is another encoder's."""
    novel_groups: Sequence[int] = ()
    """Sizes of the clusters that novel documents would make."""
    broken_edits: Sequence[str] = ()
    """People's edits that the night's clusters go against, described."""


def run_checks(config: NightConfig, figures: NightFigures) -> list[Check]:
    """Every check, passed or not."""
    measured = [
        _deleted(config, figures.counts, figures.documents_before),
        _rejected(config, figures.counts),
        *_scores(config, figures),
        *_drift(config, figures),
        _imbalance(config, figures),
        _encoder(figures.encoder_before),
        _novel(figures),
        _edits(figures),
    ]
    return [_held(config, *figure) for figure in measured]


def early_checks(
    config: NightConfig,
    counts: Mapping[str, int],
    documents_before: int,
    encoder_before: str | None,
) -> list[Check]:
    """The checks of what is known before anything is embedded; see :class:`NightFigures`."""
    measured = (
        _deleted(config, counts, documents_before),
        _rejected(config, counts),
        _encoder(encoder_before),
    )
    return [_held(config, *figure) for figure in measured]


def _held(
    config: NightConfig, name: CheckName, value: float | None, limit: float, says: str
) -> Check:
    """A figure held against its limit."""
    passed = value is None or value <= limit
    return Check(name, value, limit, passed, name in config.accept, "" if passed else says)


_Measured = tuple[CheckName, float | None, float, str]


def _deleted(config: NightConfig, counts: Mapping[str, int], before: int) -> _Measured:
    deleted = counts["deleted"]
    says = (
        f"deleted: {deleted:,} of {before:,} documents vanished from the corpus, more than "
        f"--max-deleted {config.max_deleted:g} allows"
    )
    return "deleted", deleted / before if before else None, config.max_deleted, says


def _rejected(config: NightConfig, counts: Mapping[str, int]) -> _Measured:
    rejected, documents = counts["rejected"], counts["documents"]
    says = (
        f"rejected: {rejected:,} of {documents:,} documents were rejected, more than "
        f"--max-rejected-fraction {config.max_rejected_fraction:g} allows"
    )
    return "rejected", rejected / max(1, documents), config.max_rejected_fraction, says


def _scores(config: NightConfig, figures: NightFigures) -> Iterator[_Measured]:
    for kind, name in (("internal", "silhouette"), ("labels", "v_measure")):
        before = ((figures.scores_before or {}).get(kind) or {}).get(name)
        now = (figures.scores.get(kind) or {}).get(name)
        drop, says = None, ""
        if before is not None and now is not None:
            drop = before - now
            says = (
                f"score: {name} fell from {before:.3f} to {now:.3f}, by more than "
                f"--max-score-drop {config.max_score_drop:g} allows"
            )
        yield "score", drop, config.max_score_drop, says


def _drift(config: NightConfig, figures: NightFigures) -> Iterator[_Measured]:
    drift, limit = figures.drift, config.max_drift
    moved = None if drift is None else drift.assignments
    yield (
        "drift",
        moved,
        limit,
        f"drift: {moved or 0:.1%} of the documents that did not change are in another cluster, "
        f"more than --max-drift {limit:g} allows",
    )
    way = None if drift is None else drift.centroids
    yield (
        "drift",
        way,
        limit,
        f"drift: centroids moved by {way or 0:.1%} of the clusters' radius, more than "
        f"--max-drift {limit:g} allows",
    )


def _imbalance(config: NightConfig, figures: NightFigures) -> _Measured:
    clusters = int(figures.scores["num_clusters"])
    value = (figures.scores["imbalance"] - 1) / (clusters - 1) if clusters > 1 else 0.0
    says = (
        f"imbalance: {value:.2f} on a scale from 0, equal clusters, to 1, one that holds "
        f"everything; more than --max-imbalance {config.max_imbalance:g} allows"
    )
    return "imbalance", value, config.max_imbalance, says


def _encoder(before: str | None) -> _Measured:
    says = (
        f"encoder: every document was embedded anew, as the version before was made by another "
        f"encoder (fingerprint {(before or '')[:12]}…)"
    )
    return "encoder", 0.0 if before is None else 1.0, 0.0, says


def _novel(figures: NightFigures) -> _Measured:
    groups = figures.novel_groups
    sizes = ", ".join(f"{size:,}" for size in groups[:10])
    says = (
        f"novel: documents that fit nowhere would make {len(groups)} new clusters, of {sizes} "
        "documents; they are in novel.parquet, and with the nearest clusters for now"
    )
    return "novel", float(len(groups)), 0.0, says


def _edits(figures: NightFigures) -> _Measured:
    broken = figures.broken_edits
    says = f"edits: clusters that are to be kept apart became one: {'; '.join(broken)}"
    return "edits", float(len(broken)), 0.0, says
