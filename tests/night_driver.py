"""One night in a process of its own: ``night_driver.py SETTINGS [STEP]``, killed as STEP begins.

With ``STEP.N`` it is killed as the Nth unit of work of that step begins or goes on.
SETTINGS is the JSON of a night's options. Runs in this process, without Ray, unless the options
name a Ray cluster's address in ``RAY_ADDRESS``. Prints what the night counted.
"""

import json
import os
import signal
import sys

import inline_ray
import pytest
import trivial_workers
from inline_ray import run_inline

from pipelines.embedding import job as embed
from pipelines.nightly import night as steps
from pipelines.nightly.config import NightConfig
from pipelines.nightly.job import reindex
from pipelines.runtime.command import report_error
from pipelines.runtime.run_record import read_run


def main() -> int:
    settings = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()
    }
    last, _, unit = (sys.argv[2] if len(sys.argv) > 2 else "0").partition(".")
    step, left = 0, int(unit or 0)

    def announce(number: int) -> None:
        nonlocal step
        step = number
        if step == int(last) and not unit:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_unit() -> None:
        nonlocal left
        left -= step == int(last)
        if unit and step == int(last) and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    steps.announce = announce
    inline_ray.before_unit = before_unit
    embed.WORKERS = trivial_workers.TOPIC_WORKERS
    if not os.environ.get("RAY_ADDRESS"):
        run_inline(pytest.MonkeyPatch())
    try:
        result = reindex(NightConfig(**settings))
    except BaseException as error:  # noqa: BLE001 - as the job's front end does
        return report_error(error)
    run = read_run(f"{settings['store']}/_work")
    print(json.dumps({"refusals": list(result.refusals), "counts": run["counts"] if run else {}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
