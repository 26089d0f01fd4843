"""Choosing an encoder: the pass that gives all candidates, their scores, and the job."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import v_measure_score
from tiny_models import SENTENCES, tiny_adapter, tiny_model

from pipelines.corpus.sample import sample_corpus
from pipelines.encoder.base_model import load_base_model
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import POOLINGS, EncoderConfig, EncoderDescription
from pipelines.encoder.encoder import Encoder
from pipelines.encoder.tokenization import PromptedTokenizer
from pipelines.evaluation import select as selection
from pipelines.evaluation.config import SelectConfig
from pipelines.evaluation.ranking import rank_candidates
from pipelines.evaluation.select import select_encoder
from pipelines.evaluation.trial import (
    AllLayersPooler,
    Trial,
    agreement,
    cluster_vectors,
    cut_in_half,
    head_of,
    partner_log_ranks,
    plan_runs,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run

TOPICS = {
    "sea": ["boat", "wave", "sail", "shore"],
    "law": ["court", "judge", "trial", "contract"],
    "food": ["flour", "eggs", "dough", "milk"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    generator = np.random.default_rng(0)
    labels = [list(TOPICS)[n % 3] for n in range(60)]
    texts = [" ".join(generator.choice(TOPICS[label], 12)) for label in labels]
    path = tmp_path_factory.mktemp("corpus") / "topics.parquet"
    rows = {"text": [*texts, "tiny", texts[0], None], "topic": [*labels, "sea", labels[0], "law"]}
    pq.write_table(pa.table(rows), path)
    return str(path)


@pytest.fixture
def config(corpus, tiny_model_folder, tmp_path):
    return SelectConfig(
        corpus=corpus,
        output=str(tmp_path / "out"),
        model=str(tiny_model_folder),
        prompts=("none", "Topic of {text}:"),
        poolings=("last", "mean", "last+mean"),
        dtype="float32",
    )


def run(config):
    with RunRecord.of("select_encoder", config) as record:
        select_encoder(config, record)
    return pq.read_table(Path(config.output) / "candidates.parquet").to_pandas()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt"])
def test_one_pass_gives_what_each_candidates_own_encoder_gives(tmp_path, family):
    folder = tiny_model(tmp_path / family, family)
    adapter = tiny_adapter(tmp_path / "adapter", folder) if family == "llama" else None
    config = EncoderConfig(
        model=str(folder), adapter=adapter and str(adapter), prompt="cluster", dtype="float32"
    )
    tokenizer = PromptedTokenizer.load(config)
    model = load_base_model(
        folder, dtype=torch.float32, device=torch.device("cpu"), adapter=adapter
    )
    texts = [*SENTENCES[:4], "", "Rain."]
    pooler = AllLayersPooler(model, range(5), POOLINGS, budget_tokens=80)
    states = pooler.pool(tokenizer.tokenize(texts), tokenizer)
    for layer in range(5):
        for pooling in POOLINGS:
            expected = Encoder.load(replace(config, layer=layer, pooling=pooling)).encode(texts)
            np.testing.assert_allclose(states.vectors(layer, pooling), expected, atol=2e-5)


def test_a_candidate_has_the_head_of_its_folder(tmp_path):
    folder = tiny_model(tmp_path / "sentences", num_hidden_layers=2)
    kind = "sentence_transformers.models"
    modules = [
        ("", "Transformer", {}),
        ("1_Pooling", "Pooling",
         {"embedding_dimension": 64, "pooling_mode": ["mean"], "include_prompt": False}),
        ("2_Dense", "Dense",
         {"in_features": 64, "out_features": 32, "bias": False,
          "activation_function": "torch.nn.modules.linear.Identity"}),
    ]  # fmt: skip
    for path, _, content in modules[1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(content))
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file({"linear.weight": weight}, folder / "2_Dense/model.safetensors")
    listed = [{"idx": n, "name": str(n), "path": path, "type": f"{kind}.{name}"}
              for n, (path, name, _) in enumerate(modules)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text("{}")
    settings = json.dumps({"truncate_dim": 24})
    (folder / "config_sentence_transformers.json").write_text(settings)
    poolings = ("mean", "last", "last+mean", "max")
    config = EncoderConfig(model=str(folder), prompt="cluster", pooling="last", dtype="float32")
    described = describe_encoder(config, device="cpu")
    tokenizer = PromptedTokenizer.load(described)
    model = load_base_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    heads = {pooling: head_of(described, tokenizer, pooling) for pooling in poolings}
    pooler = AllLayersPooler(model, (1, 2), poolings, budget_tokens=80, heads=heads)
    states = pooler.pool(tokenizer.tokenize(SENTENCES), tokenizer)
    for layer, pooling in itertools.product((1, 2), poolings):
        own = Encoder.load(replace(config, layer=layer, pooling=pooling), device="cpu")
        assert bool(own.description.projections) == (pooling == "mean")
        found = states.vectors(layer, pooling, head=heads[pooling])
        assert found.shape == (8, 24)
        np.testing.assert_allclose(found, own.encode(SENTENCES), atol=2e-5)


@pytest.mark.usefixtures("local_ray")
def test_adapters_are_candidates_as_they_were_trained(config, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", Path(config.model))
    trained = EncoderConfig(
        model=config.model, adapter=str(adapter), prompt="cluster", pooling="mean", layer=1,
        dtype="float32",
    )  # fmt: skip
    describe_encoder(trained).save(str(adapter))
    table = run(replace(config, adapters=(str(adapter),), layers=(1, 2), label_column="topic"))
    tuned = table[table["adapter"].notna()]
    assert len(table) == 2 * 3 * 2 + 1
    (row,) = tuned.to_dict("records")
    assert (row["prompt"], row["pooling"], row["layer"]) == ("cluster", "mean", 1)
    winner = EncoderDescription.load(config.output)
    assert (winner.adapter is None) == (row["rank"] > 1)


@pytest.mark.usefixtures("local_ray")
def test_each_adapter_has_its_own_score(config, tmp_path):
    first, copy, other = (str(tmp_path / name) for name in ("first", "copy", "other"))
    tiny_adapter(Path(first), Path(config.model))
    for folder in (copy, other):
        shutil.copytree(first, folder)
    weights = safetensors.torch.load_file(f"{first}/adapter_model.safetensors")
    doubled = {name: 2 * weight for name, weight in weights.items()}
    safetensors.torch.save_file(doubled, f"{other}/adapter_model.safetensors")
    config = replace(config, label_column="topic", prompts=("none", "one-word"), layers=(1, 2))

    def scores(output, adapters, **settings):
        table = run(
            replace(config, adapters=adapters, output=str(tmp_path / output), **settings)
        ).fillna({"adapter": ""})
        keys = table[["adapter", "prompt", "pooling", "layer"]].itertuples(index=False, name=None)
        found = dict(zip(keys, table["score"], strict=True))
        assert len(found) == len(table)
        return found

    expected = scores("one", (first,)) | scores("another", (other,))
    assert [key[0] for key in expected].count("") == 2 * 3 * 2
    assert sorted(key[0] for key in expected if key[0]) == [first, other]
    assert scores("all", ("none", first, copy, other)) == expected
    merged = scores("merged", (first,), adapter=first)
    assert len(merged) == 2 * 3 * 2 and {key[0] for key in merged} == {first}


def test_a_lack_of_memory_halves_the_batch(tiny_model_folder, monkeypatch):
    config = EncoderConfig(model=str(tiny_model_folder), dtype="float32")
    tokenizer = PromptedTokenizer.load(config)
    model = load_base_model(tiny_model_folder, dtype=torch.float32, device=torch.device("cpu"))
    pooler = AllLayersPooler(model, [1, 2], ("mean",), budget_tokens=4096)
    token_ids = tokenizer.tokenize(SENTENCES)
    expected = pooler.pool(token_ids, tokenizer)
    whole = pooler._pool_batch

    def small_batches_only(batch, tokenizer):
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return whole(batch, tokenizer)

    monkeypatch.setattr(pooler, "_pool_batch", small_batches_only)
    found = pooler.pool(token_ids, tokenizer)
    np.testing.assert_allclose(found.vectors(2, "mean"), expected.vectors(2, "mean"), atol=1e-5)


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(2, 5))
def test_agreement_with_labels_is_the_v_measure(seed, labels, clusters):
    generator = np.random.default_rng(seed)
    first = generator.integers(labels, size=(3, 30))
    second = generator.integers(clusters, size=(3, 30))
    weights = generator.integers(0, 3, 30)
    weights[:5] = 1
    found = agreement(first, second, weights)
    for row in range(3):
        one, other = (np.repeat(values[row], weights) for values in (first, second))
        collapsed = len(set(one)) == 1 or len(set(other)) == 1
        expected = 0.0 if collapsed else v_measure_score(one, other)
        assert found[row] == pytest.approx(expected, abs=1e-9)


def test_partners_that_are_nearest_have_rank_one_and_equals_stand_in_the_middle():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 8)).astype(np.float32)
    np.testing.assert_allclose(partner_log_ranks(vectors, vectors + 1e-3), 0.0, atol=1e-6)
    same = np.ones((40, 8), np.float32)
    np.testing.assert_allclose(np.exp(partner_log_ranks(same, same)), 20.5, rtol=1e-5)


def test_vectors_that_are_all_equal_cluster_without_a_word():
    assert set(cluster_vectors(np.ones((30, 4), np.float32), 3, 0)) == {0}


def test_halves_keep_the_prompt_whole(tiny_model_folder):
    config = EncoderConfig(model=str(tiny_model_folder), prompt="one-word", max_tokens=9)
    tokenizer = PromptedTokenizer.load(config)
    (ids,) = tokenizer.tokenize([SENTENCES[0]])
    head, tail = list(tokenizer.head), list(tokenizer.tail)
    first, second = cut_in_half(tokenizer, ids)
    middle = [half[len(head) : len(half) - len(tail)] for half in (first, second)]
    assert all(half[: len(head)] == head and half[-len(tail) :] == tail for half in (first, second))
    assert head + middle[0] + middle[1] + tail == ids
    assert [len(half) for half in middle] == [4, 5]


def trial_of(quality, documents=80, runs=2, seed=0):
    """Candidates whose halves agree with the document's topic as often as ``quality`` says."""
    generator = np.random.default_rng(seed)
    topic = np.tile(np.arange(4), documents // 4)
    clusterings, ranks = [], []
    for share in quality:
        halves = np.tile(topic, (runs, 2))
        wrong = generator.random(halves.shape) > share
        halves = np.where(wrong, generator.integers(4, size=halves.shape), halves)
        clusterings.append(halves)
        ranks.append(generator.exponential(2 - share, documents))
    labels = [str(t) for t in topic]
    return Trial(np.array(clusterings, np.int16), np.array(ranks, np.float32)), labels


def test_without_labels_the_better_candidate_wins_and_says_how_surely():
    trial, _ = trial_of([0.3, 0.9, 0.6])
    ranking = rank_candidates([trial, trial_of([0.2, 0.5], seed=1)[0]], None)
    assert ranking.winner == 1
    assert ranking.probability_best[1] > 0.9
    assert ranking.probability_best.sum() == pytest.approx(1.0)
    assert ranking.as_good == 1
    assert ranking.half_agreement.argmax() == 1
    twins = rank_candidates([trial_of([0.7, 0.7], seed=2)[0]], None)
    assert twins.as_good == 2
    assert twins.probability_best.max() < 0.99


def test_with_labels_the_score_is_the_v_measure():
    trial, labels = trial_of([0.3, 0.9])
    whole = Trial(trial.clusterings[..., :80], None)
    ranking = rank_candidates([whole], labels)
    expected = np.mean([v_measure_score(labels, run) for run in whole.clusterings[1]])
    assert ranking.v_measure[1] == pytest.approx(expected)
    assert ranking.winner == 1
    assert ranking.standard_error[1] > 0


def test_a_trial_survives_its_file():
    trial, _ = trial_of([0.5])
    for kept in (trial, Trial(trial.clusterings, None)):
        read = Trial.from_bytes(kept.to_bytes())
        np.testing.assert_array_equal(read.clusterings, kept.clusterings)
        assert (read.log_ranks is None) == (kept.log_ranks is None)
        assert read.dimensions is None


def test_runs_never_have_more_clusters_than_the_documents_bear():
    assert {k for k, _ in plan_runs(1000, num_clusters=0, labels=None, seed=3)} == {8, 16, 32}
    assert {k for k, _ in plan_runs(40, num_clusters=0, labels=None, seed=0)} == {8, 10}
    assert plan_runs(500, num_clusters=0, labels=7, seed=0) == ((7, 0), (7, 1), (7, 2))
    assert plan_runs(500, num_clusters=5, labels=None, seed=0) == ((5, 0), (5, 1))


@pytest.mark.usefixtures("local_ray")
def test_without_labels_every_candidate_is_scored_and_the_winner_written(config):
    table = run(config)
    assert len(table) == 2 * 3 * 3
    assert set(table["prompt"]) == {"none", "Topic of {text}:"}
    assert set(table["layer"]) == {0, 1, 2}
    assert table["rank"].tolist() == list(range(1, 19))
    assert table["score"].is_monotonic_decreasing
    assert table["v_measure"].isna().all()
    assert table["half_agreement"].between(0, 1).all()
    best = table.iloc[0]
    encoder = Encoder.from_folder(config.output)
    winner = config.encoder(best["prompt"])
    assert encoder.description == describe_encoder(
        replace(winner, pooling=best["pooling"], layer=int(best["layer"]))
    )
    assert encoder.dimension == best["dimension"]
    record = read_run(config.output)
    assert record["counts"] == {"documents": 60, "candidates": 18}
    assert record["metrics"]["as_good"] >= 1
    assert not (Path(config.output) / "_work").exists()
    again = run(replace(config, output=f"{config.output}-again", num_actors=1))
    assert again["score"].tolist() == pytest.approx(table["score"].tolist(), abs=1e-6)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.int8
def test_int8_candidates_are_scored_as_int8(config):
    table = run(replace(config, dtype="int8", prompts=("none",), poolings=("mean",), layers=(2,)))
    assert len(table) == 1
    assert Encoder.from_folder(config.output).description.dtype == "int8"


@pytest.mark.usefixtures("local_ray")
def test_with_labels_candidates_are_scored_by_v_measure(config):
    config = replace(config, label_column="topic", layers=(-1, 1), poolings=("mean",))
    table = run(config)
    assert len(table) == 4
    assert table["score"].tolist() == table["v_measure"].tolist()
    assert table["half_agreement"].isna().all()
    assert read_run(config.output)["counts"]["documents"] == 61


@pytest.mark.usefixtures("local_ray")
def test_a_killed_run_goes_on(config, monkeypatch):
    def stop(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(selection, "write_outcome", stop)
        with pytest.raises(RuntimeError):
            run(config)
    trials = sorted((Path(config.output) / "_work" / "trials").iterdir())
    before = [path.stat().st_mtime_ns for path in trials]

    def look(*arguments):
        assert [path.stat().st_mtime_ns for path in trials] == before
        return write(*arguments)

    write = selection.write_outcome
    monkeypatch.setattr(selection, "write_outcome", look)
    assert len(run(config)) == 18


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (5,)}, "layer 5 does not exist"),
        ({"label_column": "text"}, "more documents than labels"),
        ({"label_column": "nothing"}, "no kept column 'nothing'"),
        ({"corpus": "/nowhere"}, "no such file or folder"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(config, settings, message):
    with pytest.raises(InputError, match=message):
        run(replace(config, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ()}, "one each at least"),
        ({"prompts": ("none", "{text}")}, "one prompt twice"),
        ({"documents": 5}, "at least 20"),
        ({"num_clusters": 1}, "2 and more"),
        ({"poolings": ("middle",)}, "unknown pooling"),
        ({"passages": "words:20"}, "tokens:N or sentences:N"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SelectConfig(**settings)


@pytest.mark.usefixtures("local_ray")
def test_candidates_are_tried_on_a_passage_of_each_document(config, tmp_path, monkeypatch):
    end = "This is the end of every document, and so is in none twice."
    texts = [" ".join(f"Sentence {k} of {n}: a boat." for k in range(6)) for n in range(60)]
    rows = [{"text": f"{text} {end}", "topic": str(n % 3)} for n, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "long.parquet")
    tried = []
    monkeypatch.setattr(selection, "try_prompts", lambda *given: tried.append(given[3]) or 1 / 0)
    config = replace(
        config,
        corpus=str(tmp_path / "long.parquet"),
        label_column="topic",
        passages="sentences:64",
        documents=60,
    )
    for documents in (60, 500):
        with pytest.raises(ZeroDivisionError):
            run(replace(config, documents=documents, output=str(tmp_path / f"{documents}")))
    some, every = tried
    assert len(set(some)) == len(some) == 60
    assert len(set(every)) == len(every) == 60 * 2 + 1
    assert every.count(end) == 1
    own = Counter(text.split(" of ")[1].split(":")[0] for text in some if text != end)
    assert len(own) > 40  # the others' first is the end that all have
    assert max(own.values()) <= 2
    assert all(text not in {row["text"] for row in rows} for text in every)
    with pytest.raises(InputError, match="ask for shorter passages"):
        run(replace(config, passages="tokens:300", output=str(tmp_path / "other")))


@pytest.mark.usefixtures("local_ray")
def test_a_sample_is_the_same_for_any_order_of_files_and_rows(tmp_path):
    texts = [f"text {n}" for n in range(200)] + ["text 7"]
    labels = [str(n % 3) for n in range(200)] + [None]
    for folder, order in (("a", range(201)), ("b", reversed(range(201)))):
        (tmp_path / folder).mkdir()
        order = list(order)
        for number, rows in enumerate((order[:50], order[50:])):
            lines = [json.dumps({"text": texts[i], "label": labels[i]}) for i in rows]
            (tmp_path / folder / f"{number}.jsonl").write_text("\n".join(lines))
    first, second = (
        sample_corpus(
            str(tmp_path / f), str(tmp_path / f"work-{f}"), label_column="label", documents=20
        )
        for f in "ab"
    )
    assert first.texts == second.texts
    assert first.labels == second.labels == [str(int(t.split()[1]) % 3) for t in first.texts]
    assert first.read == 201
    assert first.left_out == {"label is missing": 1}
    other = sample_corpus(str(tmp_path / "a"), str(tmp_path / "work-c"), documents=20, seed=1)
    assert set(other.texts) != set(first.texts)
    assert len(sample_corpus(str(tmp_path / "a"), str(tmp_path / "work-d")).texts) == 200
    every = sample_corpus(str(tmp_path / "a"), str(tmp_path / "work-e"), distinct=False)
    assert len(every.texts) == 201


def test_the_packaged_models_own_adapter_is_tried_by_default():
    assert SelectConfig().tried_adapters == ("packaged",)
    assert SelectConfig(adapters=("auto", "mine")).tried_adapters == ("packaged", "mine")
    assert SelectConfig(adapters=()).tried_adapters == ()
    assert SelectConfig(model="other").tried_adapters == ()
    assert SelectConfig(adapter="mine").tried_adapters == ()
