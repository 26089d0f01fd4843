import csv
import itertools
import shutil
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from deltalake import write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from pipelines.encoder.answers import clean_answer
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run
from pipelines.training.batches import (
    BatchPlan,
    add_label_pairs,
    draw_of_one_label,
    has_few_labels,
    read_batch,
    read_heldout,
    share_keys,
    sketch,
    split_heldout,
    write_batches,
)
from pipelines.training.config import FinetuneConfig, PairsConfig
from pipelines.training.pair_files import read_pairs
from pipelines.training.pairs import (
    crop_pair,
    document_generator,
    generate_pairs,
    make_shard_pairs,
    noise_pair,
    suited_pair,
)
from pipelines.training.rewriting import fault_of

TEXT = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def local_ray():
    if not ray.is_initialized():
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "docs.parquet"
    texts = [f"{TEXT} {number}" for number in range(30)] + ["short", "", None]
    table = {"id": range(33), "text": pa.array(texts), "topic": ["a", "b", "c"] * 11}
    pq.write_table(pa.table(table), path)
    return str(path)


def run(config):
    with RunRecord.of("generate_pairs", config, keep_complete=True) as record:
        return generate_pairs(config, record)


def read_made(folder):
    return pq.read_table(Path(folder) / "pairs").sort_by("id").to_pylist()


@given(st.text(max_size=200), st.integers(0, 5), st.integers(1, 5), st.integers(0, 5))
def test_crops_are_two_different_pieces_of_the_text(text, seed, fewest, more):
    found = crop_pair(text, document_generator(seed, text), (fewest, fewest + more))
    if found is None:
        return
    assert found[0] != found[1]
    for piece in found:
        assert piece in text
        assert piece.strip() == piece != ""


def test_crops_have_the_asked_number_of_words():
    generator = np.random.default_rng(0)
    for _ in range(100):
        for piece in crop_pair(TEXT, generator, (3, 5)):
            assert 3 <= len(piece.split()) <= 5


def test_crops_of_text_without_spaces_are_cut_between_characters():
    found = crop_pair("今日は天気がいいから散歩しよう", np.random.default_rng(1), (4, 6))
    assert all(4 <= len(piece) <= 6 for piece in found)


def test_text_with_too_few_words_gives_no_crops():
    assert crop_pair("only three words", np.random.default_rng(0), (3, 5)) is None


@given(st.text(min_size=1, max_size=100), st.floats(0.01, 0.3))
def test_noise_changes_the_text_and_leaves_some(text, rate):
    found = noise_pair(text, np.random.default_rng(0), rate)
    assert found is None or (found[0] == text and found[1] and found[1].split() != text.split())


def test_noise_of_a_rate_touches_about_that_share_of_words():
    text = " ".join(f"word{number}" for number in range(3000))
    kept = noise_pair(text, np.random.default_rng(0), 0.1)[1].split()
    assert abs(1 - len(kept) / 3000 - 0.1) < 0.02
    assert 0.15 < 1 - len(set(kept) & set(text.split())) / 3000 < 0.25


def test_a_documents_pair_depends_on_seed_and_document_alone():
    first, same, other = (
        crop_pair(TEXT, document_generator(seed, "id"), (3, 5)) for seed in (1, 1, 2)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("A dozen numbers, counted up from one.", None),
        ("", "empty answer"),
        ('" "', "empty answer"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("As an AI language model, I have no opinion.", "refusal"),
        (TEXT, "copy"),
        (TEXT.title() + ".", "copy"),
        ("один два три четыре", "another script"),
        ("x", "too short"),
    ],
)
def test_bad_answers_are_told_by_their_fault(answer, fault):
    assert fault_of(TEXT, answer) == fault


def test_an_answer_in_another_language_is_told_apart():
    text = "The keeper saved two penalties and the home side won the league on Friday."
    answer = "El portero paró dos penaltis y el equipo local ganó la liga con todo el estadio."
    assert fault_of(text, answer) == "another language"


@pytest.mark.parametrize(
    ("answer", "clean"),
    [
        ('Here is the rewritten text: "All is well."', "All is well."),
        ("Sure! Here's a version:\nAll is well.", "All is well."),
        ("All is well: nothing happened.", "All is well: nothing happened."),
    ],
)
def test_announcements_and_quotes_are_taken_off_answers(answer, clean):
    assert clean_answer(answer) == clean


class Echo:
    """Rewrites by turning the words around; refuses the first text."""

    def rewrite(self, texts, salt):
        answers = [" ".join(reversed(text.split())) for text in texts]
        return ["I cannot do that.", *answers[1:]]


def test_rewritten_pairs_are_checked_and_counted(corpus, tmp_path):

    from pipelines.training.pairs import find_corpus

    config = PairsConfig(corpus=corpus, method="paraphrase", label_column="topic")
    (shard,) = find_corpus(config)[0].shards()
    receipt = make_shard_pairs(config, str(tmp_path), "part", shard.to_unit(), Echo())
    assert receipt["left_out"]["refusal"] == 1
    rows = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert len(rows) == receipt["pairs"]
    assert rows[0].keys() == {"anchor", "positive", "id", "label", "method", "sketch"}


def test_job_writes_pairs_with_their_documents_and_counts_the_rest(corpus, tmp_path, local_ray):
    config = PairsConfig(
        corpus=corpus, output=str(tmp_path / "out"), crop_words=(3, 5), label_column="topic",
        method="crop",
    )  # fmt: skip
    result = run(config)
    assert result.counts == {"documents": 33, "pairs": 30}
    assert read_run(config.output)["metrics"]["left_out"] == {
        "too short": 1, "text is empty": 1, "text is null": 1,
    }  # fmt: skip
    rows = read_made(config.output)
    assert all(row["anchor"] in f"{TEXT} {row['id']}" for row in rows)
    assert {row["method"] for row in rows} == {"crop"}
    assert not (tmp_path / "out" / "_work").exists()


def test_each_text_gives_the_pair_that_its_length_allows(tmp_path, local_ray):
    words = TEXT.split()
    lengths = {"long": 40, "middle": 31, "line": 7, "four": 4, "three": 3, "single": 1}
    texts = {name: " ".join((words * 4)[:count]) for name, count in lengths.items()}
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"id": list(texts), "text": list(texts.values())}), path)
    config = PairsConfig(corpus=str(path), output=str(tmp_path / "out"), pairs_per_document=2)
    result = run(config)
    assert result.metrics["made_by"] == {"halves": 6, "noise": 4, "crop": 2}
    assert result.summary["made by halves"] == "6"
    for row in read_made(config.output):
        text, sides = texts[row["id"]], [row["anchor"], row["positive"]]
        if row["method"] == "halves":
            assert " ".join(sides) == text
            assert min(len(side.split()) for side in sides) >= lengths[row["id"]] // 3
        assert sides[0] != sides[1]


def test_without_halves_a_short_text_stays_whole_beside_its_noisy_copy():
    config = PairsConfig(halves=False)
    short, long = " ".join(TEXT.split()[:9]), " ".join(TEXT.split() * 4)
    pair, made_by = suited_pair(short, document_generator(0, short), config)
    assert made_by == "noise" and pair[0] == short != pair[1]
    assert suited_pair(long, document_generator(0, long), config)[1] == "crop"
    assert not FinetuneConfig(corpus="texts", teacher="any").pairs_config.halves
    assert FinetuneConfig(corpus="texts").pairs_config.halves


@given(
    st.lists(st.text("abcdé中文😀", min_size=1, max_size=9), min_size=4, max_size=40),
    st.integers(0, 9),
)
def test_no_text_of_four_words_is_without_a_pair(words, seed):
    text = " ".join(words)
    pair, _ = suited_pair(text, document_generator(seed, text), PairsConfig())
    assert pair is not None and pair[0] != pair[1] and all(side.strip() for side in pair)


