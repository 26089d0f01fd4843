"""The arrows between packages: who may import whom, no circle, what stays free of Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNTIME, CORPUS, ENCODER = "pipelines.runtime", "pipelines.corpus", "pipelines.encoder"
GROUND = {RUNTIME, CORPUS, ENCODER}
STAGES = {"pipelines.embedding", "pipelines.store", "cluster"}
ALLOWED = {
    RUNTIME: set(),
    CORPUS: {RUNTIME},
    ENCODER: {RUNTIME},
    "cluster": {RUNTIME},
    "pipelines.store": {ENCODER, RUNTIME},
    "pipelines.embedding": GROUND,
    "pipelines.training": GROUND,
    "pipelines.evaluation": GROUND,
    "pipelines.nightly": GROUND | STAGES,
    "jobs": GROUND | STAGES | {f"pipelines.{n}" for n in ("training", "evaluation", "nightly")},
}
FREE_OF_RAY = (
    *(
        f"pipelines/encoder/{path.name}"
        for path in (ROOT / "pipelines/encoder").glob("*.py")
        if path.name != "titles.py"
    ),
    "pipelines/training/loss.py",
    "pipelines/training/loop.py",
    *(
        f"cluster/{name}.py"
        for name in (
            "assign",
            "census",
            "describe",
            "distances",
            "drift",
            "identity",
            "kmeans",
            "lloyd",
            "metrics",
            "num_clusters",
        )
    ),
)
KNOW_LANCE = {
    "pipelines/store/documents.py",
    "pipelines/runtime/tables.py",
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    paths = [p for name in ("pipelines", "cluster", "jobs") for p in (ROOT / name).rglob("*.py")]
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in paths}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (members & MODULES.keys()) or {node.module}
    return names


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "pipelines" else parts[0]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, found by taking away what imports no other."""
    left = {name: set(targets) & arrows.keys() - {name} for name, targets in arrows.items()}
    while loose := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in loose:
            del left[name]
    return [sorted(left)] if left else []


def test_every_package_has_its_place_in_the_picture():
    assert {package_of(name) for name in MODULES} - {"pipelines"} == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_along_the_arrows(package):
    for name, imported in IMPORTS.items():
        if package_of(name) == package:
            ours = {package_of(other) for other in imported if other in MODULES} - {package}
            assert ours <= ALLOWED[package], f"{name} imports {ours - ALLOWED[package]}"


def test_no_circle_of_modules():
    assert circles(IMPORTS) == []


def test_a_circle_would_be_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["a", "b", "c"]]


def test_no_import_for_type_checkers_alone():
    hidden = [name for name, path in MODULES.items() if "TYPE_CHECKING" in path.read_text()]
    assert hidden == []


@pytest.mark.parametrize("file", FREE_OF_RAY)
def test_numeric_modules_import_no_ray(file):
    imported = {name.split(".")[0] for name in imports(ROOT / file)}
    assert "ray" not in imported


def test_few_modules_know_lance():
    known = {
        path.relative_to(ROOT).as_posix()
        for name, path in MODULES.items()
        if {other.split(".")[0] for other in IMPORTS[name]} & {"lance", "lance_ray"}
    }
    assert known <= KNOW_LANCE


def test_no_module_loads_pickles():
    for name, imported in IMPORTS.items():
        top = {other.split(".")[0] for other in imported}
        assert not top & {"pickle", "dill", "joblib", "cloudpickle"}, name


def test_a_module_can_be_read_in_one_sitting():
    long = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in long.items() if lines > 520} == {}


def test_tests_mirror_the_tree():
    for path in (ROOT / "tests").iterdir():
        if path.is_dir() and not path.name.startswith("_") and path.name != "deployment":
            assert any(package.split(".")[-1] == path.name for package in ALLOWED), path.name


HEAVY = ("torch", "transformers", "peft", "sklearn", "faiss", "ray", "pandas", "lance", "scipy")
HELP = """
import runpy, sys
sys.argv[1:] = ["--help"]
try: runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop: assert not stop.code
print("loaded:", *({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_help_of_a_job_loads_nothing_heavy(job):
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'jobs/{job}'{HELP}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown, _, loaded = done.stdout.rpartition("loaded:")
    assert "--config" in shown or "--store" in shown or "--output" in shown
    assert set(loaded.split()) & set(HEAVY) == set()


@pytest.mark.parametrize("module", ["pipelines.embedding.job", "pipelines.nightly.job"])
def test_a_driver_loads_no_model_library(module):
    program = f"import sys, {module}; print({{*sys.modules}} & {{'torch', 'transformers', 'peft'}})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr
