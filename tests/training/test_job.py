import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import SENTENCES, tiny_adapter, tiny_model

from pipelines.encoder import describe as describe_module
from pipelines.encoder import sources
from pipelines.encoder.describe import describe_encoder
from pipelines.encoder.description import EncoderDescription
from pipelines.encoder.encoder import Encoder
from pipelines.runtime.errors import InputError
from pipelines.runtime.run_record import RunRecord, read_run
from pipelines.training import trainer as trainer_module
from pipelines.training.adapter import adapter_weights
from pipelines.training.batches import BatchPlan, add_label_pairs, sketch, split_heldout
from pipelines.training.config import FinetuneConfig
from pipelines.training.job import check_settings, describe_base, finetune_adapter
from pipelines.training.loop import topic_score
from pipelines.training.loss import shared_keys
from pipelines.training.result import judge_gain
from pipelines.training.trainer import AdapterTrainer, pair_keys


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of the halves of sentences, each of another document."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    texts = [f"{first} {second}" for first in SENTENCES for second in SENTENCES if first != second]
    halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in texts]
    anchors, positives = zip(*halves, strict=True)
    pq.write_table(
        pa.table({"anchor": anchors, "positive": positives, "id": range(len(texts)),
                  "topic": [t[0] for t in texts]}),
        path,
    )  # fmt: skip
    return str(path)


@pytest.fixture
def config(base, pairs, tmp_path):
    def make(output="out", **settings):
        return FinetuneConfig(
            **{
                "model": base, "pairs": pairs, "output": str(tmp_path / output), "max_steps": 6,
                "batch_pairs": 8, "heldout_pairs": 10, "measure_every": 2, "warmup_steps": 2,
                "learning_rate": 3e-3, "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.1,
                "num_workers": "0", "dtype": "float32", **settings,
            }
        )  # fmt: skip

    return make


def run(config):
    with RunRecord.of("finetune_adapter", config, keep_complete=True) as record:
        return finetune_adapter(config, record)


def weights(folder):
    return safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")


def history(folder):
    return pq.read_table(Path(folder) / "history.parquet").to_pylist()


def test_result_holds_all_that_is_promised_and_nothing_else(config):
    made = config(label_column="topic")
    result = run(made)
    assert sorted(path.name for path in Path(made.output).iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "encoder.json",
        "history.parquet", "history.svg", "run.json",
    ]  # fmt: skip
    assert read_run(made.output)["status"] == "complete"
    rows = history(made.output)
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[6]["loss"] < rows[1]["loss"]
    assert [row["step"] for row in rows if row["mrr"] is not None] == [0, 2, 4, 6]
    measured = [row for row in rows if row["heldout_loss"] is not None]
    kept = [r["heldout_loss"] for r in measured if topic_score(r) >= topic_score(rows[0])]
    assert result.metrics["best"]["heldout_loss"] == round(min(kept), 4)
    assert 0 <= result.metrics["best"]["v_measure"] <= 1
    card = (Path(made.output) / "README.md").read_text()
    assert "temperature 0.05" in card and "means in one word" in card


