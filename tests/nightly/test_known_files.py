"""A night reads what is new or changed: files as they were, touched, renamed, replaced."""

import json
import os
import time
from pathlib import Path

import pytest
from inline_ray import run_inline
from nights import WORKERS, check_rows, config_for, text_of, write_corpus

from pipelines.corpus import documents as corpus_documents
from pipelines.embedding import job as embed
from pipelines.nightly.job import reindex
from pipelines.runtime.run_record import read_run
from pipelines.store.store import Store

FILES = 4
A_FILE = 30


@pytest.fixture
def corpus(tmp_path, tiny_model_folder, monkeypatch):
    """A corpus of four files an hour old, its store after a first night, and what nights read."""
    monkeypatch.setattr(embed, "WORKERS", WORKERS)
    run_inline(monkeypatch)
    found = Corpus(tmp_path, tiny_model_folder, monkeypatch)
    for number in range(FILES):
        found.write(number)
    found.night()
    assert len(found.read) >= FILES
    return found


class Corpus:
    def __init__(self, folder, model, monkeypatch):
        self.folder, self.model = folder, model
        self.texts = {}
        self.read = []
        real = corpus_documents.read_shard

        def read_shard(shard, columns):
            self.read.append(Path(shard.file.path).parent.name)
            return real(shard, columns)

        monkeypatch.setattr("pipelines.embedding.keys.read_shard", read_shard)

    def path(self, number):
        return self.folder / "corpus" / str(number) / "part.jsonl"

    def write(self, number, version=0, age=3600):
        ids = range(number * A_FILE, (number + 1) * A_FILE)
        texts = {n: text_of(n, version=version) for n in ids}
        lines = [json.dumps({"id": n, "text": text}) for n, text in texts.items()]
        self.path(number).parent.mkdir(parents=True, exist_ok=True)
        self.path(number).write_text("\n".join(lines))
        self.texts |= texts
        self.set_age(number, age)

    def set_age(self, number, seconds):
        when = int(time.time()) - seconds
        os.utime(self.path(number), (when, when))

    def night(self, **settings):
        self.read.clear()
        config = config_for(
            str(self.folder / "corpus"), self.folder / "store", self.model, **settings
        )
        result = reindex(config)
        assert not result.refusals
        check_rows(self.folder / "store", self.texts)
        return read_run(f"{self.folder}/store/_work")["counts"]


def test_a_night_over_files_as_they_were_opens_none(corpus):
    counts = corpus.night()
    assert corpus.read == []
    assert (counts["unchanged"], counts["documents"]) == (FILES * A_FILE, FILES * A_FILE)
    assert len(Store.open(str(corpus.folder / "store")).versions()) == 1


def test_only_a_changed_file_is_read(corpus):
    corpus.write(2, version=1, age=1800)
    counts = corpus.night()
    assert set(corpus.read) == {"2"}
    assert (counts["changed"], counts["embedded"]) == (A_FILE, A_FILE)
    assert counts["unchanged"] == (FILES - 1) * A_FILE
    corpus.night()
    assert corpus.read == []


def test_a_touched_file_is_read_and_nothing_changes(corpus):
    corpus.set_age(1, 600)
    counts = corpus.night()
    assert set(corpus.read) == {"1"}
    assert counts["unchanged"] == FILES * A_FILE
    assert len(Store.open(str(corpus.folder / "store")).versions()) == 1


def test_a_renamed_file_is_read_and_nothing_changes(corpus):
    (corpus.folder / "corpus" / "1").rename(corpus.folder / "corpus" / "9")
    counts = corpus.night()
    assert set(corpus.read) == {"9"}
    assert counts["unchanged"] == FILES * A_FILE


def test_a_removed_file_takes_its_documents_and_its_keys_along(corpus):
    corpus.path(3).unlink()
    for n in range(3 * A_FILE, 4 * A_FILE):
        del corpus.texts[n]
    counts = corpus.night()
    assert corpus.read == []
    assert counts["deleted"] == A_FILE
    names = {path.name.partition("-")[0] for path in corpus.folder.glob("store/keys/*/*.texts")}
    assert len(names) == FILES - 1


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_seen_by_reread_alone(corpus):
    before = corpus.path(0).stat()
    old = corpus.texts.copy()
    corpus.write(0, version=1)
    assert corpus.path(0).stat().st_size == before.st_size
    os.utime(corpus.path(0), ns=(before.st_atime_ns, before.st_mtime_ns))
    new, corpus.texts = corpus.texts, old
    assert corpus.night()["changed"] == 0
    assert corpus.read == []
    corpus.texts = new
    assert corpus.night(reread=True)["changed"] == A_FILE
    assert set(corpus.read) == {"0", "1", "2", "3"}
    assert corpus.night()["unchanged"] == FILES * A_FILE


def test_a_state_is_not_trusted_that_was_read_within_a_tick_of_its_writing(corpus):
    corpus.write(1, version=1, age=0)
    corpus.night()
    assert set(corpus.read) == {"1"}
    assert corpus.night()["unchanged"] == FILES * A_FILE
    assert set(corpus.read) == {"1"}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_where_nothing_changed_no_file_is_opened_and_no_ray_started(
    tmp_path, tiny_model_folder, no_model, monkeypatch, dtype
):
    corpus = Path(write_corpus(tmp_path / "corpus", {n: text_of(n) for n in range(50)}))
    os.utime(corpus / "part.parquet", (1_700_000_000, 1_700_000_000))
    config = config_for(str(corpus), tmp_path / "store", tiny_model_folder, dtype=dtype)
    assert not reindex(config).refusals
    monkeypatch.setattr("pipelines.nightly.job.find_changes", None)

    def connect():
        raise AssertionError("Ray is started")

    assert "nothing changed" in reindex(config, connect).summary
    counts = read_run(str(tmp_path / "store" / "_work"))["counts"]
    assert (counts["documents"], counts["unchanged"]) == (50, 50)
