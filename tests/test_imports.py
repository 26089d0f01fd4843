"""The arrows between packages, and which modules stay free of Ray."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipelines", "cluster", "jobs")
FREE_OF_RAY = {
    "pipelines": (
        "prompts",
        "pooling",
        "encoder",
        "contrastive",
        "encoding/*",
        "selecting/*",
        "attending/*",
    ),
    "cluster": ("kmeans", "assign", "metrics", "identity", "describe"),
}
ALLOWED = {
    "pipelines": {"pipelines"},
    "cluster": {"cluster"},
    "jobs": {"pipelines", "cluster"},
}
EXCEPTIONS = ("pipelines/nightly/job.py", "pipelines/reindexing/")


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_along_the_arrows(package):
    assert modules(package)
    for path in modules(package):
        ours = imported(path) & set(PACKAGES)
        reindexes = path.relative_to(ROOT).as_posix().startswith(EXCEPTIONS)
        allowed = {"pipelines", "cluster"} if reindexes else ALLOWED[package]
        assert ours <= allowed, f"{path.name} imports {ours - allowed}"


@pytest.mark.parametrize("package", FREE_OF_RAY)
def test_numeric_modules_import_no_ray(package):
    present = [p for name in FREE_OF_RAY[package] for p in (ROOT / package).glob(f"{name}.py")]
    assert present
    for path in present:
        assert "ray" not in imported(path), f"{path} imports ray"


def test_only_the_store_and_the_reader_of_foreign_vectors_know_lance():
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in modules(package)
        if imported(path) & {"lance", "lance_ray"}
    }
    assert found == {"pipelines/store/documents.py", "cluster/vector_files.py"}


def test_no_module_loads_pickles():
    for package in PACKAGES:
        for path in modules(package):
            assert not imported(path) & {"pickle", "dill", "joblib", "cloudpickle"}, path