def test_few_labels_are_all_kept_and_make_pairs(tmp_path):
    labels = ["a"] * 4 + ["b"] * 3 + [None] * 193
    texts = [f"{TEXT} {'x' * i} number {i}" for i in range(200)]
    table = pa.table({"anchor": texts, "positive": [t[::-1] for t in texts], "topic": labels})
    pq.write_table(table, tmp_path / "own.parquet")
    pairs = read_pairs(str(tmp_path), 40, 0, "topic")
    assert len(pairs) == 47 and pairs["label"].null_count == 40
    made, added = add_label_pairs(pairs, seed=0)
    assert added == 6 + 3 and len(made) == 56
    by_anchor = dict(zip(texts, labels, strict=True))
    for row in made.to_pylist()[47:]:
        assert by_anchor[row["anchor"]] == by_anchor[row["positive"]] == row["label"]
        assert row["anchor"] != row["positive"]
    assert made["id"][:47].equals(pairs["id"])
    assert not has_few_labels(pairs.filter(pairs["label"].is_valid()))


def masked(pairs):
    """Which pairs are no negatives of each other."""
    keys = share_keys(pairs)
    return (keys[:, None, :, None] == keys[None, :, None, :]).any(axis=(2, 3))


def random_words(generator, count):
    return ["".join(generator.choice([*"abcdefghijklmnop"], 6)) for _ in range(count)]


def pairs_of(rows, texts):
    table = pa.Table.from_pylist(rows)
    return table.append_column("sketch", pa.array(sketch(texts).tolist(), pa.list_(pa.int64())))


def test_pairs_of_one_label_or_document_and_near_copies_are_no_negatives(tmp_path):
    generator = np.random.default_rng(1)
    documents = [random_words(generator, 30) for _ in range(24)]
    documents[2] = [*documents[1][:5], "other", *documents[1][6:]]
    rows = [
        {"anchor": " ".join(words[:15]), "positive": " ".join(words[15:]), "id": f"d{n}",
         "label": "x" if n < 2 else None}
        for n, words in enumerate(documents)
    ]  # fmt: skip
    rows[3]["id"] = "d0"  # of the first's document, without its label
    pairs = pairs_of(rows, [" ".join(words) for words in documents])
    made, count = add_label_pairs(pairs, seed=0)
    assert count == 1 and {made["anchor"][24], made["positive"][24]} == {*pairs["anchor"][:2]}
    links = {frozenset({int(a), int(b)}) for a, b in np.argwhere(masked(made)) if a != b}
    own = {frozenset(link) for link in ((0, 1), (1, 2), (0, 3))}
    assert links == own | {frozenset({24, n}) for n in range(4)}
    write_batches(pairs, BatchPlan(1, 2, 20, seed=1), str(tmp_path))
    heldout = read_heldout(str(tmp_path))
    places = [heldout["id"].to_pylist().index(name) for name in ("d0", "d1")]
    assert masked(heldout)[tuple(places)]


def test_copies_under_other_ids_are_all_held_out_or_all_trained_on():
    generator = np.random.default_rng(2)
    documents = [random_words(generator, 40) for _ in range(60)]
    near = [[*words[:7], "other", *words[8:]] for words in documents]
    for copies in ([documents] * 3, [documents, documents, near]):
        rows, texts = [], []
        for copy, words in ((c, w) for c, some in enumerate(copies) for w in enumerate(some)):
            start = copy * 3  # other crops of the same text
            rows.append({"anchor": " ".join(words[1][start : start + 9]),
                         "positive": " ".join(words[1][20 + start :]),
                         "id": f"{copy} {words[0]}"})  # fmt: skip
            texts.append(" ".join(words[1]))
        heldout, training = split_heldout(pairs_of(rows, texts), BatchPlan(1, 8, 10, seed=0))
        held, trained = (
            {name.split()[1] for name in part["id"].to_pylist()} for part in (heldout, training)
        )
        assert not held & trained and len(held) == 4
        assert len(heldout) == 12 and len(training) == 168


def test_positives_that_are_names_of_classes_are_held_out_by_id(caplog):
    rows = [{"anchor": f"text {n}", "positive": f"class {n % 3}", "id": str(n)} for n in range(60)]
    heldout, training = split_heldout(pa.Table.from_pylist(rows), BatchPlan(1, 8, 6, seed=0))
    assert len(heldout) == 6 and len(training) == 54
    assert "3 groups of pairs have texts in common" in caplog.text


