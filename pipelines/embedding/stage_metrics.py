"""Prometheus metrics of a stage, through Ray: units of work done and left."""

from __future__ import annotations

import ray.data
from ray.util.metrics import Counter, Gauge

from pipelines.job_logs import RUN

_TAGS = ("job", "stage")


class StageMetrics:
    """Counts one stage's units as the driver learns of them."""

    def __init__(self, stage: str, left: int) -> None:
        job, _ = ray.data.DataContext.get_current().get_config(RUN, ("", ""))
        tags = {"job": job, "stage": stage}
        self._left = left
        self._done_metric = Counter("shoal_units_done", "Units of work finished", _TAGS)
        self._left_metric = Gauge("shoal_units_left", "Units of work still to do", _TAGS)
        self._done_metric.set_default_tags(tags)
        self._left_metric.set_default_tags(tags)
        self._left_metric.set(left)

    def done(self) -> None:
        """Count one more unit."""
        self._left -= 1
        self._done_metric.inc()
        self._left_metric.set(self._left)
