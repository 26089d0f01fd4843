import resource
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipelines.runtime import files as storage
from pipelines.runtime.errors import InputError, StorageError
from pipelines.runtime.files import (
    atomic_output,
    exists,
    join,
    list_files,
    match_files,
    open_filesystem,
    read_bytes,
    shoal_home,
    with_inner_path,
    with_retries,
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


def test_what_fsspec_knows_is_opened_too():
    write_bytes("memory://bucket/a.txt", b"kept in memory")
    assert read_bytes("memory://bucket/a.txt") == b"kept in memory"


def test_options_of_an_address_stay_at_its_end():
    address = "s3://bucket/folder?endpoint_override=127.0.0.1:9000&scheme=http"
    joined = join(address, "a", "b.txt")
    assert joined == "s3://bucket/folder/a/b.txt?endpoint_override=127.0.0.1:9000&scheme=http"
    assert with_inner_path(address, "bucket/x") == (
        "s3://bucket/x?endpoint_override=127.0.0.1:9000&scheme=http"
    )


def test_an_output_that_fails_half_way_leaves_nothing(tmp_path):
    path = str(tmp_path / "a.bin")
    with pytest.raises(ZeroDivisionError), atomic_output(path) as sink:
        sink.write(b"half")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_remote_output_that_fails_half_way_leaves_nothing(s3_server):
    s3_server.create_bucket(Bucket="shoal-storage")
    with pytest.raises(ZeroDivisionError), atomic_output("s3://shoal-storage/a.bin") as sink:
        sink.write(b"half" * 10_000_000)
        1 / 0  # noqa: B018
    assert list_files("s3://shoal-storage/") == []


def test_a_full_disk_is_one_clear_line(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(StorageError, match=r"no room to write .* run the same command again"):
            write_bytes(str(tmp_path / "a.bin"), b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_passing_trouble_is_retried_and_lasting_trouble_told(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    answers = iter([OSError("AWS Error SLOW_DOWN"), OSError("curlCode: 7"), "done"])

    def action():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert with_retries(action, "s3://bucket/key") == "done"

    def denied():
        raise OSError("AWS Error ACCESS_DENIED during PutObject")

    with pytest.raises(OSError, match="ACCESS_DENIED"):
        with_retries(denied, "s3://bucket/key")

    def down():
        raise OSError("AWS Error NETWORK_CONNECTION")

    with pytest.raises(StorageError, match="Run the same command again"):
        with_retries(down, "s3://bucket/key", seconds=0.0)


FILES = (
    "a.txt",
    "b.txt/part-0.txt",
    "b.txt/_SUCCESS",
    "b.txt/.part-0.txt.crc",
    "c/a.txt",
    "c/d/a.txt",
    "_work/a.txt",
    "[c]/e.txt",
    "x.lance/data/1.lance",
    "x.lance/_versions/1.manifest",
)
GLOBS = [
    ("*.txt", ["a.txt", "b.txt/part-0.txt"]),
    ("?.txt", ["a.txt", "b.txt/part-0.txt"]),
    ("*/a.txt", ["c/a.txt"]),
    ("**/a.txt", ["a.txt", "c/a.txt", "c/d/a.txt"]),
    ("c/**/*.txt", ["c/a.txt", "c/d/a.txt"]),
    ("c/**", ["c/a.txt", "c/d/a.txt"]),
    ("**/d/*", ["c/d/a.txt"]),
    ("[ab].txt", ["a.txt", "b.txt/part-0.txt"]),
    ("[!a].txt", ["b.txt/part-0.txt"]),
    ("[c]", ["[c]/e.txt"]),
    ("[c]/*.txt", ["[c]/e.txt"]),
    ("_*/*.txt", ["_work/a.txt"]),
    ("b.txt", ["b.txt/part-0.txt"]),
    ("c", ["c/a.txt", "c/d/a.txt"]),
    ("x.lance", ["x.lance"]),
    ("*.lance", ["x.lance"]),
    ("**/*.lance", ["x.lance"]),
    ("a.*/*", []),
    ("*.csv", []),
]


@pytest.mark.parametrize(("pattern", "matches"), GLOBS)
def test_a_glob_is_the_shells_and_searches_folders_that_it_matches(tmp_path, pattern, matches):
    for name in FILES:
        write_bytes(str(tmp_path / name), b"x")
    infos = match_files(f"{tmp_path}/{pattern}", datasets=(".lance",))
    assert [info.path.removeprefix(f"{tmp_path}/") for info in infos] == matches


def test_globs_on_s3_are_those_of_a_local_disk(s3_server):
    s3_server.create_bucket(Bucket="shoal-globs")
    for name in FILES:
        s3_server.put_object(Bucket="shoal-globs", Key=f"top/{name}", Body=b"x")
    for pattern, matches in GLOBS:
        infos = match_files(f"s3://shoal-globs/top/{pattern}", datasets=(".lance",))
        paths = [info.path.removeprefix("shoal-globs/top/") for info in infos]
        assert paths == matches, pattern


def test_a_folder_that_may_not_be_read_is_told_in_one_line(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "_search", refused)
    with pytest.raises(InputError, match=r"cannot list .*Permission denied"):
        match_files(str(tmp_path))