@pytest.mark.parametrize("blank", ["", " "])
def test_pairs_with_a_blank_id_are_of_no_common_document(tmp_path, blank):
    rows = [["anchor", "positive", "id"], *([f"a{n}", f"p{n}", blank] for n in range(20))]
    with (tmp_path / "own.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*rows, ["b1", "c1", "k"], ["b2", "c2", "k"]])
    found = read_pairs(str(tmp_path / "own.csv"), 100, 0)
    ids = dict(zip(found["anchor"].to_pylist(), found["id"].to_pylist(), strict=True))
    assert ids == {f"a{n}": f"a{n}" for n in range(20)} | {"b1": "k", "b2": "k"}


@pytest.mark.parametrize("most", [4, 9, 100])
def test_pairs_of_one_label_are_drawn_from_all_that_there_are(most):
    labels = ["a", None, "b", "a", "b", "a", "c", "a", "b"]
    every = {
        (i, j)
        for i, j in itertools.combinations(range(9), 2)
        if labels[i] and labels[i] == labels[j]
    }
    assert len(every) == 9
    seen = set()
    for seed in range(30):
        left, right = draw_of_one_label(labels, most, seed)
        drawn = list(zip(left.tolist(), right.tolist(), strict=True))
        assert len(drawn) == len(set(drawn)) == min(most, 9) and set(drawn) <= every
        seen |= set(drawn)
    assert seen == every
    assert [len(side) for side in draw_of_one_label(["a", None, "b"], most, 0)] == [0, 0]


def test_many_texts_of_one_label_cost_no_list_of_all_their_pairs():
    labels = ["a"] * 60_000 + ["b"] * 60_000 + [None] * 120_000  # 3.6 billion pairs
    left, right = draw_of_one_label(labels, 120_000, seed=0)
    assert len({*zip(left.tolist(), right.tolist(), strict=True)}) == 120_000
    assert (left != right).all() and ((left < 60_000) == (right < 60_000)).all()
    assert 0.45 < (left < 60_000).mean() < 0.55 and max(left.max(), right.max()) < 120_000


def test_near_duplicates_share_a_key_and_other_texts_do_not():
    report = "Acme said net profit rose to {} mln dlrs in the {} quarter from {} mln a year ago"
    same = [report.format(12.4, "first", 9), report.format(8, "first", 7.75)]
    other = ["The keeper saved two penalties and the home side won the league on Friday.", TEXT, ""]
    first, second, *rest = (set(keys) for keys in sketch([*same, *other]).tolist())
    assert first == second
    assert all(not one & two for one, two in itertools.combinations([first, *rest], 2))
    words = np.random.default_rng(0).choice([f"w{i}x" for i in "abcdefgh" * 40], 300)
    changed = [*words[:140], "another", *words[141:]]
    long, near = (set(keys) for keys in sketch([" ".join(words), " ".join(changed)]).tolist())
    assert long & near


@pytest.mark.parametrize(
    ("common", "fewest", "most"), [(9, 0.0, 0.01), (34, 0.25, 0.5), (46, 0.8, 1.0)]
)
def test_a_key_is_shared_as_often_as_texts_are_alike(common, fewest, most):
    """Of 50 runs of two words each, about 8, 33 and 45 are in both, a tenth to four fifths."""
    generator = np.random.default_rng(0)
    shared = 0
    for _ in range(300):
        words = ["".join(letters) for letters in generator.choice([*"abcdefghij"], (110, 6))]
        texts = " ".join(words[:51]), " ".join([*words[:common], *words[51 : 102 - common]])
        one, other = sketch(texts).tolist()
        shared += bool({*one} & {*other})
    assert fewest <= shared / 300 <= most


@pytest.mark.parametrize("method", ["noise", "dropout"])
def test_other_plain_methods_start_from_the_text(corpus, tmp_path, local_ray, method):
    config = PairsConfig(corpus=corpus, output=str(tmp_path / "out"), method=method)
    run(config)
    for row in read_made(config.output):
        assert row["anchor"].startswith(("one two", "short"))
        assert (row["anchor"] == row["positive"]) == (method == "dropout")


def test_killed_job_goes_on_and_gives_the_same_pairs(corpus, tmp_path, local_ray):
    config = PairsConfig(corpus=corpus, output=str(tmp_path / "out"), crop_words=(3, 5))
    run(config)
    before = read_made(config.output)
    shutil.rmtree(tmp_path / "out" / "pairs")
    record = tmp_path / "out" / "run.json"
    record.write_text(record.read_text().replace('"complete"', '"running"'))
    run(config)
    assert read_made(config.output) == before


def test_a_killed_job_keeps_no_pair_of_files_that_changed_since(
    corpus, tmp_path, local_ray, monkeypatch
):
    config = PairsConfig(corpus=corpus, output=str(tmp_path / "out"), crop_words=(3, 5))

    def stop(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "complete", stop)
        with pytest.raises(RuntimeError):
            run(config)
    assert len(read_made(config.output)) == 31
    changed = pq.read_table(corpus).slice(0, 20)
    changed = changed.set_column(0, "id", pa.array([f"new {n}" for n in range(20)]))
    pq.write_table(changed, corpus)
    assert run(config).counts["pairs"] == 20
    assert {row["id"] for row in read_made(config.output)} == {f"new {n}" for n in range(20)}


def test_corpus_that_gives_no_pair_is_refused_with_the_reasons(tmp_path, local_ray):
    path = tmp_path / "few.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["too"], ["short"]])
    config = PairsConfig(corpus=str(path), output=str(tmp_path / "out"), method="crop")
    message = r"2 documents gave no pair by method crop: too short \(2\)"
    with pytest.raises(InputError, match=message):
        run(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_words": (5, 3)}, "crop_words"),
        ({"noise_rate": 0.5}, "noise_rate is 0.5"),
        ({"method": "backtranslate"}, "needs --model and --back-model"),
        ({"method": "crop", "back_model": "x"}, "no other method takes --back-model"),
        ({"pairs_per_document": 0}, "pairs_per_document is 0"),
    ],
)
def test_impossible_options_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        PairsConfig(**settings)


