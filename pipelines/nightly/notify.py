"""What became of a night: a table for people, and a JSON object for a webhook."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.drift import Drift
from pipelines.embedding.progress import duration
from pipelines.nightly.changes import in_passages
from pipelines.nightly.checks import Check
from pipelines.nightly.clusters import NightClusters
from pipelines.nightly.config import NOTIFY_VARIABLE
from pipelines.nightly.night import Night
from pipelines.nightly.version_files import NEIGHBOURS
from pipelines.runtime.command import JobResult
from pipelines.runtime.run_record import RunRecord
from pipelines.store.compare import describe_neighbours
from pipelines.store.version import Version

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0
UNFINISHED = "unfinished"
"""In a night's summary: the time for embedding was over."""


def notify(target: str, message: Mapping[str, Any]) -> bool:
    """Post ``message``; whether it arrived. What is wrong is logged: a night does not fail by it.

    The address is not logged: such addresses are often secrets.
    """
    address = target
    if target.startswith(NOTIFY_VARIABLE):
        address = os.environ.get(target.removeprefix(NOTIFY_VARIABLE), "")
        if not address.startswith(("http://", "https://")):
            log.warning("nobody was notified: %s holds no http address", target)
            return False
    body = json.dumps(message, ensure_ascii=False, default=str).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        log.warning("the webhook of --notify answered %d", error.code)
    except (urllib.error.URLError, OSError, ValueError) as error:
        log.warning("the webhook of --notify was not reached: %s", type(error).__name__)
    return False


def message_of(store: str, record: RunRecord, result: JobResult) -> dict[str, Any]:
    """What a webhook is told of a night."""
    names = [check["name"] for check in record.metrics.get("checks", ()) if not check["passed"]]
    event = "refused" if result.refusals else "published"
    if "version" not in result.summary:
        event = "unfinished" if UNFINISHED in result.summary else "unchanged"
    return {
        "event": "novel" if "novel" in names else event,
        "published": record.metrics["published"],
        "store": store,
        "version": record.metrics["version"],
        "reasons": list(result.refusals),
        "counts": dict(record.counts),
        "run_id": record.run_id,
    }


def summarize(
    night: Night,
    version: Version,
    clusters: NightClusters,
    drift: Drift | None,
    checks: Sequence[Check],
    due: str,
) -> dict[str, str]:
    """The table that a person sees at the end; ``due`` says when a fit is."""
    counts = night.record.counts
    kinds = ("new", "changed", "deleted", "unchanged", "retouched", "rejected")
    events = [event.event for event in clusters.published.identity.events]
    rows = {
        "version": f"{version.number}, "
        + ("NOT published" if version.record.reasons else "published"),
        "documents": f"{version.record.counts['documents']:,}",
        **in_passages(counts),
        "changes": ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds if counts[kind]),
        "texts embedded": f"{counts['embedded']:,}, and {counts['reused']:,} known ones reused",
        "clusters": f"{len(clusters.published.new.sizes):,}"
        + "".join(f", {events.count(kind)} {kind}" for kind in dict.fromkeys(events)),
    }
    if clusters.novelty is not None:
        rows["novel"] = f"{len(clusters.novelty.table):,} documents fit nowhere; {due}"
    near = night.record.metrics.get(NEIGHBOURS)
    if near is not None:
        rows[f"same {near['neighbours']} nearest"] = describe_neighbours(near)
    if drift is not None:
        moved = "–" if drift.assignments is None else f"{drift.assignments:.2%}"
        rows["drift"] = f"{moved} of {drift.untouched:,} untouched documents changed clusters"
    for number, check in enumerate([c for c in checks if not c.passed], 1):
        rows[f"check {number}"] = check.says + (" (accepted)" if check.accepted else "")
    took = duration(sum(night.steps.seconds.values()))
    return rows | {"took": took, "report": version.path("report.html")}
