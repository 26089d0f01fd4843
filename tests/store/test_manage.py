"""The verbs of jobs/manage_store.py, as called from a command line."""

import json
import subprocess
import sys
from pathlib import Path

import faiss
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from tiny_stores import (
    change,
    finish,
    numbered,
    publish_first,
    publish_night,
    texts_of,
    vector_of,
)

from pipelines.runtime.command import run_verbs
from pipelines.store.config import VERBS
from pipelines.store.manage import flatten, manage_store
from pipelines.store.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    """A store of three versions, the last refused, the second published."""
    store = Store.open_or_create(str(tmp_path / "store"))
    publish_first(store, tmp_path, numbered(range(20)))
    publish_night(store, {"d3": "other text"})
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        change(candidate, {}, [f"d{n}" for n in range(10)])
        finish(candidate, reasons=["half of the documents are gone"])
    return store


@pytest.fixture
def manage(store, monkeypatch, capsys):
    """Runs a verb; (exit code, stdout, stderr)."""

    def run(verb, *flags):
        where = () if "--store" in flags else ("--store", store.uri)
        monkeypatch.setattr(sys, "argv", ["manage_store.py", verb, *where, *map(str, flags)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            run_verbs("manage_store", VERBS, manage_store)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_list_shows_counts_scores_and_what_is_published(manage):
    code, out, _ = manage("list")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("│")]
    assert len(lines) == 3
    assert "published" in lines[1]
    assert "refused" in lines[2]
    assert all("imbalance 0.1" in line for line in lines)
    assert "documents 10" in lines[2]


def test_list_is_json_for_machines(manage):
    code, out, _ = manage("list", "--json")
    found = json.loads(out)
    assert code == 0
    assert [(v["version"], v["published"], v["counts"]["documents"]) for v in found] == [
        (1, False, 20),
        (2, True, 20),
        (3, False, 10),
    ]
    assert found[2]["reasons"] == ["half of the documents are gone"]


def test_show_tells_everything_about_one_version(manage, store):
    code, out, _ = manage("show", "--version", 3)
    assert code == 0
    assert "half of the documents are gone" in out
    assert "index: recall_at_10" in out
    shown = json.loads(manage("show", "--json")[1])
    assert shown["version"] == 2
    assert shown["tags"] == ["published"]
    assert Path(shown["artifacts"]["encoder.json"]).exists()


def test_publish_and_rollback_move_the_tag(manage, store):
    code, _, err = manage("publish", "--version", 3)
    assert code == 0
    assert "a night refused this version: half of the documents are gone" in err
    assert store.version().number == 3
    assert manage("rollback")[0] == 0
    assert store.version().number == 2
    assert manage("rollback")[0] == 0
    assert store.version().number == 1
    code, _, err = manage("rollback")
    assert code == 2
    assert err.startswith("error: ") or "\nerror: " in err


def test_prune_removes_old_versions_but_not_the_published(manage, store):
    code, _, _ = manage("prune", "--keep", 1)
    assert code == 0
    assert [v.number for v in store.versions()] == [2, 3]
    assert manage("prune", "--keep", 0)[0] == 2


def test_named_versions_are_not_pruned(manage, store):
    assert manage("tag", "--version", 1, "--name", "golden")[0] == 0
    assert manage("tag", "--version", 1, "--name", "published")[0] == 2
    assert "golden" in manage("list")[1]
    manage("prune", "--keep", 1)
    assert [v.number for v in store.versions()] == [1, 2, 3]
    assert manage("untag", "--name", "golden")[0] == 0
    assert manage("untag", "--name", "golden")[0] == 2
    manage("prune", "--keep", 1)
    assert [v.number for v in store.versions()] == [2, 3]


def test_verify_says_what_is_wrong_and_fails(manage, store):
    assert manage("verify")[0] == 0
    Path(store.uri, "versions/1/scores.json").write_bytes(b"{}")
    code, out, err = manage("verify", "--json")
    assert code == 1
    assert "problem: version 1: artifact scores.json was changed" in err
    assert len(json.loads(out)["problems"]) == 3  # three versions share the file


def test_export_to_parquet_is_what_the_version_holds(manage, store, tmp_path):
    assert manage("export", "--output", tmp_path / "out", "--version", 1)[0] == 0
    table = ds.dataset(tmp_path / "out" / "documents").to_table()
    assert dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True)) == texts_of(
        store.version(1)
    )
    assert table.schema.field("embedding").type.list_size == 16
    assert json.loads((tmp_path / "out" / "export.json").read_text())["version"] == 1
    assert (tmp_path / "out" / "encoder.json").exists()
    code, _, err = manage("export", "--output", tmp_path / "out")
    assert code == 2
    assert "is not empty" in err