def test_own_pairs_are_read_from_csv_with_hard_negatives(tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        rows = [["anchor", "positive", "negative"], ["1", "one", "two"], ["a", "b", "c"]]
        csv.writer(file).writerows([*rows, ["x", "", "y"], ["x", "y", ""]])
    found = read_pairs(str(path), most=10, seed=0).to_pylist()
    assert sorted(row["anchor"] for row in found) == ["1", "a", "x"]
    assert sorted(row["negative"] for row in found) == [[], ["c"], ["two"]]
    assert all(row["id"] == row["anchor"] for row in found)


@pytest.mark.parametrize("name", ["own.jsonl", "own.ndjson", "own.jsonl.gz", "own.jsonl.zst"])
def test_own_pairs_are_read_from_json_lines_whose_keys_differ(tmp_path, name):
    lines = [
        r'{"anchor": "a1", "positive": "p1\nline", "id": 1, "negative": "n1"}',
        r'{"positive": "p2", "anchor": "2026-01-02", "negative": ["n2", " ", "n3"], "topic": true}',
        "",
        r'{"anchor": "half \ud83d of one", "positive": "p3", "id": 123456789012345678901234567890}',
        r'{"anchor": "", "positive": "lost", "id": "x"}',
        r'{"anchor": "a5", "positive": 5, "id": null, "negative": null, "sketch": [1, 2]}',
    ]
    codec = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
    with pa.output_stream(tmp_path / name, compression=codec) as file:
        file.write("\r\n".join(lines).encode())
    (tmp_path / "run.json").write_text('{"status": "complete"}')
    rows = {row["anchor"]: row for row in read_pairs(str(tmp_path), 9, 0, "topic").to_pylist()}
    assert [len(row.pop("sketch")) for row in rows.values()] == [8] * 4
    long = "123456789012345678901234567890"
    assert rows == {
        "a1": row_of("a1", "p1\nline", "1", ["n1"], None),
        "2026-01-02": row_of("2026-01-02", "p2", "2026-01-02", ["n2", "n3"], "true"),
        "half \ufffd of one": row_of("half \ufffd of one", "p3", long, [], None),
        "a5": row_of("a5", "5", "a5", [], None),
    }


def row_of(anchor, positive, id, negative, label):
    return {
        "anchor": anchor, "positive": positive, "id": id, "negative": negative, "label": label
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"anchor": "a", "positive": "b"}', '["a", "b"]'], "line 2 is no JSON object"),
        (['{"anchor": "a", "positive": '], "line 1 is no JSON object"),
        (
            ['{"anchor": "a"}', '{"text": "b"}'],
            "no column .positive.; its columns are anchor",
        ),
        (['{"anchor": "a", "positive": ["b", "c"]}'], "column 'positive' holds a list; a string"),
        (['{"anchor": "a", "positive": "b", "negative": [["c"]]}'], "'negative' holds a list"),
    ],
)
def test_json_lines_that_are_no_pairs_are_refused_by_name(tmp_path, lines, message):
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message) as told:
        read_pairs(str(tmp_path / "own.jsonl"), 9, 0)
    assert "own.jsonl" in str(told.value)


