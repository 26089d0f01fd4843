"""The attention job on tiny models."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SENTENCES, tiny_adapter, tiny_model, tiny_tokenizer

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.evaluation.attention import inspect_attention, last_token_attention, load_eager
from pipelines.evaluation.config import AttentionConfig
from pipelines.evaluation.figure import attention_spec
from pipelines.evaluation.token_kinds import (
    PromptedToken,
    describe_tokens,
    group_shares,
    prompt_and_content,
    shift,
    summarize,
    word_kinds,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run


@pytest.fixture
def config(tmp_path, tiny_model_folder):
    adapter = tiny_adapter(tmp_path / "tuned", tiny_model_folder)
    return AttentionConfig(
        text=SENTENCES[2],
        output=str(tmp_path / "out"),
        model=str(tiny_model_folder),
        adapters=(str(adapter),),
        dtype="float32",
    )


def run(config):
    with RunRecord(config.output, "inspect_attention", asdict(config)) as record:
        inspect_attention(config, record)
    return pq.read_table(Path(config.output) / "attention.parquet").to_pandas()


@pytest.mark.usefixtures("local_ray")
def test_one_text_before_and_after_tuning(config):
    table = run(config)
    assert list(table["encoder"].unique()) == ["untuned", "tuned"]
    sums = table.groupby("encoder")["attention"].sum()
    np.testing.assert_allclose(sums, 1.0, atol=1e-4)
    tokenizer = PromptedTokenizer.load(config.encoder(None))
    (ids,) = tokenizer.tokenize([config.text])
    untuned, tuned = (table[table["encoder"] == name] for name in ("untuned", "tuned"))
    assert untuned["token_id"].tolist() == ids
    assert list(untuned["part"]) == (
        ["prefix"] * tokenizer.prefix_tokens
        + ["body"] * (len(ids) - tokenizer.prefix_tokens - tokenizer.suffix_tokens)
        + ["suffix"] * tokenizer.suffix_tokens
    )
    assert np.abs(untuned["attention"].to_numpy() - tuned["attention"].to_numpy()).max() > 1e-3
    shares = json.loads((Path(config.output) / "shares.json").read_text())
    assert shares["layer"] == 2
    assert set(shares["shift"]) == {"tuned"}
    output = Path(config.output)
    assert (output / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "attention.svg").read_text()
    assert read_run(config.output)["counts"]["texts"] == 1
    assert not (output / "_work").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_corpus_gives_means_with_errors(config, tmp_path):
    corpus = tmp_path / "docs.parquet"
    rows = {"doc": range(8), "body": [s * 3 for s in SENTENCES]}
    pq.write_table(pa.table(rows), corpus)
    config = replace(
        config, text="", corpus=str(corpus), text_column="body", id_column="doc", documents=5
    )
    table = run(config)
    assert table["document"].nunique() == 5
    assert set(table["document"]) <= {str(n) for n in range(8)}
    shares = json.loads((Path(config.output) / "shares.json").read_text())
    assert shares["texts"] == 5
    assert shares["shares"]["tuned"]["prompt"]["standard_error"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "opt"])
def test_weights_are_the_models_own_for_any_layer_and_padding(tmp_path, family):
    folder = tiny_model(tmp_path / family, family)
    config = EncoderConfig(model=str(folder), layer=3, dtype="float32")
    description = describe_encoder(config)
    tokenizer = PromptedTokenizer.load(description)
    token_ids = tokenizer.tokenize(SENTENCES[:3])
    model = load_eager(description, torch.device("cpu"))
    found = dict(last_token_attention(model, token_ids, 3))
    whole = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    for index, ids in enumerate(token_ids):
        with torch.inference_mode():
            output = whole(torch.tensor([ids]), output_attentions=True)
        expected = output.attentions[2][0, :, -1].mean(dim=0)
        np.testing.assert_allclose(found[index], expected, atol=1e-5)


def test_words_are_told_apart():
    pieces = ["The", " quick", " brown", "ish", " fox", ",", " and", " 42", " it's", "?"]
    assert word_kinds(pieces) == [
        "function", "content", "content", "content", "content", "other", "function", "other",
        "function", "other",
    ]  # fmt: skip


@given(st.lists(st.text(max_size=4), max_size=12))
def test_every_piece_has_a_kind(pieces):
    kinds = word_kinds(pieces)
    assert len(kinds) == len(pieces)
    assert set(kinds) <= {"content", "function", "other"}


def test_tokens_know_their_part():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("one two three four", add_special_tokens=False)
    tokens = describe_tokens(tokenizer, ids, 1, 2)
    assert [t.part for t in tokens] == ["prefix", *["body"] * (len(ids) - 3), "suffix", "suffix"]
    assert all((t.kind is not None) == (t.part == "body") for t in tokens)
    assert "".join(t.text for t in tokens) == "one two three four"


TOKENS = [
    PromptedToken(1, "This", "prefix", None),
    PromptedToken(2, ' "', "prefix", None),
    PromptedToken(3, "sea", "body", "content"),
    PromptedToken(4, " the", "body", "function"),
    PromptedToken(5, '"', "suffix", None),
]


def test_shares_add_up_and_leave_the_first_token_apart():
    shares = group_shares(TOKENS, np.array([0.5, 0.1, 0.2, 0.05, 0.15], np.float32))
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["first token"] == pytest.approx(0.5)
    assert prompt_and_content(shares) == pytest.approx({"prompt": 0.5, "content": 0.4})


def test_a_shift_is_paired_by_text():
    weights = np.array([[0.5, 0.1, 0.2, 0.05, 0.15], [0.1, 0.1, 0.6, 0.1, 0.1]])
    before = [group_shares(TOKENS, row) for row in weights]
    moved = weights + np.array([-0.1, 0.0, 0.1, 0.0, 0.0])
    after = [group_shares(TOKENS, row) for row in moved]
    found = shift(before, after)["content words"]
    assert found["mean"] == pytest.approx(0.1)
    assert found["standard_error"] == pytest.approx(0.0, abs=1e-9)
    assert summarize(before)["content words"]["mean"] == pytest.approx(0.4)


def test_long_texts_are_drawn_in_pieces():
    tokens = 300
    table = pa.table(
        {
            "encoder": ["untuned"] * tokens,
            "document": ["text"] * tokens,
            "position": range(tokens),
            "token": ["a"] * tokens,
            "part": ["prefix"] * 2 + ["body"] * 296 + ["suffix"] * 2,
            "layer": [1] * tokens,
            "attention": [1 / tokens] * tokens,
        }
    )
    groups = group_shares(TOKENS, np.full(5, 0.2))
    spec = attention_spec(table, {"untuned": summarize([groups])})
    drawn = spec["vconcat"][1]["data"]["values"]
    assert len({value["slot"] for value in drawn}) == 1 + 10 + 2
    assert sum(value["attention"] for value in drawn) == pytest.approx(1 - 1 / tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "a", "corpus": "b"}, "give one of them"),
        ({"layer": 0}, "layer 0"),
        ({"documents": 0}, "at least 1"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AttentionConfig(**settings)
