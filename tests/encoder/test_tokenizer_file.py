import json
import pickle
from dataclasses import replace

import pytest
import tokenizers
from tiny_models import SENTENCES, tiny_model

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.tokenization import PromptedTokenizer, load_tokenizer
from pipelines.runtime.errors import InputError

LINES = ["1. First\n\n2. Second\n\n3. Third", "Total:  42", "In 2024,  67 people\n\n12"]
TEXTS = [*LINES, *SENTENCES, "It's  HE'LL naïve", " a", "日本"]


def byte_level():
    """Digits are split off before all else, as in SmolLM2's and StarCoder2's files."""
    parts = tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = parts.Sequence(
        [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=parts.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
    )  # fmt: skip
    backend.train_from_iterator([*SENTENCES, *LINES * 9], trainer)
    return backend


def unigram():
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*SENTENCES, *LINES] * 3, trainer)
    return backend


def save(folder, backend, **settings):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def folder(tmp_path):
    return tiny_model(tmp_path / "model", num_hidden_layers=2)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (byte_level, "GPT2Tokenizer"),
        (byte_level, "Qwen2TokenizerFast"),
        (byte_level, "PreTrainedTokenizerFast"),
        (unigram, "LlamaTokenizer"),
        (unigram, "GemmaTokenizerFast"),
    ],
)
def test_texts_are_split_by_the_file_whatever_class_is_named(folder, make, named):
    backend = make()
    save(folder, backend, tokenizer_class=named)
    expected = [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert load_tokenizer(folder)(TEXTS, add_special_tokens=False)["input_ids"] == expected
    prompted = PromptedTokenizer.from_folder(folder, PromptTemplate("", ""), max_tokens=256)
    again = pickle.loads(pickle.dumps(prompted))
    opening, closing = prompted.head, prompted.tail
    wanted = [[*opening, *ids, *closing] for ids in expected]
    assert prompted.tokenize(TEXTS) == again.tokenize(TEXTS) == wanted


def test_an_encoder_that_read_texts_by_the_rules_of_a_class_is_another_one(folder):
    save(folder, byte_level(), tokenizer_class="GPT2Tokenizer")
    described = describe_encoder(EncoderConfig(str(folder), dtype="float32"))
    earlier = replace(described, tokenization=2)
    assert earlier.fingerprint != described.fingerprint
    with pytest.raises(InputError, match=r"split by other rules than those of its tokenizer\.json"):
        PromptedTokenizer.load(earlier)
    PromptedTokenizer.load(described.for_queries("query: {text}"))


def test_a_file_whose_class_has_the_same_rules_has_the_fingerprint_that_it_had(folder):
    backend = byte_level()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    save(folder, backend, tokenizer_class="GPT2Tokenizer")
    assert describe_encoder(EncoderConfig(str(folder), dtype="float32")).tokenization == 1


@pytest.mark.parametrize("lower", [True, False])
def test_what_the_settings_say_of_case_goes_on_top_of_the_file(folder, lower):
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not lower)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(special_tokens=special, show_progress=False)
    backend.train_from_iterator([*SENTENCES, "the", "The"], trainer)
    save(folder, backend, tokenizer_class="BertTokenizer", do_lower_case=lower)
    read = load_tokenizer(folder)
    assert (read.encode("The") == read.encode("the")) == lower


@pytest.mark.parametrize("named", ["LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_that_does_not_find_its_vocabulary_is_refused(folder, named):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    vocabulary = json.loads(byte_level().to_str())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match=r"reads all texts alike|cannot be read") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
