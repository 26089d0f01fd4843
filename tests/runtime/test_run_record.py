import json

import pytest

from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, changed_fields, read_run, require_complete

CONFIG = {"corpus": "a.parquet", "columns": ("x", "y")}


def test_record_is_running_inside_and_complete_after(tmp_path):
    folder = str(tmp_path / "out")
    with RunRecord(folder, "embed_corpus", CONFIG, seed=7) as record:
        assert read_run(folder)["status"] == "running"
        record.counts["documents"] = 3
        record.metrics["tokens_per_second"] = 1.5
    run = require_complete(folder)
    assert run["job"] == "embed_corpus"
    assert run["seed"] == 7
    assert run["counts"] == {"documents": 3}
    assert run["metrics"] == {"tokens_per_second": 1.5}
    assert run["config"] == {"corpus": "a.parquet", "columns": ["x", "y"]}
    assert run["seconds"] >= 0
    assert "python" in run["versions"]


def test_failure_is_recorded_and_refused_by_readers(tmp_path):
    with pytest.raises(RuntimeError), RunRecord(str(tmp_path), "job", CONFIG):
        raise RuntimeError("disk on fire\nsecond line")
    assert read_run(str(tmp_path))["error"] == "disk on fire"
    with pytest.raises(InputError, match="status 'failed', not 'complete'"):
        require_complete(str(tmp_path))


def test_interrupted_run_is_refused_by_readers(tmp_path):
    RunRecord(str(tmp_path), "job", CONFIG).__enter__()
    with pytest.raises(InputError, match="status 'running'"):
        require_complete(str(tmp_path))


def test_folder_without_record_is_refused_by_readers(tmp_path):
    with pytest.raises(InputError, match=r"holds no run\.json"):
        require_complete(str(tmp_path))


def test_same_configuration_may_go_on(tmp_path):
    with RunRecord(str(tmp_path), "job", CONFIG):
        pass
    with RunRecord(str(tmp_path), "job", CONFIG) as record:
        assert record.previous is not None
        assert record.previous["status"] == "complete"


def test_another_configuration_is_refused_by_field(tmp_path):
    with RunRecord(str(tmp_path), "job", CONFIG):
        pass
    with (
        pytest.raises(InputError, match=r"its corpus is 'a\.parquet', this one's is 'b\.parquet'"),
        RunRecord(str(tmp_path), "job", {**CONFIG, "corpus": "b.parquet"}),
    ):
        pass
    assert require_complete(str(tmp_path))["config"]["corpus"] == "a.parquet"


def test_a_setting_that_an_earlier_release_did_not_have_is_no_difference_while_it_is_off(tmp_path):
    with RunRecord(str(tmp_path), "job", CONFIG):
        pass
    with RunRecord(str(tmp_path), "job", {**CONFIG, "passages": "", "overlap": 0}):
        pass
    folder = tmp_path / "other"
    with RunRecord(str(folder), "job", CONFIG):
        pass
    with pytest.raises(InputError, match="its passages is None, this one's is 'tokens:9'"):
        RunRecord(str(folder), "job", {**CONFIG, "passages": "tokens:9"}).__enter__()


def test_another_job_is_refused(tmp_path):
    with RunRecord(str(tmp_path), "job", CONFIG):
        pass
    with pytest.raises(InputError, match="of 'job', not of 'other'"):
        RunRecord(str(tmp_path), "other", CONFIG).__enter__()


def test_a_failed_run_that_left_nothing_gives_way(tmp_path):
    with pytest.raises(ValueError, match="typo"), RunRecord(str(tmp_path), "job", CONFIG):
        raise ValueError("typo")
    with RunRecord(str(tmp_path), "job", {**CONFIG, "corpus": "b.parquet"}):
        pass
    assert require_complete(str(tmp_path))["config"]["corpus"] == "b.parquet"


def test_foreign_files_are_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"not empty \(it holds 'thesis.txt'\)"):
        RunRecord(str(tmp_path), "job", CONFIG).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_broken_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="is not a run record"):
        read_run(str(tmp_path))


def test_changed_fields_compares_as_json():
    assert changed_fields({"a": (1, 2), "b": 1}, {"a": [1, 2], "b": 2, "c": 0}) == ["b", "c"]
    assert json.loads(json.dumps(CONFIG)) != CONFIG  # which is why
