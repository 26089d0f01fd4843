"""Two versions side by side, on stores small enough to know the answer."""

import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_stores import (
    ENCODER,
    SCHEMA,
    finish,
    numbered,
    publish_first,
    publish_night,
    table_of,
    when,
)

from pipelines.runtime.arrow import FINGERPRINT_KEY
from pipelines.runtime.command import run_verbs
from pipelines.runtime.errors import InputError
from pipelines.store.compare import Side, compare
from pipelines.store.config import VERBS
from pipelines.store.manage import manage_store
from pipelines.store.store import Store

TEXTS = numbered(range(40))


@pytest.fixture
def store(tmp_path):
    store = Store.open_or_create(str(tmp_path / "store"))
    publish_first(store, tmp_path, TEXTS)
    return store


def of(store, old, new):
    return compare(Side.of(store.version(old)), Side.of(store.version(new)), sample=20, seed=0)


def by_id(version):
    return {row["id"]: row for batch in version.batches() for row in batch.to_pylist()}


def test_a_version_without_change_is_the_same_in_everything(store):
    publish_night(store, {"d1": TEXTS["d1"]})
    data = of(store, 1, 2)
    assert data["documents"] == {"both": 40, "only_old": 0, "only_new": 0}
    assert data["neighbours"]["overlap"] == 1.0
    assert data["neighbours"]["standard_error"] == 0.0
    assert data["clusters"]["share"] == 1.0
    assert data["moved"]["count"] == 0
    assert all(flow["old"] == flow["new"] for flow in data["clusters"]["matrix"])


def test_documents_that_moved_are_counted_with_their_reason(store):
    changed = {f"d{n}": f"second text {n}" for n in range(12)} | {"e1": "new text"}
    publish_night(store, changed, ["d39"])
    old, new = by_id(store.version(1)), by_id(store.version(2))
    moved = {n for n in old.keys() & new.keys() if old[n]["cluster_id"] != new[n]["cluster_id"]}
    data = of(store, 1, 2)
    assert data["documents"] == {"both": 39, "only_old": 1, "only_new": 1}
    assert data["moved"]["count"] == len(moved) > 0
    assert data["moved"]["reasons"] == {"edit": 0, "text": len(moved), "encoder": 0, "centroid": 0}
    assert {move["id"] for move in data["moved"]["first"]["text"]} == moved
    assert data["clusters"]["stayed"] == 39 - len(moved)
    assert 0 < data["neighbours"]["overlap"] < 1
    assert data["neighbours"]["standard_error"] > 0


def test_neighbours_are_those_of_exact_search(store):
    changed = {f"d{n}": f"second text {n}" for n in range(12)}
    publish_night(store, changed)
    shares = []
    for row_id in TEXTS:
        near = []
        for number in (1, 2):
            version = store.version(number)
            hits = version.search(_vector(version, row_id), 11, columns=["id"], exact=True)
            near.append({hit for hit in hits["id"].to_pylist() if hit != row_id})
        shares.append(len(near[0] & near[1]) / 10)
    data = compare(Side.of(store.version(1)), Side.of(store.version(2)), sample=40, seed=0)
    assert data["neighbours"]["overlap"] == pytest.approx(sum(shares) / 40)


def _vector(version, row_id):
    return np.array(by_id(version)[row_id]["embedding"], np.float32)


def test_another_encoder_is_the_reason_where_texts_are_the_same(store):
    other = replace(ENCODER, prompt="other {text}")
    schema = SCHEMA.with_metadata({FINGERPRINT_KEY: other.fingerprint.encode()})
    turned = table_of({n: text[::-1] for n, text in TEXTS.items()})
    table = table_of(TEXTS).set_column(4, "embedding", turned["embedding"])
    path = f"{store.uri}-again.parquet"
    pq.write_table(table, path)
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        candidate.replace([path], schema=schema, when=when(1))
        finish(candidate, other)
    data = of(store, 1, 2)
    assert not data["same_encoder"]
    assert data["moved"]["reasons"]["encoder"] == data["moved"]["count"] > 0
    assert data["neighbours"]["overlap"] < 0.6


def run(store, capsys, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["manage_store.py", "compare", "--store", store.uri, *flags])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        run_verbs("manage_store", VERBS, manage_store)
    return stop.value.code, *capsys.readouterr()


def test_the_verb_prints_a_table_json_and_a_page(store, tmp_path, capsys, monkeypatch):
    publish_night(store, {f"d{n}": f"<b>second {n}" for n in range(12)})
    page = tmp_path / "page.html"
    call = ("--version", "2", "--with", "1")
    code, out, _ = run(store, capsys, monkeypatch, *call, "--output", str(page))
    assert code == 0
    assert "same 10 nearest" in out
    assert "<table>" in page.read_text()
    code, out, _ = run(store, capsys, monkeypatch, *call, "--json")
    assert json.loads(out)["documents"]["both"] == 40
    code, _, err = run(store, capsys, monkeypatch, *call, "--output", str(page))
    assert (code, "is there already" in err) == (2, True)
    code, _, err = run(store, capsys, monkeypatch, "--version", "2")
    assert (code, "compared with itself" in err) == (2, True)


def test_ids_of_another_type_cannot_be_compared(store):
    old = Side.of(store.version(1))

    class Other:
        schema = SCHEMA.set(0, SCHEMA.field("id").with_type(pa.int64()))

    with pytest.raises(InputError, match="ids of different types"):
        compare(old, replace(old, documents=Other()), sample=5, seed=0)
