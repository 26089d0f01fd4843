"""A verb of ``manage_store.py`` in a process of its own, killed as it asks for a file.

``manage_driver.py N VERB FLAGS…``: killed at the Nth time that it looks for, reads, writes or links
a file; with N 0 it runs to its end.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pipelines.runtime import files
from pipelines.runtime.command import leaving_at_once, run_verbs
from pipelines.store.config import VERBS
from pipelines.store.manage import manage_store


def main() -> None:
    left = int(sys.argv[1])

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **settings)

        return call

    files.open_filesystem = killing(files.open_filesystem)
    files._s3_filesystem = killing(files._s3_filesystem)
    os.link = killing(os.link)
    os.replace = killing(os.replace)
    sys.argv = ["manage_store.py", *sys.argv[2:]]
    with leaving_at_once():
        run_verbs("manage_store", VERBS, manage_store)


if __name__ == "__main__":
    main()
