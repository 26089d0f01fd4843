from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_models import SENTENCES, scripted_model, tiny_model, tiny_tokenizer

from pipelines.runtime.errors import InputError
from pipelines.training.config import PairsConfig
from pipelines.training.pairs import SourceText, rewritten_pairs
from pipelines.training.rewriting import Rewriter

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def settings(model, back_model=None, method="paraphrase", batch_texts=2, seed=0):
    return PairsConfig(
        method=method, model=str(model), back_model=back_model, most_tokens=8,
        batch_texts=batch_texts, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("chat"), num_hidden_layers=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translator")
    config = transformers.T5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer(opens=False).save_pretrained(folder)
    return folder


def test_paraphrases_are_as_many_as_texts_and_repeatable(chat_model):
    rewriter = Rewriter(settings(chat_model))
    first = rewriter.rewrite(SENTENCES[:5], "shard")
    assert len(first) == 5
    assert first == rewriter.rewrite(SENTENCES[:5], "shard")
    assert first != rewriter.rewrite(SENTENCES[:5], "another shard")


def test_translations_go_through_both_models(translator):
    rewriter = Rewriter(settings(translator, str(translator), "backtranslate"))
    assert len(rewriter.rewrite(SENTENCES[:3], "shard")) == 3


def test_model_without_chat_template_cannot_paraphrase(tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        Rewriter(settings(tiny_model(tmp_path, num_hidden_layers=1)))


def test_decoder_only_model_cannot_translate(chat_model):
    with pytest.raises(InputError, match="is not a seq2seq translation model"):
        Rewriter(settings(chat_model, str(chat_model), "backtranslate"))


def test_reasoning_is_no_paraphrase(tmp_path):
    said = ["The keeper", " had a", " good day", " on the pitch."]
    scripts = {"[deep]": ["<think>", "Other words,", " then.", "</think>", *said]}
    template = CHAT + "[deep]"
    folder = scripted_model(tmp_path, scripts, template)
    texts = ["The keeper saved two penalties and the home side won."]
    for most, answer in ((20, "The keeper had a good day on the pitch."), (3, None)):
        rewriter = Rewriter(replace(settings(folder, batch_texts=1), most_tokens=most))
        assert rewriter.rewrite(texts, "shard") == [answer]


def test_reasoning_alone_is_counted_by_its_own_name():
    class Thinker:
        def rewrite(self, texts, salt):
            return [None, "Two penalties were saved by the goalkeeper, and they won."]

    left_out = Counter()
    config = PairsConfig(method="paraphrase")
    texts = (SENTENCES[3], SENTENCES[3] + " It was late.")
    documents = [SourceText(str(place), text) for place, text in enumerate(texts, start=1)]
    rows = list(rewritten_pairs(config, documents, left_out, Thinker(), ""))
    assert [row.id for row in rows] == ["2"]
    assert left_out == {"reasoning without an answer": 1}
