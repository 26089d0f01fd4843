import pickle
import time
from dataclasses import replace

import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import SENTENCES, tiny_tokenizer

from pipelines.encoder.prompts import PromptTemplate
from pipelines.encoder.tokenization import PromptedTokenizer, plain_backend
from pipelines.runtime.errors import InputError

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return make(folder)


def make(folder, prompt="one-word", **options):
    options = {"max_tokens": MAX_TOKENS, **options}
    return PromptedTokenizer.from_folder(folder, PromptTemplate.parse(prompt), **options)


def body(tokenizer, text):
    ids = tokenizer.tokenize([text])[0]
    return ids[tokenizer.prefix_tokens : len(ids) - tokenizer.suffix_tokens]


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.text("ab ", max_size=800),
    st.lists(st.sampled_from(SENTENCES), max_size=8).map(" ".join),
    st.text("x", max_size=3000),
)


@settings(max_examples=200)
@given(text=TEXTS)
def test_a_body_is_the_whole_texts_tokens_cut(tokenizer, text):
    whole = tokenizer.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    assert body(tokenizer, text) == whole["input_ids"][:MAX_TOKENS]


@settings(max_examples=100)
@given(text=TEXTS, times=st.integers(1, 5000))
def test_clipping_changes_no_token_and_happens_once(tokenizer, text, times):
    text *= times
    clipped = tokenizer.clip(text)
    assert tokenizer.clip(clipped) == clipped
    assert len(clipped) <= tokenizer.clip_characters
    assert tokenizer.tokenize([clipped]) == tokenizer.tokenize([text])


def test_prefix_and_suffix_survive_any_text(tokenizer):
    for ids in tokenizer.tokenize(["", "short", SENTENCES[0] * 1000]):
        assert tuple(ids[: tokenizer.prefix_tokens]) == tokenizer.head
        assert tuple(ids[-tokenizer.suffix_tokens :]) == tokenizer.tail
        assert len(ids) <= tokenizer.prefix_tokens + MAX_TOKENS + tokenizer.suffix_tokens


def test_the_opening_token_comes_once_and_first(tokenizer):
    ids = tokenizer.tokenize(["a"])[0]
    assert ids[0] == tokenizer.tokenizer.bos_token_id and ids.count(ids[0]) == 1


def test_a_tokenizer_without_opening_token_gets_none(tmp_path):
    tiny_tokenizer(opens=False).save_pretrained(tmp_path)
    assert make(tmp_path, "none").head == ()


def test_the_end_token_is_appended_on_demand(folder, tokenizer):
    with_end = make(folder, append_eos=True)
    assert with_end.tail == (*tokenizer.tail, tokenizer.tokenizer.eos_token_id)


def test_a_missing_end_token_is_refused(tmp_path):
    bare = tiny_tokenizer()
    bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="end-of-sequence"):
        make(tmp_path, append_eos=True)


def test_control_tokens_in_a_text_are_plain_characters(tokenizer):
    specials = set(tokenizer.tokenizer.all_special_ids)
    assert not specials & set(body(tokenizer, "</s><s><pad>"))


def test_control_tokens_in_a_prompt_are_control_tokens(folder):
    assert make(folder, "<s>{text}</s>").tail == (2,)


def test_lone_surrogates_count_as_the_replacement_character(tokenizer):
    assert tokenizer.tokenize(["a\ud800b"]) == tokenizer.tokenize(["a\ufffdb"])
    assert tokenizer.tokenize(["\ud83d\ude00"]) == tokenizer.tokenize(["😀"])


@pytest.mark.parametrize("text", ["x" * 10_000_000, " " * 10_000_000, "日本" * 3_000_000])
def test_a_huge_text_costs_no_more_than_its_beginning(tokenizer, text):
    started = time.process_time()
    assert len(body(tokenizer, text)) == MAX_TOKENS
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("run", [" ", "\n", "\u200b", "x"])
def test_what_makes_no_token_does_not_hide_what_follows(tmp_path, run):
    spread_tokenizer("wordpiece").save_pretrained(tmp_path)
    wordpiece = make(tmp_path, "none")
    seen = body(wordpiece, f"{'x' * 200 if run == 'x' else ''} The league")
    assert len(seen) > 1
    assert body(wordpiece, run * 50_000 + " The league") == seen


