import json
import os
import subprocess
import sys

import pytest
from tiny_models import tiny_model
from transformers import AutoTokenizer

from pipelines.encoder import describe as describe_module
from pipelines.encoder import remembered
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.tokenization import PromptedTokenizer, text_limits
from pipelines.runtime.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return tiny_model(tmp_path / "model", num_hidden_layers=2)


@pytest.fixture
def made(monkeypatch):
    """Names of the models that were described, not remembered."""
    names = []
    original = describe_module._describe
    monkeypatch.setattr(
        describe_module, "_describe", lambda config: names.append(config.model) or original(config)
    )
    return names


def describe(folder, **settings):
    config = EncoderConfig(str(folder), adapter=None, dtype="float32", **settings)
    return describe_encoder(config, device="cpu")


def test_a_description_is_made_once(folder, made):
    first = describe(folder)
    assert describe(folder) == first
    assert made == [str(folder)]
    assert describe(folder, pooling="mean") != first
    assert made == [str(folder)] * 2


def test_a_second_description_loads_neither_torch_nor_transformers(folder, tmp_path):
    code = (
        "import sys; from pipelines.encoder.describe import describe_encoder as describe\n"
        "from pipelines.encoder.description import EncoderConfig\n"
        "from pipelines.encoder.tokenization import text_limits\n"
        f"found = describe(EncoderConfig({str(folder)!r}, dtype='float32'), device='cpu')\n"
        "print(found.fingerprint, text_limits(found), 'torch' in sys.modules, "
        "'transformers' in sys.modules)"
    )
    environment = {**os.environ, "SHOAL_HOME": str(tmp_path / "home")}
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment,
            capture_output=True, text=True, check=True,
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert told[0][:3] == told[1][:3]
    assert told[0][3:] == ["True", "True"]
    assert told[1][3:] == ["False", "False"]


def test_a_change_of_any_file_is_seen(folder, made):
    describe(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(folder)
    describe(folder)
    assert len(made) == 2


def test_a_change_of_how_a_folder_says_it_is_used_is_seen(folder):
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling.write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode": "mean"}))
    assert describe(folder).pooling == "mean"
    pooling.write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode": "lasttoken"}))
    assert describe(folder).pooling == "last"


def test_what_was_said_is_said_again(folder, caplog):
    def lines():
        caplog.clear()
        with caplog.at_level("INFO"):
            remembered.remember("test", str(folder), said)
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    def said():
        describe_module.log.warning("%s is %d", "it", 5)
        return [1]

    assert lines() == lines() == [("WARNING", "it is 5")]


def test_errors_are_not_remembered(folder, made):
    for _ in range(2):
        with pytest.raises(InputError, match="layer 9 does not exist"):
            describe(folder, layer=9)
    assert len(made) == 2


def test_models_with_code_are_described_each_time(folder, made):
    for _ in range(2):
        describe(folder, trust_remote_code=True)
    assert len(made) == 2


def test_a_damaged_note_is_made_again(folder, tmp_path, monkeypatch, made):
    monkeypatch.setattr(remembered, "FOLDER", str(tmp_path / "notes"))
    first = describe(folder)
    for path in (tmp_path / "notes").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert describe(folder) == first
    assert len(made) == 2


def test_limits_are_the_tokenizers(folder):
    description = describe(folder, prompt="topic")
    tokenizer = PromptedTokenizer.load(description)
    around = tokenizer.prefix_tokens + tokenizer.suffix_tokens
    assert around > 0
    for _ in range(2):
        assert text_limits(description) == (tokenizer.clip_characters, around)
