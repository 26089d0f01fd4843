"""Documents drawn from a corpus that has to be told how it is read."""

from pathlib import Path

import pytest
from inline_ray import run_inline

from pipelines.corpus.files import CorpusOptions
from pipelines.corpus.sample import sample_corpus
from pipelines.evaluation.config import AttentionConfig, EvaluateConfig, SelectConfig
from pipelines.runtime.errors import InputError
from pipelines.training.config import FinetuneConfig


@pytest.mark.parametrize("config", [SelectConfig, EvaluateConfig, AttentionConfig, FinetuneConfig])
def test_a_sample_is_read_as_the_job_is_told(config, tmp_path: Path, monkeypatch):
    run_inline(monkeypatch)
    (tmp_path / "a.csv").write_text("1;'one; two'\n2;'it''s three'\n")
    told = config(
        corpus=str(tmp_path / "a.csv"),
        csv_delimiter=";",
        csv_quote="'",
        csv_header=("id", "text"),
    )
    sample = sample_corpus(told.corpus, str(tmp_path / "work"), options=told.reading)
    assert sorted(sample.texts) == ["it's three", "one; two"]
    assert getattr(told, "pairs_config", told).reading == CorpusOptions(
        csv_delimiter=";", csv_quote="'", csv_header=("id", "text")
    )


@pytest.mark.parametrize(
    ("config", "given"),
    [(EvaluateConfig, {}), (AttentionConfig, {"text": "a"}), (FinetuneConfig, {"pairs": "a.csv"})],
)
def test_options_of_a_corpus_have_no_effect_without_one(config, given):
    with pytest.raises(InputError, match="--csv-quote has no effect"):
        config(csv_quote="'", **given)