def test_line_breaks_in_a_csv_are_part_of_the_text(tmp_path):
    path = tmp_path / "own.csv"
    paragraph = "Some thirty words that fill a line and then another.\n\n" * 6
    rows = [(f"Question {i}\n\n{paragraph}", f"Answer {i}\n{paragraph}") for i in range(4000)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("anchor", "positive"), *rows])
    found = read_pairs(str(path), most=5000, seed=0)
    assert set(zip(*(found[n].to_pylist() for n in ("anchor", "positive")), strict=True)) == {*rows}


@pytest.mark.parametrize("before", ["", "x"])
def test_no_newline_of_windows_is_lost_where_a_csv_is_read_in_parts(tmp_path, before):
    """One of the two has a line end across the bytes where pyarrow parts its blocks."""
    path = tmp_path / "own.csv"
    rows = [(f"{n}{before}" + "\r\n" * 300_000 + "end", f"other {n}") for n in range(4)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("anchor", "positive"), *rows])
    found = read_pairs(str(path), most=9, seed=0)["anchor"].to_pylist()
    assert set(found) == {anchor for anchor, _ in rows}


NEGATIVES = {
    "some": pa.array(["x", None, " "]),
    "no": pa.array([None] * 3, pa.string()),
    "null type": pa.nulls(3),
    "lists": pa.array([["x"], None, []]),
    "fixed lists": pa.array([["x"], ["y"], [None]], pa.list_(pa.string(), 1)),
}


@pytest.mark.parametrize("kind", NEGATIVES)
def test_a_pair_without_a_negative_is_kept(tmp_path, kind):
    table = pa.table({"anchor": list("abc"), "positive": list("def"), "negative": NEGATIVES[kind]})
    pq.write_table(table, tmp_path / "own.parquet")
    found = {row["anchor"]: row["negative"] for row in read_pairs(str(tmp_path), 9, 0).to_pylist()}
    assert found["c"] == [] and len(found) == 3
    assert found["a"] == ([] if kind in ("no", "null type") else ["x"])


def test_files_of_other_types_and_columns_are_one_table(tmp_path):
    tables = [
        {"anchor": ["a"], "positive": ["b"], "id": [7]},
        {"anchor": ["c"], "positive": pa.array(["d"], pa.string_view()), "id": ["x7"]},
        {"anchor": pa.array(["e"]).dictionary_encode(), "positive": ["f"], "id": pa.nulls(1)},
        {"anchor": ["g"], "positive": ["h"], "topic": ["t"], "negative": [["i", "j"]]},
    ]
    for place, table in enumerate(tables):
        pq.write_table(pa.table(table), tmp_path / f"{place}.parquet")
    table = read_pairs(str(tmp_path), 9, 0, "topic")
    assert all(len(keys) == 8 for keys in table["sketch"].to_pylist())
    rows = table.drop_columns(["sketch"]).to_pylist()
    assert sorted([str(value) for value in row.values()] for row in rows) == [
        ["a", "b", "7", "[]", "None"],
        ["c", "d", "x7", "[]", "None"],
        ["e", "f", "e", "[]", "None"],
        ["g", "h", "g", "['i', 'j']", "t"],
    ]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [("positive", [["b"]], "column 'positive' holds list"), ("negative", [[3]], "holds a int")],
)
def test_columns_of_another_kind_are_refused(tmp_path, column, values, message):
    table = {"anchor": ["a"], "positive": ["b"], column: values}
    pq.write_table(pa.table(table), tmp_path / "own.parquet")
    with pytest.raises(InputError, match=message):
        read_pairs(str(tmp_path), 9, 0)


