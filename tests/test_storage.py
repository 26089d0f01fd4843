from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipelines.errors import InputError
from pipelines.storage import (
    exists,
    join,
    list_files,
    open_filesystem,
    read_bytes,
    shoal_home,
    write_bytes,
)


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filesystem, inner = open_filesystem("folder/file")
    assert isinstance(filesystem, pafs.LocalFileSystem)
    assert inner == str(tmp_path / "folder" / "file")


def test_written_bytes_are_read_back_and_listed(tmp_path):
    path = join(str(tmp_path), "a", "b.txt")
    write_bytes(path, b"first")
    write_bytes(path, b"second")
    assert exists(path)
    assert read_bytes(path) == b"second"
    assert list_files(str(tmp_path)) == ["a/b.txt"]


def test_listing_a_missing_folder_is_empty(tmp_path):
    assert list_files(str(tmp_path / "missing")) == []


def test_unknown_scheme_is_an_input_error():
    with pytest.raises(InputError, match="cannot open 'nosuch://bucket/key'"):
        open_filesystem("nosuch://bucket/key")


def test_shoal_home_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    assert shoal_home() == tmp_path
    monkeypatch.delenv("SHOAL_HOME")
    assert shoal_home() == Path.home() / ".cache" / "shoal"
