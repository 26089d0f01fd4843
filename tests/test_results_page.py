"""The page of results says what the committed results say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_of_the_page_are_those_of_the_results():
    script = ROOT / "benchmarks" / "results_page.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run python benchmarks/results_page.py\n{done.stderr}"
    page = (ROOT / "docs" / "results.md").read_text()
    assert page.count("<!-- table: ") == page.count("<!-- end -->") >= 4
