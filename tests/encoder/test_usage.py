import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, SENTENCES, tiny_model, tiny_tokenizer

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig, EncoderDescription
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.packed import PackedDecoder
from pipelines.runtime.errors import InputError

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = [*SENTENCES, "a", "The KEEPER saved", "\n(two) lines", " ".join(SENTENCES) * 3]
MODULES = "sentence_transformers.models"
TRANSFORMER = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.models.Transformer",
}


def make_folder(folder, *modules, transformer=None, family="llama", **settings):
    """A tiny model as a sentence-transformers folder; each module is its name and its settings."""
    tiny_model(folder, family, num_hidden_layers=2)
    listed = [TRANSFORMER]
    for number, (name, content) in enumerate(modules, start=1):
        path = f"{number}_{name}"
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps(content))
        if name == "Dense":
            torch.manual_seed(number)
            weights = {
                "linear.weight": torch.randn(content["out_features"], content["in_features"])
            }
            if content.get("bias", True):
                weights["linear.bias"] = torch.randn(content["out_features"])
            save_file(weights, folder / path / "model.safetensors")
        kind = f"{MODULES}.{name}"
        listed.append({"idx": number, "name": str(number), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer or {}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


def pooling(*modes, **more):
    return "Pooling", {"embedding_dimension": 64, "pooling_mode": list(modes), **more}


def dense(inputs, outputs, activation="torch.nn.modules.activation.Tanh", **more):
    content = {"in_features": inputs, "out_features": outputs, "bias": True}
    return "Dense", {**content, "activation_function": activation, **more}


NORMALIZE = ("Normalize", {})
PROMPTS = {"query": "Find: ", "document": "D: "}
FOLDERS = {
    "mean": ([pooling("mean"), NORMALIZE], {}),
    "first": ([pooling("cls")], {"transformer": {"max_seq_length": 24}}),
    "last with a default prompt": (
        [pooling("lasttoken"), NORMALIZE],
        {"prompts": PROMPTS, "default_prompt_name": "document"},
    ),
    "a prompt that is not pooled": (
        [pooling("mean", include_prompt=False)],
        {"prompts": PROMPTS, "default_prompt_name": "document"},
    ),
    "several ways": ([pooling("cls", "max", "mean_sqrt_len_tokens", "weightedmean")], {}),
    "old flags": (
        [("Pooling", {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True,
                      "pooling_mode_mean_sqrt_len_tokens": True})],
        {},
    ),
    "two projections": (
        [pooling("mean"), dense(64, 32), dense(32, 16, "torch.nn.modules.linear.Identity"),
         NORMALIZE],
        {},
    ),
    "lower case": (
        [pooling("lasttoken")], {"transformer": {"max_seq_length": 20, "do_lower_case": True}},
    ),
    "cut vectors": ([pooling("mean")], {"truncate_dim": 24}),
    "no way named": ([("Pooling", {"word_embedding_dimension": 64})], {}),
    "padding on the left": (
        [pooling("cls", "lasttoken", "weightedmean")],
        {"transformer": {"max_seq_length": 64, "tokenizer_args": {"padding_side": "left"}}},
    ),
    "a limit passed on": (
        [pooling("mean")],
        {"transformer": {"max_seq_length": 64, "tokenizer_args": {"model_max_length": 16}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("llama", "opt") else pytest.mark.slow)
        for family in (*FAMILIES, "bert", "modernbert")
    ],
)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_used_as_it_says(tmp_path, name, family):
    modules, settings = FOLDERS[name]
    folder = make_folder(tmp_path / "model", *modules, family=family, **settings)
    there = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    # padding on the left moves learned positions there, so texts are read one by one
    expected = there.encode(TEXTS, batch_size=1)
    encoder = Encoder.load(EncoderConfig(str(folder), dtype="float32"), device="cpu")
    found = encoder.encode(TEXTS)
    assert found.shape == expected.shape
    lengths = np.linalg.norm(expected, axis=1)
    some = lengths > 0  # there a text of one token has none left where the prompt is not pooled
    assert some.sum() >= len(TEXTS) - 1
    assert ((found * expected).sum(1)[some] / lengths[some]).min() > 0.9999
    encoder.save(str(tmp_path))
    assert EncoderDescription.load(str(tmp_path)) == encoder.description


def test_a_default_prompt_that_is_null_is_none(tmp_path):
    said = {"prompts": {"document": None}, "default_prompt_name": "document"}
    folder = make_folder(tmp_path / "model", pooling("mean"), **said)
    assert describe_encoder(EncoderConfig(str(folder))).prompt == "{text}"


def test_a_limit_beyond_positions_that_are_computed_is_the_librarys(tmp_path):
    said = {"transformer": {"max_seq_length": 96}}
    folder = make_folder(tmp_path / "model", pooling("mean"), **said)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    there = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    encoder = Encoder.load(EncoderConfig(str(folder), dtype="float32"), device="cpu")
    assert encoder.description.max_tokens == 95
    assert len(encoder.tokenizer.tokenize([TEXTS[-1]])[0]) == 96
    expected = there.encode(TEXTS)
    assert ((encoder.encode(TEXTS) * expected).sum(1) / np.linalg.norm(expected, axis=1)).min() > (
        0.9999
    )
    (folder / "sentence_bert_config.json").write_text("{}")  # then the model's own are the limit
    assert describe_encoder(EncoderConfig(str(folder))).max_tokens == 47
    with pytest.raises(InputError, match="max_tokens is 50, but"):
        describe_encoder(EncoderConfig(str(folder), max_tokens=50))


def test_a_projection_to_zeros_is_the_librarys(tmp_path):
    relu = dense(64, 16, "torch.nn.modules.activation.ReLU")
    folder = make_folder(tmp_path / "model", pooling("mean"), relu)
    weights = {"linear.weight": torch.zeros(16, 64), "linear.bias": -torch.ones(16)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    encoder = Encoder.load(EncoderConfig(str(folder), dtype="float32"), device="cpu")
    assert not encoder.encode(TEXTS).any()


def test_a_gemma_that_attends_both_ways_and_is_projected_equals_the_library(tmp_path):
    folder = make_folder(
        tmp_path / "model", pooling("mean"), dense(64, 96), dense(96, 64), NORMALIZE,
        family="gemma3", prompts=PROMPTS, default_prompt_name="document",
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    both_ways = {"use_bidirectional_attention": True, "sliding_window": 17}
    (folder / "config.json").write_text(json.dumps({**config, **both_ways}))
    there = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    encoder = Encoder.load(EncoderConfig(str(folder), dtype="float32"), device="cpu")
    assert isinstance(encoder._decoder, PackedDecoder)
    assert (encoder.encode(TEXTS) * there.encode(TEXTS)).sum(1).min() > 0.9999
    queries = Encoder.load(encoder.description.for_queries(), device="cpu")
    assert (queries.encode(TEXTS) * there.encode_query(TEXTS)).sum(1).min() > 0.9999


def test_queries_have_the_folders_query_prompt(tmp_path):
    folder = make_folder(
        tmp_path / "model", pooling("lasttoken"), prompts=PROMPTS, default_prompt_name="document"
    )
    there = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    description = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
    assert (description.prompt, description.query_prompt) == ("D: {text}", "Find: {text}")
    found = Encoder.load(description.for_queries(), device="cpu").encode(["goals"])
    expected = there.encode_query(["goals"])
    assert (found @ expected.T).item() / np.linalg.norm(expected) > 0.9999
    own = describe_encoder(EncoderConfig(str(folder), dtype="float32", query_prompt="Q: {text}"))
    assert own.for_queries().prompt == "Q: {text}"
    assert own.fingerprint == description.fingerprint


def test_a_prompt_of_documents_that_is_not_the_default_is_told(tmp_path, caplog):
    prompts = {"query": "Q: ", "passage": "title: none | text: "}
    folder = make_folder(tmp_path / "model", pooling("mean"), prompts=prompts)
    with caplog.at_level(logging.INFO, logger="pipelines.encoder"):
        description = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
        told = [r.getMessage() for r in caplog.records]
        assert [line.split(": --prompt ")[1] for line in told] == [
            "'title: none | text: {text}' for such a store"
        ]
        assert (description.prompt, description.query_prompt) == ("{text}", "Q: {text}")
        caplog.clear()
        describe_encoder(
            EncoderConfig(str(folder), dtype="float32", prompt=prompts["passage"] + "{text}")
        )
        assert "leaves out" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": {"document": "D: "}, "default_prompt_name": "document"},
        {"prompts": {"query": "Find what answers: "}, "transformer": {"max_seq_length": 24}},
    ],
)
def test_queries_equal_those_of_the_library(tmp_path, settings):
    folder = make_folder(tmp_path / "model", pooling("mean"), **settings)
    there = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    description = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
    found = Encoder.load(description.for_queries(), device="cpu").encode(TEXTS)
    expected = there.encode_query(TEXTS)
    assert ((found * expected).sum(1) / np.linalg.norm(expected, axis=1)).min() > 0.9999


def test_flags_that_contradict_the_folder_win_and_are_told(tmp_path, caplog):
    folder = make_folder(tmp_path / "model", pooling("mean"), NORMALIZE)
    with caplog.at_level(logging.WARNING, logger="pipelines.encoder"):
        plain = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
        assert not caplog.records
        config = EncoderConfig(str(folder), dtype="float32", pooling="last", prompt="one-word")
        flagged = describe_encoder(config)
    assert (plain.pooling, plain.prompt) == ("mean", "{text}")
    assert (flagged.pooling, flagged.prompt) == (
        "last",
        'This sentence: "{text}" means in one word:"',
    )
    assert [record.getMessage().split()[2] for record in caplog.records] == ["prompt", "pooling"]


@pytest.mark.parametrize(
    ("modules", "settings", "message"),
    [
        ([pooling("mean"), ("LayerNorm", {})], {}, "the module LayerNorm"),
        ([("Router", {})], {}, "made of Transformer, Router"),
        ([pooling("mean"), NORMALIZE, dense(64, 8)], {}, "a Dense after a Normalize"),
        (
            [pooling("mean"), ("Normalize", {"module_input_name": "token_embeddings"})],
            {},
            "normalises other vectors than the sentence's",
        ),
        (
            [pooling("mean"), dense(64, 8, "torch.nn.modules.activation.Softmax")],
            {},
            "the Dense in",
        ),
        ([pooling("mean"), dense(48, 8)], {}, "pools to 64 numbers, its Dense takes 48"),
        ([pooling("mean"), dense(64, 8), dense(16, 4)], {}, "followed by one that takes 16"),
        (
            [pooling("mean")],
            {"transformer": {"model_kwargs": {"num_hidden_layers": 1}}},
            "num_hidden_layers = 1",
        ),
        ([pooling("mean")], {"transformer": {"something_new": 1}}, "setting 'something_new'"),
        ([pooling("mean")], {"model_type": "SparseEncoder"}, "is a SparseEncoder"),
        ([pooling("mean")], {"default_prompt_name": "passage"}, "no prompt 'passage'"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(tmp_path, modules, settings, message):
    folder = make_folder(tmp_path / "model", *modules, **settings)
    with pytest.raises(InputError, match=message) as caught:
        describe_encoder(EncoderConfig(str(folder)))
    assert "\n" not in str(caught.value)


def test_an_inner_layer_that_is_counted_otherwise_there_is_refused(tmp_path):
    output = {"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}}
    said = {"transformer": {"modality_config": output}}
    folder = make_folder(tmp_path / "llama", pooling("mean"), **said)
    assert describe_encoder(EncoderConfig(str(folder))).layers == (1,)
    folder = make_folder(tmp_path / "mamba", pooling("mean"), family="mamba", **said)
    with pytest.raises(InputError, match="hidden_states"):
        describe_encoder(EncoderConfig(str(folder)))


def test_a_folder_that_reads_the_end_of_a_text_is_refused(tmp_path):
    folder = make_folder(tmp_path / "model", pooling("mean"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "truncation_side": "left"})
    )
    with pytest.raises(InputError, match="reads the end of a long text"):
        describe_encoder(EncoderConfig(str(folder)))


@pytest.mark.parametrize("kind", ["static", "router"])
def test_folders_of_other_models_are_refused_by_the_names_of_their_modules(tmp_path, kind):
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

    base = tiny_model(tmp_path / "base")
    static = StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=16)
    modules = {
        "static": [static],
        "router": [Router.for_query_document([Transformer(str(base)), Pooling(64)], [static])],
    }
    model = sentence_transformers.SentenceTransformer(modules=modules[kind], device="cpu")
    model.save(str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"\((StaticEmbedding|Router)\), which has no equal here"):
        describe_encoder(EncoderConfig(str(tmp_path / "model")))


def test_a_module_of_somebody_elses_code_is_refused(tmp_path):
    folder = make_folder(tmp_path / "model", pooling("mean"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"custom_st\.Transformer, code of its own"):
        describe_encoder(EncoderConfig(str(folder)))


def test_a_projection_of_other_shapes_than_it_says_is_refused(tmp_path):
    folder = make_folder(tmp_path / "model", pooling("mean"), dense(64, 16))
    save_file({"linear.weight": torch.ones(8, 64)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match=r"has weights .* its config.json calls for"):
        describe_encoder(EncoderConfig(str(folder)))


def test_a_changed_projection_is_another_encoder(tmp_path):
    folder = make_folder(tmp_path / "model", pooling("mean"), dense(64, 16))
    description = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
    save_file(
        {"linear.weight": torch.ones(16, 64), "linear.bias": torch.ones(16)},
        folder / "2_Dense" / "model.safetensors",
    )
    with pytest.raises(InputError, match="not the one described"):
        Encoder.load(description, device="cpu")
    assert describe_encoder(EncoderConfig(str(folder), dtype="float32")).fingerprint != (
        description.fingerprint
    )