def test_export_to_faiss_answers_with_its_map_of_ids(manage, tmp_path):
    assert manage("export", "--output", tmp_path / "out", "--format", "faiss")[0] == 0
    index = faiss.read_index(str(tmp_path / "out" / "index.faiss"))
    ids = pq.read_table(tmp_path / "out" / "ids.parquet")
    assert ids["position"].to_pylist() == list(range(index.ntotal))
    scores, found = index.search(vector_of("other text")[None], 1)
    assert ids["id"][int(found[0, 0])].as_py() == "d3"
    assert scores[0, 0] == pytest.approx(1, abs=1e-5)


def test_an_exported_version_is_clustered_like_any_vectors(manage, tmp_path):
    from cluster.vector_files import find_files

    manage("export", "--output", tmp_path / "out")
    assert len(find_files(str(tmp_path / "out" / "documents"))) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("publish", "--version", "9"), "has no version 9; its versions are 1, 2, 3"),
        (("publish",), "--version"),
        (("list", "--store", "/nosuch/store"), "is no store"),
        (("show", "--version", "x"), "x"),
        (("frobnicate",), "its verbs are list, show"),
    ],
)
def test_a_mistake_is_one_clear_line(manage, arguments, told):
    code, _, err = manage(*arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert told in lines[0]


def test_while_a_night_runs_a_person_waits(manage, store):
    with store.take_lease("nightly_reindex"):
        code, _, err = manage("publish", "--version", 1)
        assert code == 75
        assert "being written by 'nightly_reindex'" in err
        assert manage("list")[0] == 0
    assert store.version().number == 2


def test_a_verb_takes_its_flags_from_a_file(manage, store, tmp_path):
    path = tmp_path / "prune.yaml"
    path.write_text(f"store: {store.uri}\nkeep: 1\n")
    assert manage("prune", "--config", path)[0] == 0
    assert [v.number for v in store.versions()] == [2, 3]


def test_scores_of_scores_are_flat():
    assert flatten({"internal": {"silhouette": 0.5}, "labels": None, "k": 3}) == {
        "internal.silhouette": 0.5,
        "k": 3,
    }


def test_export_to_faiss_holds_the_index_once(store, tmp_path):
    """What a process needs beyond the vectors stays far below a second copy of them."""
    script = f"""
import numpy as np, pyarrow as pa
from pipelines.store.config import VERBS
from pipelines.store.manage import export
rows, width = 40_000, 768
class Record:
    created_at, fingerprint = "", ""
class Large:
    number, store, record = 1, "", Record
    schema = pa.schema([("id", pa.int64()), ("embedding", pa.list_(pa.float32(), width))])
    def count(self): return rows
    def artifacts(self): return []
    def batches(self, columns):
        flat = pa.array(np.ones(1000 * width, np.float32))
        vectors = pa.FixedSizeListArray.from_arrays(flat, width)
        for start in range(0, rows, 1000):
            ids = pa.array(range(start, start + 1000))
            yield pa.record_batch([ids, vectors], schema=self.schema)
def peak():  # no rusage, which begins at what the parent had held
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
before = peak()
export(Large(), {str(tmp_path / "large")!r}, "faiss")
print((peak() - before) / (4 * rows * width))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 1.5
    assert faiss.read_index(str(tmp_path / "large" / "index.faiss")).ntotal == 40_000