def test_it_travels_between_processes(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.tokenize(SENTENCES) == tokenizer.tokenize(SENTENCES)


def spread_tokenizer(kind):
    """A tokenizer of a kind, trained on a few sentences, that opens and closes texts."""
    special = ["<pad>", "<s>", "</s>", "[UNK]"]
    options = {"special_tokens": special, "show_progress": False, "vocab_size": 400}
    parts = tokenizers.pre_tokenizers
    match kind:
        case "byte-level":
            backend = tokenizers.Tokenizer(tokenizers.models.BPE())
            backend.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)
            trainer = tokenizers.trainers.BpeTrainer(
                **options, initial_alphabet=parts.ByteLevel.alphabet()
            )
        case "bytes-alone":
            vocab = {token: i for i, token in enumerate([*special, *parts.ByteLevel.alphabet()])}
            backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
            backend.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)
            trainer = None
        case "sentencepiece-always" | "sentencepiece-first" | "sentencepiece-never":
            backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
            backend.pre_tokenizer = parts.Metaspace(prepend_scheme=kind.rpartition("-")[2])
            trainer = tokenizers.trainers.BpeTrainer(**options)
        case "sentencepiece-across-words":
            backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
            backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
            trainer = tokenizers.trainers.BpeTrainer(**options)
        case "byte-level-spaced" | "byte-level-by-pattern":
            backend = tokenizers.Tokenizer(tokenizers.models.BPE())
            pattern = tokenizers.Regex(
                r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s+(?!\S)|\s+"
            )
            backend.pre_tokenizer = (
                parts.ByteLevel(add_prefix_space=True)
                if kind == "byte-level-spaced"
                else parts.Sequence(
                    [
                        parts.Split(pattern, "isolated"),
                        parts.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                )
            )
            trainer = tokenizers.trainers.BpeTrainer(
                **options, initial_alphabet=parts.ByteLevel.alphabet()
            )
        case "sentencepiece-of-llama-2":
            backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
            backend.normalizer = tokenizers.normalizers.Sequence(
                [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
            )
            trainer = tokenizers.trainers.BpeTrainer(**options)
        case "unigram-of-few-spaces":
            backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
            normalizers = tokenizers.normalizers
            backend.normalizer = normalizers.Sequence(
                [
                    normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(),
                    normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
                ]
            )  # fmt: skip
            backend.pre_tokenizer = parts.Metaspace()
            trainer = tokenizers.trainers.UnigramTrainer(**options, unk_token="[UNK]")
        case "wordpiece":
            backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
            backend.normalizer = tokenizers.normalizers.BertNormalizer()
            backend.pre_tokenizer = parts.BertPreTokenizer()
            trainer = tokenizers.trainers.WordPieceTrainer(**options)
        case "unigram":
            backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
            backend.pre_tokenizer = parts.Metaspace()
            trainer = tokenizers.trainers.UnigramTrainer(**options, unk_token="[UNK]")
    if trainer is not None:
        backend.train_from_iterator(SENTENCES * 4, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )


KINDS = (
    "byte-level", "bytes-alone", "sentencepiece-always", "sentencepiece-first",
    "sentencepiece-never", "sentencepiece-across-words", "wordpiece", "unigram",
    "byte-level-spaced", "byte-level-by-pattern", "sentencepiece-of-llama-2",
    "unigram-of-few-spaces",
)  # fmt: skip
PREFIXES = ("query: ", "Cluster the text:  ", "Instruct: find\nQuery:", "(", "")


@pytest.fixture(scope="module", params=KINDS)
def prompted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    spread_tokenizer(request.param).save_pretrained(folder)
    return {
        (prefix, suffix): make(folder, f"{prefix}{{text}}{suffix}", max_tokens=5000)
        for prefix in PREFIXES
        for suffix in ("", " means in one word:")
    }


@settings(max_examples=60)
@given(text=TEXTS.filter(bool), prefix=st.sampled_from(PREFIXES))
def test_prompt_and_text_are_the_tokens_of_the_whole_string(prompted, text, prefix):
    made = prompted[prefix, ""]
    whole = made.tokenizer(prefix + text, split_special_tokens=True, add_special_tokens=False)
    assert made.tokenize([text]) == [[1, *whole["input_ids"], 2]]


@pytest.fixture(scope="module", params=KINDS)
def kind_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    spread_tokenizer(request.param).save_pretrained(folder)
    return folder


PROMPTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), max_size=12),
    st.lists(st.sampled_from(["query:", "Find", " ", "  ", "\n", "(", "日", "é", "▁"])).map(
        "".join
    ),
)


