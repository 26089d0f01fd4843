"""What ``ray job submit --working-dir .`` sends: the code, and nothing large."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
MOST_BYTES = 12 << 20  # ten of them the packaged adapter; Ray takes up to 500 MiB


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A checkout in use, with an environment, results and caches, as Ray packs it."""
    folder = tmp_path_factory.mktemp("work") / "shoal"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "outputs")
    shutil.copytree(ROOT, folder, ignore=ignored)
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in (".venv/lib/large.so", "runs/old/0.parquet", "outputs/a.bin", ".git/objects/pack"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(2 << 20))
    target = folder.parent / "package.zip"
    create_package(str(folder), target, include_gitignore=True)
    return target


def test_the_package_is_small(package):
    assert package.stat().st_size < MOST_BYTES


def test_the_package_holds_every_job_and_module(package):
    names = set(zipfile.ZipFile(package).namelist())
    for part in ("jobs", "pipelines", "cluster"):
        for path in (ROOT / part).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names
    assert "cluster/report.html.jinja" in names


def test_the_package_holds_nothing_that_no_job_needs(package):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(package).namelist()}
    assert not tops & {".venv", ".git", "runs", "outputs", "tests", "docs", "benchmarks"}
