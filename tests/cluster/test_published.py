"""A store's documents, given to a clustering, are those of its published version."""

import pytest
from tiny_stores import change, finish, numbered, publish_first

from cluster.vectors import Columns, open_vectors, read_blocks
from pipelines.runtime.errors import InputError
from pipelines.store.documents import Documents
from pipelines.store.store import Store


def ids_of(source):
    blocks = [block for shard in source.shards for block in read_blocks(source, shard)]
    return sorted(value for block in blocks for value in block.ids.to_pylist())


@pytest.fixture
def store(tmp_path):
    (tmp_path / "files").mkdir()
    store = Store.open_or_create(str(tmp_path / "store"))
    publish_first(store, tmp_path / "files", numbered(range(8)))
    return store


@pytest.mark.parametrize("address", ["{}", "{}/documents.lance"])
def test_a_refused_or_unfinished_night_is_not_read(store, address):
    with store.take_lease("test") as lease:
        refused = store.begin(lease)
        change(refused, numbered(range(8, 12)), deleted=["d0"])
        finish(refused, reasons=["too many new ones"])
        change(store.begin(lease), numbered(range(20, 22)))
    source = open_vectors(address.format(store.uri), Columns())
    assert ids_of(source) == sorted(numbered(range(8)))


def test_a_night_that_is_published_while_another_reads_changes_nothing(store):
    source = open_vectors(store.uri, Columns())
    with store.take_lease("test") as lease:
        candidate = store.begin(lease)
        change(candidate, {"d1": "changed", "d9": "new"}, deleted=["d0"])
        version = finish(candidate)
        store.publish(version.number, lease, expected=candidate.base.number)
    assert ids_of(source) == sorted(numbered(range(8)))
    assert ids_of(open_vectors(store.uri, Columns())) == [f"d{n}" for n in (*range(1, 8), 9)]


def test_a_store_that_has_published_nothing_is_refused(tmp_path):
    (tmp_path / "files").mkdir()
    store = Store.open_or_create(str(tmp_path / "store"))
    publish_first(store, tmp_path / "files", numbered(range(4)))
    Documents.open(store.documents_address).untag("published")
    with pytest.raises(InputError, match="has published no version yet"):
        open_vectors(store.uri, Columns())
