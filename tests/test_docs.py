"""What README and docs say exists: links, jobs, flags, modules."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py") if path.name != "__init__.py")
PACKAGES = sorted(
    path.parent.name
    for folder in ("pipelines/*", "cluster")
    for path in ROOT.glob(f"{folder}/__init__.py")
)
# Shown by the guide; here as soon as the nightly job is.
COMMAND = re.compile(r"jobs/([a-z_]+\.py)((?:[^\n`]*\\\n)*[^\n`]*)")


def commands() -> list[tuple[str, str, str]]:
    """Every (page, job, arguments) that a page shows."""
    found = []
    for page in PAGES:
        for job, arguments in COMMAND.findall(page.read_text()):
            found.append((page.name, job, arguments.split("#")[0].split("|")[0]))
    return found


@cache
def help_of(job: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / job, "--help"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_in_the_readme(job):
    assert f"jobs/{job}" in README


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_in_the_readme(package):
    assert re.search(rf"^\s*{package}/\s", README, re.M)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_each_of_its_modules_is(package):
    folder = next(path for path in (ROOT / "pipelines" / package, ROOT / package) if path.is_dir())
    says = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert set(re.findall(r"^``(\w+)``", says, re.M)) == modules


def test_commands_in_pages_name_jobs_and_flags_that_exist():
    shown = commands()
    assert len(shown) >= 4
    for page, job, arguments in shown:
        assert job in JOBS, f"{page}: jobs/{job}"
        for flag in re.findall(r"(?<!\S)--([a-z][a-z-]+)", arguments):
            known = flag == "config" or f"--{flag}" in help_of(job)
            assert known, f"{page}: {job} has no --{flag}"


def test_every_flag_of_every_job_says_what_it_does():
    for job in JOBS:
        empty = re.findall(r"^│ (--\S+(?: \S+)?)\s+(?:│\n│\s+)?\(default", help_of(job), re.M)
        assert not empty, f"{job}: no help for {empty}"
