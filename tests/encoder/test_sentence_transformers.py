import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from tiny_models import SENTENCES, tiny_adapter, tiny_model, tiny_tokenizer

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.sentence_transformers import (
    export_sentence_transformer,
    import_sentence_transformer,
)
from pipelines.runtime.errors import InputError

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = [*SENTENCES, "", "a", " spaced out ", "\n", " ".join(SENTENCES), "</s> naïve 日本 😀"]


def there(folder):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    return model, model.encode(TEXTS, batch_size=4)


def imported(folder):
    config = import_sentence_transformer(str(folder))
    return Encoder.load(dataclasses.replace(config, dtype="float32"), device="cpu")


def assert_same(found, expected):
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(
        expected, axis=1
    )  # fmt: skip
    assert cosine.min() > 0.99999
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt": "cluster-the-text", "pooling": "last+mean", "normalize": False},
        {"prompt": "none", "pooling": "mean", "append_eos": True},
        {"pooling": "weighted-mean", "layer": 2},
        {"pooling": "first", "layer": 0, "prompt": "summary"},
        {"pooling": "max"},
    ],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_exported_encoder_gives_the_same_vectors_there(family, settings, tmp_path):
    folder = tiny_model(tmp_path / "model", family)
    config = EncoderConfig(str(folder), dtype="float32", **{"max_tokens": 20, **settings})
    encoder = Encoder.load(config, device="cpu")
    export_sentence_transformer(encoder.description, tmp_path / "export")
    _, vectors = there(tmp_path / "export")
    assert_same(encoder.encode(TEXTS), vectors)


def test_a_prompt_that_the_librarys_tokenizer_would_lose_is_one_of_the_folder(tmp_path):
    folder = tiny_model(tmp_path / "model", "qwen2", num_hidden_layers=2)
    config = EncoderConfig(str(folder), dtype="float32", prompt="cluster-the-text", pooling="mean")
    encoder = Encoder.load(config, device="cpu")
    export_sentence_transformer(encoder.description, tmp_path / "export")
    model, vectors = there(tmp_path / "export")
    some = [n for n, text in enumerate(TEXTS) if text]  # the space before an empty text is a token
    found = encoder.encode(TEXTS)[some]
    assert_same(found, vectors[some])
    assert_same(found, model.encode_query(TEXTS)[some])


def test_rules_of_a_tokenizer_that_the_library_would_not_keep_are_refused(tmp_path):
    folder = tiny_model(tmp_path / "model", "qwen2", num_hidden_layers=2)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["use_regex"] = False  # pieces go on across words
    content["model"]["merges"].insert(0, ["e", "Ġ"])
    content["model"]["vocab"]["eĠ"] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    description = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
    with pytest.raises(InputError, match=r"by rules of its own \(Qwen2Tokenizer\)"):
        export_sentence_transformer(description, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_adapter_is_exported_and_the_export_comes_back(tmp_path):
    folder = tiny_model(tmp_path / "model")
    adapter = tiny_adapter(tmp_path / "adapter", folder)
    config = EncoderConfig(str(folder), adapter=str(adapter), dtype="float32", max_tokens=20)
    encoder = Encoder.load(config, device="cpu")
    export_sentence_transformer(encoder.description, tmp_path / "export")
    _, vectors = there(tmp_path / "export")
    assert_same(encoder.encode(TEXTS), vectors)
    assert_same(imported(tmp_path / "export").encode(TEXTS), vectors)
    modes = {path.stat().st_mode for path in (tmp_path / "export").iterdir() if path.is_file()}
    assert len(modes) == 1  # whoever may read the settings may read the weights


@pytest.mark.parametrize("settings", [{"pooling": "body-mean"}, {"layer": (1, 2)}])
def test_what_has_no_equal_there_is_refused(settings, tmp_path):
    config = EncoderConfig(str(tiny_model(tmp_path / "model")), **settings)
    with pytest.raises(InputError, match="cannot be exported"):
        export_sentence_transformer(describe_encoder(config), tmp_path / "export")


def test_an_inner_layer_that_is_counted_otherwise_there_is_refused(tmp_path):
    config = EncoderConfig(str(tiny_model(tmp_path / "model", "mamba")), layer=1, dtype="float32")
    with pytest.raises(InputError, match="layer 1 of MambaModel cannot be exported"):
        export_sentence_transformer(describe_encoder(config), tmp_path / "export")


def make_there(folder, tmp_path, pooling, **options):
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = [Transformer(str(folder), max_seq_length=24), Pooling(64, pooling), Normalize()]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(tmp_path / "theirs"))
    return tmp_path / "theirs"


@pytest.mark.parametrize("prompt", ["", "query: ", "Q:"])
def test_an_imported_decoder_gives_the_same_vectors_here(prompt, tmp_path):
    folder = tiny_model(tmp_path / "model")
    theirs = make_there(
        folder, tmp_path, "lasttoken", prompts={"q": prompt}, default_prompt_name="q"
    )
    _, vectors = there(theirs)
    found = imported(theirs).encode(TEXTS)
    plain = [i for i, text in enumerate(TEXTS) if "</s>" not in text]  # a control token there
    if prompt.endswith(" "):  # an empty text leaves the prompt's space alone there
        plain = [i for i in plain if TEXTS[i].strip() == TEXTS[i] != ""]
    assert_same(found[plain], vectors[plain])


def test_an_imported_bidirectional_model_gives_the_same_vectors_here(tmp_path):
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
    )
    transformers.BertModel(settings).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    theirs = make_there(tmp_path / "bert", tmp_path, "mean")
    _, vectors = there(theirs)
    assert_same(imported(theirs).encode(TEXTS[:8]), vectors[:8])


def test_a_model_with_other_modules_is_refused(tmp_path):
    theirs = make_there(tiny_model(tmp_path / "model"), tmp_path, "mean")
    modules = json.loads((theirs / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "x.Dense"})
    (theirs / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="Dense"):
        import_sentence_transformer(str(theirs))


def test_a_folder_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no modules\.json"):
        import_sentence_transformer(str(tiny_model(tmp_path / "model")))
