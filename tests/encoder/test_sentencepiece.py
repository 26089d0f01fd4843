import io
import json

import pytest
from tiny_models import SENTENCES, tiny_model

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.sentencepiece import read_sentencepiece
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.errors import InputError

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [
    *SENTENCES, "a", " leading", "two  spaces", "line\n\nbreak 2024", "trailing ", "été 漢字 😀",
]  # fmt: skip
RULES = {
    "llama": {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True},
    "gemma": {
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "add_dummy_prefix": False,
        "user_defined_symbols": ["<turn>", "▁▁"],
    },
    "unigram": {"model_type": "unigram", "vocab_size": 330, "byte_fallback": True},
    "composed": {
        "model_type": "unigram", "vocab_size": 120, "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
}  # fmt: skip


def train(path, **rules):
    """A SentencePiece file of a few sentences, and the library's own reader of it."""
    written = io.BytesIO()
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=written, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, minloglevel=2, **{**plain, **rules},
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def make_folder(folder, rules, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return train(folder / "tokenizer.model", **rules)


@pytest.mark.parametrize("name", RULES)
def test_tokens_are_those_of_the_library(tmp_path, name):
    library = make_folder(tmp_path / "model", RULES[name])
    tokenizer = read_sentencepiece(tmp_path / "model")
    for text in [*TEXTS, *(["a <turn> b"] if name == "gemma" else [])]:
        assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text), text
    assert tokenizer.encode("a") == [1, *library.encode("a")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )


def test_settings_beside_the_file_are_heeded(tmp_path):
    later = {"400": {"content": "<|later|>", "special": True, "normalized": False}}
    library = make_folder(
        tmp_path / "model", RULES["llama"], tokenizer_class="LlamaTokenizer", add_bos_token=False,
        add_eos_token=True, pad_token="</s>", model_max_length=77, added_tokens_decoder=later,
    )  # fmt: skip
    tokenizer = read_sentencepiece(tmp_path / "model")
    assert tokenizer.encode("a") == [*library.encode("a"), 2]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 77)
    assert tokenizer.encode("<|later|>", add_special_tokens=False) == [400]


def test_a_folder_with_this_file_alone_is_embedded_by_its_tokens(tmp_path):
    folder = tiny_model(tmp_path / "model", num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    library = train(folder / "tokenizer.model", **RULES["llama"])
    describe_encoder(EncoderConfig(str(folder)))
    prompted = PromptedTokenizer.from_folder(folder, PromptTemplate("Sort: ", ""), max_tokens=100)
    for text in SENTENCES:
        assert prompted.tokenize([text]) == [[1, *library.encode(f"Sort: {text}")]]


@pytest.mark.parametrize(
    ("rules", "settings", "message"),
    [
        (RULES["llama"], {"tokenizer_class": "T5Tokenizer"}, "of T5Tokenizer; those of Llama"),
        ({"model_type": "char", "vocab_size": 60}, {}, "no equal here"),
        (
            {**RULES["llama"], "user_defined_symbols": ["<turn>"]},
            {"tokenizer_class": "LlamaTokenizer"},
            "no equal here",
        ),
        (
            RULES["llama"],
            {"added_tokens_decoder": {"777": {"content": "<x>"}}},
            "gives '<x>' the number 777",
        ),
    ],
)
def test_what_has_no_equal_is_one_line(tmp_path, rules, settings, message):
    make_folder(tmp_path / "model", rules, **settings)
    with pytest.raises(InputError, match=message) as caught:
        read_sentencepiece(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    make_folder(tmp_path / "model", RULES["llama"])
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"version https://git-lfs")
    with pytest.raises(InputError, match="is no SentencePiece file"):
        read_sentencepiece(tmp_path / "model")
