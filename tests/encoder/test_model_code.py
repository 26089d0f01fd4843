import json
import logging

import pytest
from tiny_models import tiny_adapter, tiny_model

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.runtime.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return tiny_model(tmp_path / "model", num_hidden_layers=2)


def describe(folder, **settings):
    return describe_encoder(EncoderConfig(str(folder), **{"dtype": "float32", **settings}))


def change(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("AutoModel", "modeling_bi.LlamaBiModel"),
        ("AutoModelForCausalLM", "modeling_bi.LlamaBiForCausalLM"),
        ("AutoModelForMaskedLM", "modeling_bi.LlamaForMaskedLM"),
        ("AutoConfig", "configuration_bi.BiConfig"),
    ],
)
def test_a_class_of_its_own_is_not_run_as_the_stock_one(folder, kind, name):
    change(folder / "config.json", auto_map={kind: name})
    with pytest.raises(InputError, match=f"a class of its own, {name.split('.')[1]}, where"):
        describe(folder, attention="causal")


def test_code_under_a_stock_name_is_refused_unless_it_is_said_how_it_attends(folder):
    plain = describe(folder)
    change(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_llama.LlamaConfig",
            "AutoModel": "modeling_llama.LlamaModel",
            "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
        },
    )
    with pytest.raises(
        InputError, match=r"code of its own for Llama.*--attention causal or"
    ) as told:
        describe(folder)
    assert "\n" not in str(told.value)
    causal = describe(folder, attention="causal")
    assert causal.attention is None
    both_ways = describe(folder, attention="bidirectional")
    found = Encoder.load(both_ways, device="cpu").encode(["Two words"])
    alike = Encoder.load(causal, device="cpu").encode(["Two words"])
    assert (found * alike).sum() < 0.999
    assert plain.deciding.keys() == causal.deciding.keys()


def test_an_adapter_says_how_the_class_that_it_was_trained_on_attends(folder, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", folder)
    change(folder / "config.json", auto_map={"AutoModel": "modeling_llama.LlamaModel"})
    with pytest.raises(InputError, match=r"code of its own for LlamaModel"):
        describe(folder, adapter=str(adapter))
    trained = describe(folder, adapter=str(adapter), attention="bidirectional")
    trained.save(str(adapter))
    assert describe(folder, adapter=str(adapter)).attention == "bidirectional"


def test_a_tokenizer_of_its_own_is_read_by_its_file_and_told(folder, caplog):
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tok", "own.TokFast"]})
    with caplog.at_level(logging.WARNING, logger="pipelines.encoder"):
        describe(folder)
    assert [record.getMessage().count("own.TokFast") for record in caplog.records] == [1]


def test_a_tokenizer_of_its_own_without_a_file_is_refused(folder):
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tok", None]})
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(InputError, match=r"tokenizer of its own, own\.Tok, and has no"):
        describe(folder)


def test_code_that_is_run_decides_the_fingerprint(folder):
    config = {"trust_remote_code": True}
    before = describe(folder, **config).fingerprint
    assert before == describe(folder).fingerprint
    (folder / "modeling_own.py").write_text("SCALE = 1")
    first = describe(folder, **config).fingerprint
    (folder / "modeling_own.py").write_text("SCALE = 2")
    assert len({before, first, describe(folder, **config).fingerprint}) == 3
