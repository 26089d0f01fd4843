"""A store after its first night, and nights over it in this process, without a model."""

import shutil

import pytest
from inline_ray import run_inline
from nights import WORKERS, night, text_of, write_corpus

from pipelines.embedding import job as embed

DOCUMENTS = 200


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(embed, "WORKERS", WORKERS)
    run_inline(monkeypatch)


@pytest.fixture(scope="session")
def first(tmp_path_factory, tiny_model_folder):
    """A store after its first night; tests copy it."""
    folder = tmp_path_factory.mktemp("first")
    texts = {n: text_of(n) for n in range(DOCUMENTS)}
    labels = {n: f"label{text[:1]}" for n, text in texts.items()}
    corpus = write_corpus(folder / "corpus", texts, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "WORKERS", WORKERS)
        run_inline(patch)
        result = night(corpus, folder / "store", tiny_model_folder, label_column="label")
    assert not result.refusals
    return folder


@pytest.fixture
def store(first, tmp_path):
    """A copy of the store after its first night, and a folder for the next corpus."""
    shutil.copytree(first / "store", tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def tonight(store, tmp_path, tiny_model_folder):
    """Runs a night over texts; labels are those of the first night unless given."""

    def run(texts, labels=None, **settings):
        labels = labels or {n: f"label{text[:1]}" for n, text in texts.items()}
        corpus = write_corpus(tmp_path / "corpus", texts, labels)
        where = settings.pop("store", store)
        return night(corpus, where, tiny_model_folder, label_column="label", **settings)

    return run
