"""When a night fits its clusters anew, and when it leaves them as they were fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from pipelines.nightly.config import NightConfig, decides_clusters
from pipelines.nightly.night import Night
from pipelines.runtime.run_record import changed_fields
from pipelines.store.version import Version

_FITTED_AT = "fitted_at"
_SINCE_FIT = "nights_since_fit"
_CHANGED = "changed_since_fit"
_SPREAD = "fitted_spread"
"""In a record's details: mean squared distance of documents to their centroids when these were
fitted."""


def changed_share(night: Night) -> float:
    """Share of the documents that are not as they were when the clusters were fitted, at most 1.

    It is 1 where all are clustered anew.
    """
    base = night.before.base
    if base is None or not same_clustering(night.config, base):
        return 1.0
    touched = sum(night.record.counts[kind] for kind in ("new", "changed", "deleted"))
    return min(1.0, base.record.details.get(_CHANGED, 0.0) + touched / max(1, base.count()))


def same_clustering(config: NightConfig, base: Version) -> bool:
    """Whether a version was clustered as this night would."""
    earlier = {**asdict(NightConfig()), **base.read_json("run.json")["config"]}
    return not set(changed_fields(earlier, asdict(config))) & decides_clusters()


def has_fit_to_do(config: NightConfig, base: Version) -> bool:
    """Whether a night without ``--clusters assign`` finds clusters that earlier nights left alone.

    It then fits them, also where the corpus is as it was.
    """
    return config.clusters == "refit" and int(base.record.details.get(_SINCE_FIT, 0)) > 0


def fitted_at(night: Night) -> datetime | None:
    """When the clusters were fitted that documents join this night; None where they are fitted.

    A version of an earlier release was fitted in its own night.
    """
    config, base = night.config, night.before.base
    if config.clusters == "refit" or base is None or not night.before.same_encoder:
        return None
    if not same_clustering(config, base) or refit_due_in(config, base) == 0:
        return None
    return datetime.fromisoformat(base.record.details.get(_FITTED_AT, base.record.created_at))


def refit_due_in(config: NightConfig, base: Version) -> int | None:
    """In how many nights, this one counted as 0, clusters are fitted anew; None for not yet known.

    By ``--refit-every``, and at once where ``--refit-drift`` has been passed.
    """
    if config.refit_drift and spread_growth(base) > config.refit_drift:
        return 0
    if not config.refit_every:
        return None
    return max(0, config.refit_every - 1 - int(base.record.details.get(_SINCE_FIT, 0)))


def describe_refit(config: NightConfig, version: Version) -> str:
    """When clusters are fitted anew, by which rule, for people."""
    due = refit_due_in(config, version)
    rules = [] if due is None else [f"a fit is due in {due + 1} nights"]
    if config.refit_drift and due != 0:
        rules.append(
            f"due when the spread, {spread_growth(version):+.1%} since the fit, passes "
            f"--refit-drift {config.refit_drift:g}"
        )
    return ", or ".join(rules) or "--refit-every is 0"


def spread_growth(base: Version) -> float:
    """By what share documents lie farther from their centroids (mean square) than when fitted."""
    now, fitted = spread_of(base.record.scores, base.count()), base.record.details.get(_SPREAD)
    return now / fitted - 1 if fitted else 0.0


def spread_of(scores: Mapping[str, Any], documents: int) -> float:
    """Mean squared distance of documents to their centroids."""
    return float(scores["inertia"]) / max(1, documents)


def fit_details(night: Night, spread: float) -> dict[str, Any]:
    """When the clusters were fitted, how many versions ago, and their spread then.

    ``spread`` is that of this night's clusters.
    """
    base, standing = night.before.base, fitted_at(night)
    if standing is None or base is None:
        return {
            _FITTED_AT: night.when.isoformat(), _SINCE_FIT: 0, _CHANGED: 0.0, _SPREAD: spread,
        }  # fmt: skip
    before = base.record.details
    return {
        _FITTED_AT: standing.isoformat(),
        _SINCE_FIT: int(before.get(_SINCE_FIT, 0)) + 1,
        _CHANGED: changed_share(night),
        _SPREAD: before.get(_SPREAD),
    }
