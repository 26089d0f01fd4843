"""Nights of random changes, edits and rollbacks against a model of what the store must hold."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import TOPICS, night, rows_of, text_of, write_corpus
from trivial_workers import tokens_of, topic_vector_of

from pipelines.runtime.errors import InputError
from pipelines.store.config import EditConfig
from pipelines.store.edits import edit_store
from pipelines.store.store import Store
from pipelines.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_model")
SETTINGS = {
    "max_deleted": 1.0, "max_drift": 1.0, "max_score_drop": 9.0, "max_imbalance": 1.0,
    "accept": ("edits", "encoder"), "novel_documents": 9999,
}  # fmt: skip
A_PART = {"max_embed_hours": 1e-9, "chunk_tokens": 9600}
PROMPTS = ("one-word", "none", "topic")


class Model:
    """What should be there, kept without looking into the store."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.texts = {n: text_of(n) for n in range(60)}
        self.next_id = 60
        self.published: list[int] = []
        """The versions that were published, rolled back ones taken off."""
        self.contents: dict[int, dict[int, str]] = {}
        self.pins: dict[int, tuple[int, int]] = {}
        self.names: dict[int, tuple[int, str]] = {}

    def change_corpus(self) -> None:
        draw = self.random
        for _ in range(draw.randint(0, 6)):
            topic = draw.choice([*TOPICS, "q"])
            self.texts[self.next_id] = text_of(self.next_id, topic)
            self.next_id += 1
        for row_id in draw.sample(sorted(self.texts), draw.randint(0, 5)):
            topic = draw.choice([None, *TOPICS])
            self.texts[row_id] = text_of(row_id, topic, draw.randint(1, 9))
        for row_id in draw.sample(sorted(self.texts), draw.randint(0, 4)):
            del self.texts[row_id]

    def edit(self, store: str) -> None:
        """Enter a random edit; what contradicts an earlier one is refused, and changes nothing."""
        draw, rows = self.random, rows_of(store)
        clusters = sorted({row["cluster_id"] for row in rows.values()})
        one, other = draw.choice(clusters), draw.choice(clusters)
        document = draw.choice(sorted(rows))
        kind = draw.choice(["name", "pin", "merge", "forbid", "split", "undo", "note"])
        flags = {
            "name": {"name": (one, f"Name {draw.randint(0, 99)}")},
            "pin": {"pin": (str(document), one)},
            "merge": {"merge": (one, other)},
            "forbid": {"forbid": (one, other)},
            "split": {"split": one},
            "undo": {"undo": draw.randint(1, 9)},
            "note": {"note": "a remark"},
        }[kind]
        try:
            number = edit_store(EditConfig(store=store, **flags)).data["number"]
        except InputError:
            return
        if kind == "name":
            self.names[number] = flags["name"]
        if kind == "pin":
            self.pins[number] = (document, one)
        if kind == "undo":
            self.names.pop(flags["undo"], None)
            self.pins.pop(flags["undo"], None)


def clusters_table(store: str) -> list[dict]:
    version = Store.open(store).version()
    return pq.read_table(pa.BufferReader(version.read("clusters.parquet"))).to_pylist()


def merged_into(store: str) -> dict[int, int]:
    """For each part of the published version, the cluster that it is published as."""
    version = Store.open(store).version()
    table = pq.read_table(pa.BufferReader(version.read("centroids.parquet")))
    parts = table["part_id" if "part_id" in table.column_names else "cluster_id"]
    return dict(zip(parts.to_pylist(), table["cluster_id"].to_pylist(), strict=True))


def check(model: Model, store: str, before: dict, rolled_back: bool) -> None:
    rows = rows_of(store)
    assert {n: row["text"] for n, row in rows.items()} == model.texts
    for row_id, row in rows.items():
        assert np.array_equal(row["embedding"], topic_vector_of(tokens_of(row["text"])))
        old = before.get(row_id)
        if old is not None and not rolled_back:
            assert row["first_seen"] == old["first_seen"]
            same = old["text"] == row["text"]
            assert (row["last_changed"] == old["last_changed"]) == same
    table = clusters_table(store)
    parts = merged_into(store)
    names = {row["cluster_id"]: row["name"] for row in table}
    assert len(names) == len(table)
    assert sum(row["size"] for row in table) == len(rows)
    assert {row["cluster_id"] for row in rows.values()} <= names.keys()
    for cluster, name in model.names.values():
        assert names.get(cluster, name) == name
    for document, cluster in model.pins.values():
        home = parts.get(cluster, cluster)
        if document in rows and home in names:
            assert rows[document]["cluster_id"] == home
    assert verify_store(Store.open(store)) == []


def backfill(corpus, store, model_folder, prompt, target):
    """A night's part of an encoder change; its result where it is the last, and the prompt now."""
    before = rows_of(store)
    result = night(corpus, store, model_folder, prompt=target, **A_PART, **SETTINGS)
    if "unfinished" not in result.summary:
        return result, target
    assert {n: row["text"] for n, row in rows_of(store).items()} == {
        n: row["text"] for n, row in before.items()
    }
    return None, prompt


def simulate(folder, model_folder, nights: int, seed: int) -> None:
    """Nights over one store; after each the store is what the model says, whole."""
    model, store = Model(seed), str(folder / "store")
    prompt = target = PROMPTS[0]
    for number in range(nights):
        rolled_back = False
        before = rows_of(store) if model.published else {}
        if model.published:
            model.change_corpus()
            for _ in range(model.random.randint(0, 2)):
                model.edit(store)
            if len(model.published) > 1 and model.random.random() < 0.15:
                opened = Store.open(store)
                with opened.take_lease("test") as lease:
                    assert opened.rollback(lease).number == model.published[-2]
                model.published.pop()
                rolled_back = True
                old = {n: row["text"] for n, row in rows_of(store).items()}
                assert old == model.contents[model.published[-1]]
        clusters = "refit" if number == 0 else model.random.choice(["refit", "assign"])
        corpus = write_corpus(folder / "corpus", model.texts)
        result = None
        if target != prompt:
            result, prompt = backfill(corpus, store, model_folder, prompt, target)
        elif model.published and model.random.random() < 0.2:
            target = model.random.choice(PROMPTS)
        if result is None:
            settings = {"clusters": clusters, "prompt": prompt, **SETTINGS}
            result = night(corpus, store, model_folder, **settings)
        assert not result.refusals, (seed, number)
        current = Store.open(store).version().number
        if not model.published or current != model.published[-1]:
            model.published.append(current)
        model.contents[current] = dict(model.texts)
        check(model, store, before, rolled_back)
        if number % 10 == 9:
            opened = Store.open(store)
            with opened.take_lease("test") as lease:
                removed = opened.prune(lease, 4)
            model.published = [n for n in model.published if n not in removed]


@pytest.mark.parametrize("seed", range(2))
def test_a_few_nights_leave_what_the_model_says(tmp_path, tiny_model_folder, seed):
    simulate(tmp_path, tiny_model_folder, 6, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10])
def test_sixty_nights_leave_what_the_model_says(tmp_path, tiny_model_folder, seed):
    simulate(tmp_path, tiny_model_folder, 60, seed)
