"""Keywords in any script, stop words learned from the corpus, examples near and far."""

import numpy as np
import pytest

from cluster.describe import find_keywords, pick_diverse, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't panic, it's 42!", ["don't", "panic", "it's"]),
        ("Über-Größe naïve", ["über", "größe", "naïve"]),
        ("हिन्दी में पाठ", ["हिन्दी", "में", "पाठ"]),
        ("東京都に", ["東京", "京都", "都に"]),
        ("私はAI技術コンピュータが", ["私は", "ai", "技術", "コンピュータ"]),
        ("\uff21\uff22\uff23 mp3 cafe\u0301 " + "x" * 50, ["abc", "mp3", "café"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("สวัสดี", ["สวั", "วัส", "สดี"]),
        ("12 34 _ -- a", []),
    ],
)
def test_words_are_found_in_any_script(text, words):
    assert list(split_words(text)) == words


def corpus():
    random = np.random.default_rng(0)
    topics = [["volcano", "lava", "crater"], ["orchard", "apple", "cider"], ["goal", "match"]]
    filler = ["the", "and", "of", "was", "with"]
    ids = np.arange(300) % 3
    texts = [
        " ".join(random.choice(topics[i], 4).tolist() + random.choice(filler, 12).tolist())
        for i in ids
    ]
    return texts, ids, topics


def test_keywords_are_what_sets_a_cluster_apart():
    texts, ids, topics = corpus()
    for words, topic in zip(find_keywords(texts, ids, 3, count=3), topics, strict=True):
        assert set(words) == set(topic)


def test_words_spread_over_all_clusters_are_learned_as_stop_words():
    texts, ids, _ = corpus()
    found = {word for words in find_keywords(texts, ids, 3, count=9) for word in words}
    assert not {"the", "and", "of"} & found


def test_one_cluster_keeps_its_frequent_words():
    texts, _, _ = corpus()
    assert find_keywords(texts, np.zeros(300, int), 1, count=5)[0]


def test_texts_without_words_give_no_keywords():
    assert find_keywords(["1 2", "", "34"], np.array([0, 1, 1]), 2) == [[], []]


def test_a_cluster_without_texts_has_no_keywords():
    assert find_keywords(["red apple", "red apple"], np.array([0, 0]), 2)[1] == []


def test_diverse_examples_start_at_the_centre_and_leave_strays_out():
    vectors = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [90, 90]], dtype=np.float32)
    picked = pick_diverse(vectors, np.linalg.norm(vectors, axis=1), 3)
    assert picked[0] == 0
    assert 5 not in picked
    assert len(set(picked)) == 3


def test_diverse_examples_of_nobody_are_none():
    assert pick_diverse(np.zeros((0, 2), np.float32), np.zeros(0), 3) == []
