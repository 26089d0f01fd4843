"""Where texts are cut: by tokenizers of several kinds, on texts of any characters."""

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SENTENCES, tiny_tokenizer

from pipelines.corpus.passages import Cuts, PassageOptions, cut_texts
from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.runtime.errors import InputError


def word_pieces() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def sentence_pieces() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    marks = [f"<0x{n:02X}>" for n in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *marks], show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def prompted(tokenizer, prompt: str = "{text}", **how) -> PromptedTokenizer:
    with pytest.MonkeyPatch.context() as patch:
        read = "pipelines.encoder.tokenization.read_tokenizer"
        patch.setattr(read, lambda *_: (tokenizer, False))
        return PromptedTokenizer.from_folder(
            None, PromptTemplate.parse(prompt), max_tokens=4096, **how
        )


def fast(backend: tokenizers.Tokenizer):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


READERS = {
    "bytes": prompted(tiny_tokenizer()),
    "prompt": prompted(tiny_tokenizer(), "Topic of {text}"),
    "quoted": prompted(tiny_tokenizer(), 'This: "{text}" means:"'),
    "word pieces": prompted(fast(word_pieces())),
    "sentence pieces": prompted(fast(sentence_pieces())),
    "small letters": prompted(fast(sentence_pieces()), lower_case=True),
}
MARKS = "abc ABC.!?\n\t \u00a0\u200b\u0301éİßΣ。是🙂\U0001f9d1\u200d\U0001f680\x00-"
TEXTS = st.one_of(
    st.text(MARKS, min_size=1, max_size=120),
    st.lists(st.sampled_from([*SENTENCES, "\n\n", " ", "🙂🙂", "x" * 70]), min_size=1).map("".join),
).filter(str.strip)


def check(text: str, places: np.ndarray, cuts: Cuts, reader: PromptedTokenizer) -> None:
    covered = np.zeros(len(text), bool)
    for start, stop in places.tolist():
        passage = text[start:stop]
        assert passage
        assert passage == passage.strip()
        tokens = reader.count([passage])[0]
        assert tokens <= cuts.tokens or len(passage) == 1 or not passage[1:].strip("\u0301\u200d")
        covered[start:stop] = True
    assert not "".join(c for c, there in zip(text, covered, strict=True) if not there).strip()
    assert (np.diff(places, axis=0) > 0).all()


@settings(max_examples=150)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    name=st.sampled_from(sorted(READERS)),
    tokens=st.integers(8, 40),
    overlap=st.integers(0, 7),
    sentences=st.booleans(),
)
def test_every_character_is_in_a_passage_and_none_is_too_long(
    texts, name, tokens, overlap, sentences
):
    cuts = Cuts(tokens, 0 if sentences else overlap, sentences)
    cut = cut_texts(texts, cuts, READERS[name])
    assert len(cut) == len(texts)
    for text, places in zip(texts, cut, strict=True):
        check(text, places, cuts, READERS[name])


@pytest.mark.parametrize("overlap", [0, 7, 16])
def test_passages_are_windows_of_the_text_s_own_tokens(overlap):
    reader = READERS["bytes"]
    words = [f" {word}" for sentence in SENTENCES for word in sentence.split()]
    places = zip(words, reader.offsets(words), strict=True)
    text = "".join(w for w, some in places if all(w[a:b].strip() for a, b in some)) * 5
    offsets = reader.offsets([text])[0]
    assert len(offsets) > 300
    places = cut_texts([text], Cuts(32, overlap), reader)[0]
    starts = np.searchsorted(offsets[:, 1], places[:, 0], side="right")
    stops = np.searchsorted(offsets[:, 0], places[:, 1])
    assert (stops[:-1] - starts[1:] == overlap).all()
    assert stops[-1] == len(offsets)
    for (start, _), first, last in zip(places[:-1].tolist(), starts, stops, strict=False):
        longer = text[start : offsets[last, 1]]  # by a token
        assert last - first == 32 or reader.count([longer])[0] > 32


def test_passages_end_where_sentences_do():
    text = " ".join(SENTENCES) + "\nDr. No is a title.\nA line that goes\non here. 🙂 Ends."
    places = cut_texts([text], Cuts(40, sentences=True), READERS["bytes"])[0]
    passages = [text[a:b] for a, b in places.tolist()]
    assert len(passages) > 3
    assert all(passage[-1] == "." for passage in passages)
    assert " ".join(passages).split() == text.split()


def test_a_sentence_that_is_too_long_is_cut_by_tokens():
    text = "Short one. " + "Word " * 100 + "end. Short two."
    places = cut_texts([text], Cuts(30, sentences=True), READERS["bytes"])[0]
    check(text, places, Cuts(30, sentences=True), READERS["bytes"])
    passages = [text[a:b] for a, b in places.tolist()]
    assert passages[0] == "Short one."
    assert passages[-1].endswith("Short two.")


def test_leading_blanks_take_no_place_of_a_passage():
    text = "".join(SENTENCES)
    plain = cut_texts([text], Cuts(20), READERS["bytes"])[0]
    blanks = cut_texts(["\n" * 30 + text], Cuts(20), READERS["bytes"])[0]
    assert np.array_equal(blanks, plain + 30)


def test_a_text_that_fits_is_one_passage_without_its_outer_blanks():
    places = cut_texts(["  a word \n", "\u200b", "a"], Cuts(8), READERS["bytes"])
    assert [some.tolist() for some in places] == [[[2, 8]], [[0, 1]], [[0, 1]]]


def test_a_long_text_is_read_in_pieces(monkeypatch):
    text = " ".join(SENTENCES * 40)
    whole = cut_texts([text], Cuts(64, 8), READERS["bytes"])[0]
    monkeypatch.setattr("pipelines.corpus.passages._READ_CHARACTERS", 500)
    assert np.array_equal(cut_texts([text], Cuts(64, 8), READERS["bytes"])[0], whole)


@pytest.mark.parametrize(
    ("passages", "overlap", "says"),
    [
        ("words:20", 0, "tokens:N or sentences:N"),
        ("tokens:many", 0, "tokens:N or sentences:N"),
        ("tokens:4", 0, "8 tokens at least"),
        ("tokens:16", 16, "below the tokens of a passage"),
        ("sentences", 4, "no effect with --passages sentences"),
        ("", 4, "no effect without --passages"),
    ],
)
def test_options_that_mean_nothing_are_refused(passages, overlap, says):
    with pytest.raises(InputError, match=says):
        PassageOptions(passages, overlap).check_passages()


def test_passages_longer_than_the_encoder_reads_are_refused():
    assert PassageOptions("sentences").cuts(256) == Cuts(256, 0, sentences=True)
    with pytest.raises(InputError, match="--max-tokens 300"):
        PassageOptions("tokens:300").cuts(256)