def test_chosen_pairs_do_not_depend_on_their_order(tmp_path):
    rows = pa.table({"anchor": [f"a{i}" for i in range(100)], "positive": ["p"] * 100})
    for name, order in (("one", range(100)), ("two", range(99, -1, -1))):
        pq.write_table(rows.take(list(order)), tmp_path / f"{name}.parquet", row_group_size=7)
    one, two = (read_pairs(str(tmp_path / f"{n}.parquet"), 10, seed=3) for n in ("one", "two"))
    assert one.equals(two)
    assert len(one) == 10
    assert not one.equals(read_pairs(str(tmp_path / "one.parquet"), 10, seed=4))


@pytest.mark.parametrize(
    ("content", "message"),
    [({"anchor": ["a"], "other": ["b"]}, "no column 'positive'"), (None, "no such file or folder")],
)
def test_files_that_hold_no_pairs_are_refused(tmp_path, content, message):
    path = tmp_path / "pairs.parquet"
    if content:
        pq.write_table(pa.table(content), path)
    with pytest.raises(InputError, match=message):
        read_pairs(str(path), 10, 0)


def test_what_is_no_file_of_pairs_is_named(tmp_path):
    pairs = pa.table({"anchor": ["a"], "positive": ["b"]})
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(InputError, match=r"no pairs at .*: give a .parquet, .csv or .jsonl"):
            read_pairs(str(path), 10, 0)
    table = tmp_path / "table"
    write_deltalake(str(table), pairs)
    write_deltalake(str(table), pairs, mode="overwrite")
    for path, message in ((table, "is a table"), (f"{table}/*.parquet", "files within a table")):
        with pytest.raises(InputError, match=message):
            read_pairs(str(path), 10, 0)
    pq.write_table(pairs, tmp_path / "one.parquet")
    assert len(read_pairs(f"{tmp_path}/o*.parquet", 10, 0)) == 1


def test_ids_of_sixteen_bytes_are_uuids_though_they_read_as_text(tmp_path):
    keys = [uuid.UUID(bytes=b"sixteen letters!"), uuid.uuid4()]
    raw = pa.array([key.bytes for key in keys], pa.binary(16))
    for ids in (raw, pa.ExtensionArray.from_storage(pa.uuid(), raw)):
        table = pa.table({"anchor": ["a", "b"], "positive": ["c", "d"], "id": ids})
        pq.write_table(table, tmp_path / "pairs.parquet")
        read = read_pairs(str(tmp_path / "pairs.parquet"), 10, 0)
        assert set(read["id"].to_pylist()) == {str(key) for key in keys}


def test_batches_cover_all_pairs_once_an_epoch_and_never_the_heldout(tmp_path):
    pairs = pa.table({name: [f"{name}{i}" for i in range(23)] for name in ("anchor", "positive")})
    pairs = pairs.append_column("id", pa.array([str(i // 2) for i in range(23)]))
    counts = write_batches(pairs, BatchPlan(4, 8, 6, seed=1), str(tmp_path))
    heldout = read_heldout(str(tmp_path))
    batches = [read_batch(str(tmp_path), step, 0, 1)["anchor"].to_pylist() for step in range(1, 5)]
    training = counts["training_pairs"]
    seen = [anchor for batch in batches for anchor in batch]
    assert [len(batch) for batch in batches] == [8] * 4
    assert len(set(seen[:training])) == training
    held_documents = set(heldout["id"].to_pylist())
    used = pairs.filter(pa.compute.is_in(pairs["anchor"], pa.array(seen)))["id"].to_pylist()
    assert not held_documents & set(used)


@given(st.integers(1, 40), st.integers(1, 9))
def test_ranks_share_a_batch_evenly_and_completely(rows, world_size):
    from pipelines.training.batches import rank_slice

    table = pa.table({"row": range(rows)})
    parts = [rank_slice(table, rank, world_size)["row"].to_pylist() for rank in range(world_size)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