def test_encoder_and_plain_peft_give_the_vectors_of_training(config, base):
    made = config()
    run(made)
    encoder = Encoder.from_folder(made.output)
    assert encoder.description.adapter == made.output
    found = encoder.encode(SENTENCES)
    description = describe_encoder(made.encoder)
    trainer = AdapterTrainer(made.trainer, description, torch.device("cpu"), Path(made.output))
    trained = torch.nn.functional.normalize(trainer.embed(SENTENCES), dim=-1)
    assert torch.allclose(torch.from_numpy(found), trained, atol=1e-4)
    plain = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(base), made.output
    ).eval()
    ids = torch.tensor([encoder.tokenizer.tokenize(SENTENCES[:1])[0]])
    state = plain(ids).last_hidden_state[0, -1]
    assert torch.allclose(torch.nn.functional.normalize(state, dim=-1), trained[0], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_bidirectional_training_gives_the_encoders_vectors(config, tmp_path, family):
    windows = {"mistral": {"sliding_window": 8}, "gemma3": {"sliding_window": 17}}
    folder = tiny_model(tmp_path / family, family, **windows.get(family, {}))
    made = config(model=str(folder), attention="bidirectional", pooling="mean", prompt="none")
    description = describe_encoder(made.encoder)
    trainer = AdapterTrainer(made.trainer, description, torch.device("cpu"))
    trained = torch.nn.functional.normalize(trainer.embed(SENTENCES), dim=-1)
    found = Encoder.load(description, device="cpu").encode(SENTENCES)
    assert torch.allclose(torch.from_numpy(found), trained, atol=1e-4)


def test_training_is_on_the_numbers_that_the_folder_keeps(config, tmp_path):
    folder = tiny_model(tmp_path / "sentences")
    kind = "sentence_transformers.models"
    modules = [("", f"{kind}.Transformer"), ("1_Pooling", f"{kind}.Pooling")]
    contents = {
        "modules.json": [
            {"idx": n, "name": str(n), "path": path, "type": name}
            for n, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": {"embedding_dimension": 64, "pooling_mode": ["mean"]},
        "sentence_bert_config.json": {},
        "config_sentence_transformers.json": {"truncate_dim": 24},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    made = config(model=str(folder), max_steps=2)
    description = describe_encoder(made.encoder)
    trainer = AdapterTrainer(made.trainer, description, torch.device("cpu"))
    trained = torch.nn.functional.normalize(trainer.embed(SENTENCES), dim=-1)
    assert trained.shape == (8, 24)
    found = Encoder.load(description, device="cpu").encode(SENTENCES)
    assert torch.allclose(torch.from_numpy(found), trained, atol=1e-4)
    table = pa.table({"anchor": SENTENCES[:4], "positive": SENTENCES[4:], "id": list("abcd")})
    assert trainer.step(1, table, 0)["gradient_norm"] > 0


def test_a_moved_adapter_is_still_an_encoder(config, tmp_path):
    made = config(max_steps=1)
    run(made)
    before = Encoder.from_folder(made.output)
    moved = Path(shutil.move(made.output, tmp_path / "moved"))
    after = Encoder.from_folder(str(moved))
    assert after.fingerprint == before.fingerprint
    assert after.description.adapter == str(moved)
    assert (after.encode(SENTENCES) == before.encode(SENTENCES)).all()


def test_only_the_adapter_changes(config, base):
    trainer = AdapterTrainer(
        config().trainer, describe_encoder(config().encoder), torch.device("cpu")
    )
    before = {k: v.clone() for k, v in trainer.model.state_dict().items() if "lora_" not in k}
    table = pa.table({"anchor": SENTENCES[:4], "positive": SENTENCES[4:], "id": list("abcd")})
    trainer.step(1, table, 0)
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert any("lora_B" in name and after[name].any() for name in after)


@pytest.mark.parametrize("held_tokens", [256, 4096])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3"])
def test_batches_side_by_side_train_what_one_after_the_other_does(
    config, tmp_path, monkeypatch, family, held_tokens
):
    monkeypatch.setitem(trainer_module._MICRO_BATCH_TOKENS, "cpu", 64)
    folder = tiny_model(tmp_path / family, family)
    made = config(model=str(folder), activation_tokens=held_tokens)
    table = pa.table({"anchor": SENTENCES[:4], "positive": SENTENCES[4:], "id": list("abcd")})
    threads, found = torch.get_num_threads(), []
    for at_once in (1, 4):
        torch.set_num_threads(at_once)
        description = describe_encoder(made.encoder)
        trainer = AdapterTrainer(made.trainer, description, torch.device("cpu"))
        torch.set_num_threads(threads)
        assert trainer.at_once == at_once
        with torch.no_grad():  # in both halves, so that all weights have a gradient
            for place, weight in enumerate(trainer.parameters.values()):
                weight.add_(torch.sin(torch.arange(weight.numel()) + place).view_as(weight) / 20)
        loss = trainer.step(1, table, 0)["loss"]
        found.append((loss, [weight.grad for weight in trainer.parameters.values()]))
    (loss, one), (loss_beside, beside) = found
    assert loss_beside == pytest.approx(loss, rel=1e-5)
    for gradient, expected in zip(beside, one, strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("settings", [{"layer": 3}, {"model": "opt"}])
def test_what_could_meet_in_a_model_goes_through_it_alone(config, tmp_path, settings):
    if "model" in settings:
        settings = {"model": str(tiny_model(tmp_path / "opt", settings["model"]))}
    made = config(**settings)
    trainer = AdapterTrainer(made.trainer, describe_encoder(made.encoder), torch.device("cpu"))
    assert trainer.at_once == 1


def test_same_seed_same_adapter_another_seed_another(config):
    for output, seed in (("one", 1), ("two", 1), ("three", 2)):
        run(config(output, seed=seed))
    one, two, three = (weights(config(name).output) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("option", [{"activation_tokens": 64}, {"gradient_checkpointing": True}])
def test_saving_memory_changes_no_loss(config, option):
    run(config("plain"))
    run(config("saving", **option))
    plain, saving = (history(config(name).output) for name in ("plain", "saving"))
    for mine, theirs in zip(plain[1:], saving[1:], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


class Killed(BaseException):
    """Stands for a kill in the middle of a run."""


def test_resumed_run_reaches_the_losses_of_an_unbroken_one(config, monkeypatch):
    run(config("unbroken"))
    step = AdapterTrainer.step

    def fail_at_five(self, number, *arguments):
        if number == 5:
            raise Killed
        return step(self, number, *arguments)

    monkeypatch.setattr(AdapterTrainer, "step", fail_at_five)
    with pytest.raises(Killed):
        run(config("broken"))
    steps = []
    monkeypatch.setattr(
        AdapterTrainer, "step", lambda self, n, *a: (steps.append(n), step(self, n, *a))[1]
    )
    run(config("broken"))
    assert steps == [5, 6]
    unbroken, broken = (history(config(name).output) for name in ("unbroken", "broken"))
    for mine, theirs in zip(unbroken[1:], broken[1:], strict=True):
        assert mine["loss"] == theirs["loss"]
    one, two = (weights(config(name).output) for name in ("unbroken", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_run_is_not_gone_on_with_where_what_it_reads_has_changed(
    config, pairs, tmp_path, monkeypatch, is_complete
):
    (tmp_path / "pairs").mkdir()
    shutil.copy(pairs, tmp_path / "pairs")
    base = tiny_model(tmp_path / "base", num_hidden_layers=2)
    tiny_model(tmp_path / "teacher", "qwen3", num_hidden_layers=2)
    tiny_adapter(tmp_path / "first", base)
    places = {"pairs": "pairs", "model": "base", "adapter": "first", "teacher": "teacher"}
    made = config(
        **{option: str(tmp_path / name) for option, name in places.items()},
        max_steps=4, lora_dropout=0.0, lora_targets=("q_proj", "v_proj", "down_proj"),
    )  # fmt: skip
    step = AdapterTrainer.step

    def fail_at_four(self, number, *arguments):
        if number == 4:
            raise Killed
        return step(self, number, *arguments)

    if is_complete:
        run(made)
    else:
        monkeypatch.setattr(AdapterTrainer, "step", fail_at_four)
        with pytest.raises(Killed):
            run(made)
        monkeypatch.setattr(AdapterTrainer, "step", step)

    def make_other(name, folder):
        if name in ("base", "teacher"):
            tiny_model(folder, "llama" if name == "base" else "qwen3", seed=5, num_hidden_layers=2)
            return
        shutil.copytree(tmp_path / "kept", folder)
        if name == "pairs":
            pq.write_table(pq.read_table(pairs).slice(0, 40), folder / "pairs.parquet")
        else:
            path = folder / "adapter_model.safetensors"
            doubled = {name: 2 * w for name, w in safetensors.torch.load_file(path).items()}
            safetensors.torch.save_file(doubled, path)

    told = {"pairs": "pairs or corpus", "base": "base model", "first": "first adapter"}
    for name in places.values():
        folder = (tmp_path / name).rename(tmp_path / "kept").with_name(name)
        make_other(name, folder)
        with pytest.raises(InputError, match=f"from its {told.get(name, name)} as it was at"):
            run(made)
        shutil.rmtree(folder)
        (tmp_path / "kept").rename(folder)
    assert run(made).metrics["steps"] == 4


def test_complete_run_is_only_confirmed(config):
    made = config()
    run(made)
    before = (Path(made.output) / "adapter_model.safetensors").stat().st_mtime_ns
    assert run(made).metrics["steps"] == 6
    assert (Path(made.output) / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_patience_ends_a_run_that_does_not_get_better(config):
    made = config(learning_rate=1e-9, patience=1, max_steps=40)
    assert run(made).metrics["steps"] < 40


def test_best_adapter_is_kept_not_the_last(config, monkeypatch):
    losses = [3.0, 1.5, 1.7, 1.6]
    seen = []

    def measure(trainer, *_):
        seen.append(adapter_weights(trainer.model))
        return {"heldout_loss": losses[len(seen) - 1]}

    monkeypatch.setattr(AdapterTrainer, "measure", measure)
    made = config()
    assert run(made).metrics["best_step"] == 2
    kept = weights(made.output)
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert any(not torch.equal(kept[name], seen[3][name]) for name in kept)


def test_heldout_loss_is_the_objective_without_dropout(config):
    made = config(temperature=0.1)
    trainer = AdapterTrainer(made.trainer, describe_encoder(made.encoder), torch.device("cpu"))
    anchors, positives = SENTENCES[:4], SENTENCES[4:]
    table = pa.table({"anchor": anchors, "positive": positives, "id": list("abcd")})
    cosines = torch.nn.functional.cosine_similarity(
        trainer.embed(anchors)[:, None], trainer.embed(positives)[None], dim=-1
    )
    own = torch.arange(4)
    both = [torch.nn.functional.cross_entropy(c / 0.1, own) for c in (cosines, cosines.T)]
    found = trainer.measure(table, 0, 1)["heldout_loss"]
    assert found == pytest.approx(float(sum(both) / 2), rel=1e-4)


def test_heldout_loss_that_is_not_finite_ends_the_run(config, monkeypatch):
    monkeypatch.setattr(AdapterTrainer, "measure", lambda *_: {"heldout_loss": float("nan")})
    with pytest.raises(InputError, match="step 0: the loss of the held-out pairs is nan"):
        run(config())


def test_layer_matryoshka_and_learned_temperature_train_and_load(config):
    made = config(layer=2, pooling="mean", dimensions=(16, 32), learn_temperature=True)
    run(made)
    rows = history(made.output)
    assert rows[6]["temperature"] != pytest.approx(0.05, rel=1e-6)
    lora = json.loads((Path(made.output) / "adapter_config.json").read_text())
    assert {name.split(".")[1] for name in lora["target_modules"]} == {"0", "1"}
    assert Encoder.from_folder(made.output).encode(["a text"]).shape == (1, 64)


def test_training_goes_on_from_an_adapter(config):
    first = config("first")
    run(first)
    second = config("second", adapter=first.output)
    run(second)
    before = history(second.output)[0]
    best = read_run(first.output)["metrics"]["best"]
    assert before["mrr"] == pytest.approx(best["mrr"], abs=1e-3)
    assert EncoderDescription.load(second.output).adapter == second.output


def test_the_packaged_model_goes_on_from_its_adapter_where_the_shape_is_its_own(
    config, base, monkeypatch
):
    first = config("first", pooling="last+mean")
    run(first)
    monkeypatch.setattr(sources, "_PACKAGED_ADAPTER_FOLDER", Path(first.output))
    monkeypatch.setattr(describe_module, "PACKAGED_MODEL", base)
    begun = {"second": {}, "third": {"lora_rank": 8}, "fourth": {"adapter": "none"}}
    for name, settings in begun.items():
        made = config(name, **settings)
        result = run(made)
        assert result.metrics["start_adapter"] == ("packaged" if name == "second" else None)
        assert result.summary["began with"] == (
            "the adapter packaged" if name == "second" else "a new adapter"
        )
        assert EncoderDescription.load(made.output).pooling == (
            "last+mean" if name == "second" else "last"
        )
    best = read_run(first.output)["metrics"]["best"]
    assert history(config("second").output)[0]["mrr"] == pytest.approx(best["mrr"], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "summary"}, "trained with another prompt"),
        ({"pooling": "mean"}, "trained with another pooling"),
        ({"lora_rank": 8}, "pass --lora-rank 4"),
    ],
)
def test_adapter_trained_otherwise_is_refused(config, settings, message):
    first = config("first", max_steps=1)
    run(first)
    with pytest.raises(InputError, match=message):
        run(config("second", adapter=first.output, **settings))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"use_rslora": True}, "has use_rslora true, .*: false is required. Begin anew"),
        ({"alpha_pattern": {"q_proj": 64}}, "has alpha_pattern"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern"),
        ({"use_dora": True}, "has use_dora"),
        ({"init_lora_weights": "pissa"}, 'has init_lora_weights "pissa", .*: true is required'),
        ({"init_lora_weights": "olora"}, "has init_lora_weights"),
    ],
)
def test_only_an_adapter_that_acts_as_a_fresh_one_is_gone_on_from(
    config, base, tmp_path, lora, message
):
    tuned = peft.get_peft_model(
        transformers.AutoModel.from_pretrained(base),
        peft.LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", **lora),
    )
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.sin(torch.arange(weight.numel())).view_as(weight) / 9)
    tuned.save_pretrained(tmp_path / "theirs")
    made = config(adapter=str(tmp_path / "theirs"), pooling="mean", prompt="none")
    described, start = describe_base(made, device="cpu")
    if message is not None:
        with pytest.raises(InputError, match=message):
            check_settings(made, described, start)
        return
    check_settings(made, described, start)
    trainer = AdapterTrainer(made.trainer, described, torch.device("cpu"), Path(start))
    begun = torch.nn.functional.normalize(trainer.embed(SENTENCES), dim=-1)
    found = Encoder.load(made.encoder, device="cpu").encode(SENTENCES)
    assert torch.allclose(torch.from_numpy(found), begun, atol=1e-4)


def test_adapter_of_another_base_is_refused(config, tmp_path):
    first = config("first", max_steps=1)
    run(first)
    other = str(tiny_model(tmp_path / "other", seed=5))
    with pytest.raises(InputError, match="trained with another base model"):
        run(config("second", adapter=first.output, model=other))
    (Path(first.output) / "encoder.json").unlink()
    wider = str(tiny_model(tmp_path / "wider", hidden_size=96))
    with pytest.raises(InputError, match="must have been trained on this base model"):
        run(config("third", adapter=first.output, model=wider))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no pair"),
        ([("a b", "c d")], "1 pairs found; at least 2"),
        ([("same", "same")] * 40, "all 40 pairs are equal"),
        ([(f"a {i}", f"b {i}") for i in range(12)], "batch_pairs is 8, but only 2 of 12"),
        ([(None, "x"), ("", "y"), ("  ", "z")], "holds no pair"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(config, tmp_path, rows, message):
    path = tmp_path / "few.parquet"
    anchors, positives = zip(*rows, strict=True) if rows else ((), ())
    table = {"anchor": pa.array(anchors, pa.string()), "positive": pa.array(positives, pa.string())}
    pq.write_table(pa.table(table), path)
    with pytest.raises(InputError, match=message):
        run(config(pairs=str(path)))


@pytest.mark.parametrize(("count", "heldout"), [(20, 2), (50, 5), (300, 128)])
def test_few_pairs_are_enough_for_a_small_batch(config, tmp_path, count, heldout):
    path = tmp_path / "few.parquet"
    words = ["".join(letters) for letters in itertools.permutations("abcdef")]
    texts = [" ".join(words[2 * i : 2 * i + 2]) for i in range(count)]
    pq.write_table(pa.table({"anchor": texts, "positive": [t[::-1] for t in texts]}), path)
    made = config(pairs=str(path), heldout_pairs=None, max_steps=1)
    assert run(made).counts["heldout_pairs"] == heldout


def test_pairs_of_two_documents_are_held_out(config, pairs, tmp_path):
    path = tmp_path / "few-documents.parquet"
    table = pq.read_table(pairs)
    ids = [str(row // 14) for row in range(len(table))]  # 56 pairs of four documents
    pq.write_table(table.set_column(2, "id", pa.array(ids)), path)
    heldout, training = split_heldout(pq.read_table(path), BatchPlan(6, 8, 2, seed=0))
    documents = [set(part["id"].to_pylist()) for part in (heldout, training)]
    assert [len(part) for part in documents] == [2, 2] and not documents[0] & documents[1]
    assert len(heldout) == len(training) == 28
    metrics = run(config(pairs=str(path), heldout_pairs=2)).metrics
    assert metrics["before"]["heldout_loss"] > metrics["best"]["heldout_loss"] > 0
    pq.write_table(table.set_column(2, "id", pa.array(["one"] * len(table))), path)
    with pytest.raises(InputError, match="too few documents: 1 found"):
        run(config("single", pairs=str(path), heldout_pairs=2))


def test_texts_paired_with_themselves_need_dropout(config, tmp_path):
    path = tmp_path / "same.parquet"
    texts = [f"{first} {second}" for first in SENTENCES for second in SENTENCES]
    pq.write_table(pa.table({"anchor": texts, "positive": texts}), path)
    tuned = run(config("with", pairs=str(path))).metrics
    assert tuned["best_step"] > 0
    assert tuned["before"]["mrr"] == tuned["best"]["mrr"] == 1.0  # says nothing of such pairs
    with pytest.raises(InputError, match="pass --lora-dropout"):
        run(config("without", pairs=str(path), lora_dropout=0.0))


def test_negatives_of_some_pairs_cost_no_pair_and_change_the_loss(config, pairs, tmp_path):
    table = pq.read_table(pairs)
    hard = [[text[::-1]] * (i % 3) for i, text in enumerate(table["anchor"].to_pylist())]
    for name, column in (("none", pa.nulls(len(table))), ("some", pa.array(hard))):
        pq.write_table(table.append_column("negative", column), tmp_path / f"{name}.parquet")
        result = run(config(name, pairs=str(tmp_path / f"{name}.parquet")))
        assert result.counts["pairs"] == len(table)
    run(config("without"))
    without, none, some = (history(config(n).output)[1] for n in ("without", "none", "some"))
    assert without["loss"] == pytest.approx(none["loss"], rel=1e-5)
    assert some["loss"] > none["loss"] and some["tokens"] > none["tokens"]


def test_a_rank_without_a_held_out_pair_has_keys_of_the_others_width(tmp_path):
    texts = [f"{a} {b}" for a in SENTENCES[:4] for b in SENTENCES[4:]]
    table = pa.table({"anchor": texts, "positive": [t[::-1] for t in texts], "id": texts})
    table = table.append_column("sketch", pa.array(sketch(texts).tolist(), pa.list_(pa.int64())))
    labels = ["x", "x", *[None] * 14]
    table, _ = add_label_pairs(table.append_column("label", pa.array(labels)), seed=0)
    pq.write_table(table, tmp_path / "heldout.parquet")
    table = pq.read_table(tmp_path / "heldout.parquet")
    whole, none = (pair_keys(table.slice(0, n), torch.device("cpu")).pairs for n in (17, 0))
    assert none.shape == (0, whole.shape[1])


def test_a_hard_negative_that_is_nearly_anothers_positive_is_left_out():
    near = f"{SENTENCES[0]} {SENTENCES[3]}!"
    table = pa.table(
        {"anchor": ["first", "second"], "positive": [near[:-1], SENTENCES[5]], "id": ["a", "b"],
         "negative": [[SENTENCES[6]], [near, SENTENCES[7]]]}
    )  # fmt: skip
    keys = pair_keys(table, torch.device("cpu"))
    known = torch.cat([keys.pairs, keys.positives], dim=1)
    assert shared_keys(known, keys.negatives).tolist() == [[False, True, False], [False] * 3]


def test_near_duplicates_do_not_repel_each_other(config, tmp_path):
    """One report in many versions: each is its own pair, none is another's negative."""
    report = SENTENCES[6] + " It was number {0} of the {0} that were {0} days late."
    texts = [report.format(i) for i in range(60)]
    halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in texts]
    others = [(f"{a} {b}"[:40], f"{b} {a}"[:40]) for a in SENTENCES[:4] for b in SENTENCES[:4]]
    keys = sketch(texts).tolist() + sketch([a + b for a, b in others]).tolist()
    anchors, positives = zip(*halves, *others, strict=True)
    columns = {"anchor": anchors, "positive": positives, "sketch": keys}
    table = pa.table(columns).append_column("id", pa.array([str(i) for i in range(len(anchors))]))
    forbidden = shared_keys(*[pair_keys(table, torch.device("cpu")).pairs] * 2)
    assert forbidden[:60, :60].float().mean() > 0.95
    assert not forbidden[:60, 60:].any()
    pq.write_table(table.slice(0, 60), tmp_path / "copies.parquet")
    with pytest.raises(InputError, match="near copies of one text"):
        run(config(pairs=str(tmp_path / "copies.parquet")))


def test_gain_is_told_with_its_error_and_never_below_the_start(config, monkeypatch):
    made = config(max_steps=20, measure_every=5, seed=1)
    result = run(made)
    gain = result.metrics["gain"]
    before, best = result.metrics["before"], result.metrics["best"]
    for name in ("heldout_loss", "mrr", "half_agreement"):
        assert gain[name]["gain"] == pytest.approx(best[name] - before[name], abs=2e-4)
    assert gain["heldout_loss"]["gain"] < 0 < gain["heldout_loss"]["error"]
    assert topic_score(best) >= topic_score(before)
    assert "±" in result.summary["gain in topics, without labels"]


def test_a_teacher_of_the_settings_is_never_left_out(config, base):
    made = config(teacher=base)
    description = describe_base(made, device="cpu")[0]
    with pytest.raises(ValueError, match="settings name teacher"):
        AdapterTrainer(made.trainer, description, torch.device("cpu"))


def test_a_teacher_is_agreed_with_and_named(config, tmp_path):
    teacher = str(tiny_model(tmp_path / "teacher", "qwen3", seed=7))
    made = config(teacher=teacher, max_steps=40, measure_every=10, lora_dropout=0.0)
    result = run(made)
    before, best = result.metrics["before"], result.metrics["best"]
    assert best["teacher_agreement"] > before["teacher_agreement"] + 0.05
    gain = result.metrics["gain"]["teacher_agreement"]["gain"]
    assert gain == pytest.approx(best["teacher_agreement"] - before["teacher_agreement"], abs=2e-4)
    assert "gain in teacher agreement, without labels" in result.summary
    card = (Path(made.output) / "README.md").read_text()
    assert result.metrics["teacher_fingerprint"] in card and "teacher_agreement" in card


def test_a_teacher_that_is_none_is_refused_before_anything_is_written(config, tmp_path):
    made = config(teacher="no/such/folder")
    with pytest.raises(InputError, match="no such model"):
        run(made)
    EncoderDescription.elsewhere("theirs", 8).save(str(tmp_path / "vectors"))
    with pytest.raises(InputError, match="'theirs' that were made elsewhere, and a teacher must"):
        run(config(teacher=str(tmp_path / "vectors")))
    assert not (Path(made.output) / "_work").exists()


@pytest.mark.parametrize(
    ("made_by", "verdict"),
    [
        ({}, "use the adapter"),
        ({"crop": 60, "halves": 40}, "use the adapter"),
        ({"crop": 40, "halves": 50, "noise": 10}, "no proof, as most texts are short"),
    ],
)
def test_a_gain_on_halves_of_short_texts_is_no_proof(made_by, verdict):
    assert verdict in judge_gain({"topics": {"gain": 0.1, "error": 0.01}}, 20, made_by)


def test_an_adapter_that_knows_less_of_topics_is_not_kept(config, monkeypatch):
    scores = [(3.0, 0.5, 0.5), (1.0, 0.5, 0.4), (2.0, 0.4, 0.7), (1.5, 0.2, 0.2)]
    names = ("heldout_loss", "mrr", "half_agreement")
    rows = iter([dict(zip(names, values, strict=True)) for values in scores])
    monkeypatch.setattr(AdapterTrainer, "measure", lambda *_: next(rows))
    assert run(config()).metrics["best_step"] == 4


def test_few_labels_add_pairs_of_one_label(config, pairs, tmp_path):
    table = pq.read_table(pairs)
    topics = [t if i % 4 == 0 else None for i, t in enumerate(table["topic"].to_pylist())]
    place = table.column_names.index("topic")
    pq.write_table(table.set_column(place, "topic", pa.array(topics)), tmp_path / "few.parquet")
    result = run(config(pairs=str(tmp_path / "few.parquet"), label_column="topic"))
    assert 0 < result.counts["label_pairs"] <= result.counts["training_pairs"] / 2
    assert "v_measure" not in result.metrics["best"]
    assert "pairs of one label" in result.summary


def test_loss_that_is_not_finite_stops_with_step_and_ids(config, monkeypatch):
    def spoilt(_, anchors, *rest):
        return anchors.sum() * (float("nan") if torch.is_grad_enabled() else 0.0)

    monkeypatch.setattr("pipelines.training.loss.ContrastiveLoss.forward", spoilt)
    with pytest.raises(InputError, match=r"step 1: loss nan .* document ids are \d+, "):
        run(config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_pairs": 1}, "batch_pairs is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"num_workers": "2:1"}, "num_workers is '2:1'"),
        ({"num_workers": "many"}, "num_workers is 'many'"),
        ({"num_workers": "9"}, "more than the 8 pairs"),
        ({"corpus": "docs.parquet"}, "both --pairs and --corpus"),
        ({"crop_words": (3, 4)}, "--crop-words has no effect"),
        ({"teacher": ""}, "teacher is empty"),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_impossible_options_are_refused(config, settings, message):
    with pytest.raises(InputError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_targets": ("nowhere",)}, "its are .*q_proj"),
        ({"dimensions": (64,)}, "dimensions has 64"),
        ({"label_column": "missing"}, "no column 'missing'"),
    ],
)
def test_options_that_do_not_suit_model_or_pairs_are_refused(config, settings, message):
    with pytest.raises(InputError, match=message):
        run(config(**settings))


@pytest.mark.slow
def test_problem_of_one_rank_alone_ends_the_run_at_once(config, local_ray, monkeypatch):
    from pipelines.training import on_ray

    monkeypatch.setattr(on_ray, "_PROBLEM_WAIT_SECONDS", 0.5)

    def work(settings):
        import ray.train

        from pipelines.training import on_ray

        load, rank = on_ray.load_trainer, ray.train.get_context().get_world_rank()

        def fail_on_one(task, device):
            if rank == 1:
                raise InputError("this machine lacks the adapter")
            return load(task, device)

        on_ray.load_trainer = fail_on_one
        on_ray.work_as_rank(settings)

    monkeypatch.setattr(on_ray, "work_as_rank", work)
    started = time.monotonic()
    with pytest.raises(InputError, match="this machine lacks the adapter"):
        run(config(num_workers="2", cpus_per_worker=1.0))
    assert time.monotonic() - started < 900  # the others would wait half an hour for it


@pytest.mark.parametrize("pooling", ["last", "last+mean"])
def test_sentence_transformers_gives_the_same_cosines(config, pooling):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    made = config(max_steps=2, pooling=pooling, max_tokens=12, sentence_transformers=True)
    run(made)
    theirs = sentence_transformers.SentenceTransformer(
        str(Path(made.output) / "sentence_transformers"), device="cpu"
    ).encode(SENTENCES)
    ours = Encoder.from_folder(made.output).encode(SENTENCES)
    assert np.allclose(theirs @ theirs.T, ours @ ours.T, atol=1e-4)