@settings(max_examples=25)
@given(text=TEXTS.filter(bool), prefix=PROMPTS)
def test_any_prompt_and_text_are_the_tokens_of_the_whole_string(kind_folder, text, prefix):
    made = make(kind_folder, f"{prefix}{{text}}", max_tokens=5000)
    whole = made.tokenizer(prefix + text, split_special_tokens=True, add_special_tokens=False)
    assert made.tokenize([text]) == [[1, *whole["input_ids"], 2]]


LONG_WORDS = st.lists(
    st.one_of(
        st.sampled_from(SENTENCES),
        st.text("xy", min_size=60, max_size=400),
        st.text(" \n\u200b", max_size=60),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ),
    min_size=1,
    max_size=12,
).map(" ".join)


@settings(max_examples=60)
@given(
    text=LONG_WORDS.filter(str.strip), prefix=st.sampled_from(PREFIXES), limit=st.integers(1, 60)
)
@example(text="x" * 300, prefix="", limit=12)
@example(text=f"{'x ' * 8}{'y' * 300} The league", prefix="query: ", limit=11)
def test_a_cut_text_has_the_first_tokens_of_the_whole(prompted, text, prefix, limit):
    made = prompted[prefix, ""]
    (whole,), (cut,) = made.tokenize([text]), made.limited(limit).tokenize([text])
    assert cut == [*whole[:-1][: made.prefix_tokens + limit], *made.tail]


@settings(max_examples=30)
@given(text=TEXTS, times=st.integers(1, 2000), prefix=st.sampled_from(PREFIXES))
def test_a_suffix_stays_whole_behind_texts_of_any_length(prompted, text, times, prefix):
    made = prompted[prefix, " means in one word:"].limited(MAX_TOKENS)
    ids = made.tokenize([text * times])[0]
    assert tuple(ids[-made.suffix_tokens :]) == made.tail
    assert len(ids) <= made.most_tokens


def test_a_space_that_was_lost_before_has_a_number_of_its_own(tmp_path):
    for kind, version in (("byte-level", 1), ("sentencepiece-first", 1), ("bytes-alone", 2)):
        spread_tokenizer(kind).save_pretrained(tmp_path / kind)
        assert make(tmp_path / kind, "query: {text}").version == version
        assert make(tmp_path / kind, "one-word").version == 1


def test_what_a_tokenizers_file_cuts_and_pads_is_read_whole(tmp_path):
    own = tiny_tokenizer()
    own.backend_tokenizer.enable_truncation(5)
    own.backend_tokenizer.enable_padding(length=40)
    own.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = make(tmp_path, "{text}")
    whole = made.tokenizer(SENTENCES, split_special_tokens=True, add_special_tokens=False)
    made.tokenizer.backend_tokenizer.enable_truncation(5)
    made.tokenizer.backend_tokenizer.enable_padding(length=40)
    made.tokenizer.backend_tokenizer.encode_special_tokens = False
    texts = [*SENTENCES, "</s>"]
    assert made.tokenize(texts)[:-1] == [[1, *ids[:MAX_TOKENS]] for ids in whole["input_ids"]]
    assert len(made.tokenize(texts)[-1]) > 2


class Shouting(transformers.PreTrainedTokenizerFast):
    """A class that does more to a text than its file says, as some models' own code does."""

    def _encode_plus(self, text, **settings):
        return super()._encode_plus([one.upper() for one in text], **settings)


def test_a_class_that_reads_texts_in_its_own_way_is_asked(tokenizer):
    stock = tokenizer.tokenizer
    shouting = Shouting(tokenizer_object=stock.backend_tokenizer, eos_token="</s>")
    assert plain_backend(shouting) is None
    assert plain_backend(stock) is stock.backend_tokenizer
    loud = replace(tokenizer, tokenizer=shouting)
    assert loud.tokenize(["the sea"]) == tokenizer.tokenize(["THE SEA"])
