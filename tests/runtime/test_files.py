import resource
import threading
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipelines.runtime import files as storage
from pipelines.runtime.errors import InputError, StorageError
from pipelines.runtime.files import (
    atomic_output,
    create_exclusively,
    exists,
    first_line,
    join,
    list_files,
    list_numbered,
    numbered_file,
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


def test_numbered_files_are_listed_by_their_numbers(tmp_path):
    folder = str(tmp_path / "journal")
    assert list_numbered(folder) == {}
    for number in (10, 9, 100_000_001):
        assert create_exclusively(numbered_file(folder, number), b"{}")
    write_bytes(join(folder, "notes.json"), b"{}")
    write_bytes(join(folder, "00000011.tmp"), b"{}")
    assert list(list_numbered(folder)) == [9, 10, 100_000_001]
    assert not create_exclusively(numbered_file(folder, 9), b"other")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_every_error_has_a_first_line(error, line):
    assert first_line(error) == line


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


def test_the_address_of_a_local_file_can_hold_any_mark(tmp_path):
    for name in ("plain", "a b", "100%", "x%2Fy", "no#1", "what?", "a?b=c"):
        address = f"file://{tmp_path}/{name}"
        if name != "x%2Fy":  # as it stands
            assert open_filesystem(address)[1] == f"{tmp_path}/{name}"
        quoted = with_inner_path(address, f"{tmp_path}/{name}")
        assert open_filesystem(quoted)[1] == f"{tmp_path}/{name}"
        write_bytes(join(quoted, "b.txt"), b"x")
        assert (tmp_path / name / "b.txt").read_bytes() == b"x"
    assert open_filesystem("file:///a%20b")[1] == "/a b"


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


def test_passing_trouble_of_a_kind_is_retried_and_lasting_trouble_told(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    answers = iter([ConnectionResetError("later"), TimeoutError("later"), "done"])

    def action():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert with_retries(action, "hf://bucket/key") == "done"

    def down():
        raise ConnectionRefusedError("nobody there")

    with pytest.raises(StorageError, match="run the same command again"):
        with_retries(down, "hf://bucket/key", seconds=0.0)


@pytest.mark.parametrize("name", ["connections", "timeout", "AWS Error curlCode timed out"])
def test_a_local_disk_is_asked_once_whatever_its_folders_are_called(tmp_path, monkeypatch, name):
    monkeypatch.setattr(storage.time, "sleep", lambda _: pytest.fail("asked again"))
    with pytest.raises(FileNotFoundError):
        read_bytes(str(tmp_path / name / "plan.json"))
    with pytest.raises(NotADirectoryError):
        (tmp_path / name).touch()
        list_files(str(tmp_path / name))


class FlakyStore:
    """A real S3 API server that answers some requests with an error."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.application = DomainDispatcherApplication(create_backend_app)
        self.answers: list[tuple[int, str]] = []
        self.forever: tuple[int, str] | None = None
        self.requests = 0
        self.busy_reads = 0
        """How many parts of objects are not given before one is."""
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, environ, start_response):
        self.requests += 1
        status, code = self.forever or (self.answers.pop(0) if self.answers else (200, ""))
        if self.busy_reads and environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
            self.busy_reads -= 1
            status, code = 503, "SlowDown"
        if not code:
            return self.application(environ, start_response)
        start_response(f"{status} Error", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]


@pytest.fixture
def flaky(monkeypatch):
    import boto3

    monkeypatch.setattr(storage, "_S3_ATTEMPTS", 3)
    storage._open_bucket.cache_clear()
    server = FlakyStore()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server.port}")
    boto3.client("s3").create_bucket(Bucket="shoal-flaky")
    write_bytes("s3://shoal-flaky/a.parquet", b"not parquet at all")
    server.requests = 0
    yield server
    server.server.shutdown()
    server.server.server_close()
    storage._open_bucket.cache_clear()


def test_s3_is_asked_again_where_it_is_busy(flaky):
    flaky.answers = [(503, "SlowDown"), (500, "InternalError")]
    assert read_bytes("s3://shoal-flaky/a.parquet") == b"not parquet at all"
    assert not flaky.answers


@pytest.mark.parametrize(
    ("status", "code", "requests"), [(403, "AccessDenied", 2), (503, "SlowDown", 6)]
)
def test_s3_that_refuses_is_told_at_once_and_one_that_stays_busy_at_last(
    flaky, status, code, requests
):
    flaky.forever = (status, code)
    with pytest.raises(StorageError, match="Check the network and the credentials"):
        read_bytes("s3://shoal-flaky/a.parquet")
    assert flaky.requests == requests


def test_a_file_shorter_than_the_answer_of_a_busy_store_is_read_again(flaky):
    flaky.busy_reads = 2  # pyarrow's client gives up at once: the answer does not fit in its buffer
    assert read_bytes("s3://shoal-flaky/a.parquet") == b"not parquet at all"
    assert flaky.busy_reads == 0


def test_a_key_that_is_not_there_is_asked_for_once(flaky):
    with pytest.raises(FileNotFoundError):
        read_bytes("s3://shoal-flaky/nothing.json")
    assert flaky.requests == 1


def test_a_header_that_s3_does_not_give_is_not_the_users_damaged_file(flaky):
    from cluster.vectors import Columns as VectorColumns
    from cluster.vectors import open_vectors
    from pipelines.corpus.files import Columns, find_files
    from pipelines.corpus.readers import inspect_files

    address = "s3://shoal-flaky/a.parquet"
    files = find_files(address)
    (damaged,) = inspect_files(files, Columns(), shard_bytes=1 << 20)
    assert "cannot be read" in damaged.problem
    with pytest.raises(InputError, match="not a readable Parquet file"):
        open_vectors(address, VectorColumns())
    flaky.forever = (503, "SlowDown")
    with pytest.raises(StorageError, match="run the same command again"):
        inspect_files(files, Columns(), shard_bytes=1 << 20)
    with pytest.raises(StorageError, match="run the same command again"):
        open_vectors(address, VectorColumns())
