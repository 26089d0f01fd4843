"""Paths, local or remote, as pyarrow filesystems; files appear whole or not at all.

Writing goes through :func:`write_bytes` or :func:`atomic_output`: locally a hidden temporary file
that is renamed, remotely one upload of finished content. (Leaving pyarrow's own remote stream on
an exception completes the upload: a half file that looks whole.)

A remote store that has trouble for a while is asked again, for some minutes. Who asks depends on
who knows the kind of the trouble. pyarrow raises a bare ``OSError`` for whatever S3 answers but a
missing key, be it a refused right or a lost connection, so there its client does it, by the codes
that it sees (:data:`_S3_ATTEMPTS`). What comes through fsspec raises ``ConnectionError`` and
``TimeoutError``, and is asked again here. Nothing on a local disk is.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.runtime.errors import InputError, StorageError

log = logging.getLogger(__name__)

RETRY_SECONDS = 300.0
_REREADS = 3
_ANSWER_BYTES = 4096
"""More than a store says when it is busy: a shorter read is not asked again by its client."""
_LONGEST_PAUSE_SECONDS = 20.0
_PARALLEL_REQUESTS = 16
_S3_ATTEMPTS = 20
"""With the pauses of the client, which double up to 20 s, about :data:`RETRY_SECONDS`."""
_S3_SETTINGS = {"endpoint_override", "scheme", "region"}
_PATIENCE_SECONDS = 30.0

_MARKS = ("blob_id", "ETag", "etag", "Content-MD5")
_OPTIONS = re.compile(r"\?\w+=[^&]*(&\w+=[^&]*)*$")

Item = TypeVar("Item")
Result = TypeVar("Result")


def shoal_home() -> Path:
    """Folder of models, demo data and default outputs: ``$SHOAL_HOME`` or ``~/.cache/shoal``."""
    return Path(os.environ.get("SHOAL_HOME") or "~/.cache/shoal").expanduser().absolute()


def default_output(job: str) -> str:
    """Where a job writes when no ``--output`` is given."""
    return str(shoal_home() / "outputs" / job)


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that holds ``path``, and the path inside it.

    Local paths may be relative and may start with ``~``. ``s3://`` and ``gs://`` are pyarrow's
    own, ``hf://`` and whatever else fsspec knows come through fsspec. Credentials come from each
    service's usual chain (environment, configuration files, instance role). An address may end
    in options, such as ``?endpoint_override=host:port&scheme=http``.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        if scheme in ("s3", "gs", "gcs"):
            inner, options = split_options(rest)
            return _open_bucket(scheme, inner.split("/")[0], options), inner
        if scheme == "file" and rest.startswith("/"):
            return pafs.LocalFileSystem(), unquote(rest)  # as it stands, but for %20 and the like
        if scheme in ("file", "hf", "abfs", "hdfs"):
            return pafs.FileSystem.from_uri(path)
        filesystem, inner = fsspec.core.url_to_fs(path)
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner
    except StorageError:
        raise
    except (OSError, ValueError, ImportError) as error:
        # asked for a bucket's region, S3 says no more of its trouble than that there is one
        kind = StorageError if type(error) is OSError and scheme == "s3" else InputError
        raise kind(
            f"cannot open {path!r}: {first_line(error)}. Check the {scheme}:// address, "
            "the network and the credentials"
        ) from error


def state_mark(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> int | str | None:
    """What is another once a file is: its time of change in nanoseconds, or its service's own mark.

    None where the filesystem tells neither.
    """
    if info.mtime_ns is not None or not isinstance(filesystem, pafs.PyFileSystem):
        return info.mtime_ns
    about = filesystem.handler.fs.info(info.path)
    return next((str(about[name]) for name in _MARKS if about.get(name)), None)


def join(folder: str, *parts: str) -> str:
    """``folder/part/part``, for local paths and URIs alike."""
    base, options = split_options(folder) if "://" in folder else (folder, "")
    return "/".join([base.rstrip("/"), *parts]) + options


def with_inner_path(address: str, inner: str) -> str:
    """The address of ``inner`` on the filesystem that holds ``address``."""
    scheme, separator, rest = address.partition("://")
    if scheme == "file" and separator:
        return f"file://{quote(inner)}"
    return f"{scheme}://{inner}{split_options(rest)[1]}" if separator else inner


@functools.lru_cache(maxsize=64)
def _open_bucket(scheme: str, bucket: str, options: str) -> pafs.FileSystem:
    """A client for one bucket; it may cost a request to find the bucket's region."""
    address = f"{scheme}://{bucket}{options}"
    filesystem, _ = pafs.FileSystem.from_uri(address)
    if scheme != "s3" or not dict(parse_qsl(options[1:])).keys() <= _S3_SETTINGS:
        return filesystem
    # made anew for its patience; the constructor reads no endpoint from the environment
    protocol, _, endpoint = s3_settings(address).get("endpoint", "").rpartition("://")
    return pafs.S3FileSystem(
        region=filesystem.region,
        scheme=protocol or "https",
        endpoint_override=endpoint or None,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
    )


def split_options(address: str) -> tuple[str, str]:
    """An address without its options, and the options with their ``?``; a local file has none."""
    found = None if address.startswith("file://") else _OPTIONS.search(address)
    return (address[: found.start()], found.group()) if found else (address, "")


def exists(path: str) -> bool:
    """Whether a file or folder is at ``path``."""
    filesystem, inner = open_filesystem(path)
    info = with_retries(lambda: filesystem.get_file_info(inner), path)
    return info.type != pafs.FileType.NotFound


def list_files(folder: str) -> list[str]:
    """Every file below ``folder`` as a path relative to it, sorted; empty where there is none."""
    filesystem, inner = open_filesystem(folder)
    selector = pafs.FileSelector(inner, recursive=True, allow_not_found=True)
    prefix = inner.rstrip("/") + "/"
    return sorted(
        info.path.removeprefix(prefix)
        for info in with_retries(lambda: filesystem.get_file_info(selector), folder)
        if info.type == pafs.FileType.File
    )


def make_folder(folder: str) -> None:
    """Create ``folder`` and its parents on a local disk; object stores need none."""
    filesystem, inner = open_filesystem(folder)
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(inner).mkdir(parents=True, exist_ok=True)


def remove_folder(folder: str) -> None:
    """Delete ``folder`` and all below it, if it is there."""
    filesystem, inner = open_filesystem(folder)
    info = with_retries(lambda: filesystem.get_file_info(inner), folder)
    if info.type == pafs.FileType.Directory:
        with_retries(lambda: filesystem.delete_dir(inner), folder)


def remove_files(paths: list[str]) -> None:
    """Delete files that exist, several at a time."""

    def remove(path: str) -> None:
        filesystem, inner = open_filesystem(path)
        with_retries(lambda: filesystem.delete_file(inner), path)

    in_threads(remove, paths)


def read_bytes(path: str) -> bytes:
    """The whole of a small file; ``FileNotFoundError`` where there is none."""
    filesystem, inner = open_filesystem(path)

    def read() -> bytes:
        with filesystem.open_input_stream(inner) as stream:
            return stream.read()

    return with_retries(read, path, reads=True)


def write_bytes(path: str, data: bytes | pa.Buffer, *, create_folder: bool = True) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    With ``create_folder=False`` a missing folder is an error: workers use it, so that a folder
    that only the driver's machine has is noticed.
    """
    filesystem, inner = open_filesystem(path)
    if isinstance(filesystem, pafs.LocalFileSystem):
        if create_folder:
            Path(inner).parent.mkdir(parents=True, exist_ok=True)
        with _local_output(inner) as stream:
            stream.write(data)
        return

    def upload() -> None:
        with filesystem.open_output_stream(inner) as stream:
            stream.write(data)

    with_retries(upload, path)


@contextlib.contextmanager
def atomic_output(path: str) -> Iterator[pa.NativeFile]:
    """A stream to write a file to; the file appears when the block ends without an error.

    Remote content is held in memory until then, so it should be a file of moderate size.
    """
    filesystem, inner = open_filesystem(path)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _local_output(inner) as stream:
            yield stream
        return
    sink = pa.BufferOutputStream()
    yield sink
    write_bytes(path, sink.getvalue())


def json_bytes(content: Any, *, default: Callable[[Any], Any] | None = None) -> bytes:
    """JSON that people can read too, as the content of a file."""
    return (json.dumps(content, indent=2, ensure_ascii=False, default=default) + "\n").encode()


def write_table(path: str, table: pa.Table) -> None:
    """Write a table as one Parquet file, whole or not at all."""
    with atomic_output(path) as stream:
        pq.write_table(table, stream)


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of one Parquet file, all by default."""
    filesystem, inner = open_filesystem(path)
    names = None if columns is None else list(columns)
    return with_retries(
        lambda: pq.ParquetFile(inner, filesystem=filesystem).read(columns=names), path, reads=True
    )


def with_retries(
    action: Callable[[], Result],
    path: str,
    *,
    seconds: float = RETRY_SECONDS,
    reads: bool = False,
    decodes: bool = False,
) -> Result:
    """The result of ``action``, which asks for ``path``, while a remote store may yet answer.

    With ``reads`` the action reads the file, and is taken again where the store gives the bytes
    after all: a client of S3 does not ask again for a part that is shorter than the store's answer
    that it is busy. With ``decodes`` it makes sense of the content too, so that what it raises
    again is the file's own fault.

    Raises :class:`StorageError` where the store's trouble lasts or is none that passes; any other
    error as it is.
    """
    deadline = time.monotonic() + seconds
    pause, rereads = 0.5, 0
    while True:
        try:
            with _waiting_is_told(path):
                return action()
        except (ConnectionError, TimeoutError) as error:
            if time.monotonic() + pause > deadline:
                raise _lasting_trouble(path, error) from error
            log.warning("%s: %s; asking again in %.1f s", path, first_line(error), pause)
        except OSError as error:
            if not _may_be_of_store(path, error):
                raise
            if reads or decodes:
                check_store(path, error)
            if decodes and rereads == _REREADS:
                raise
            if not (reads or decodes) or rereads == _REREADS:
                raise _lasting_trouble(path, error) from error
            rereads += 1
        time.sleep(pause * random.uniform(0.7, 1.3))
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


def check_store(path: str, error: BaseException) -> None:
    """Raise :class:`StorageError` if ``error``, met in reading ``path``, is its store's fault.

    A damaged file and a store that does not answer raise the same kind, so the store is asked.
    """
    if isinstance(error, StorageError):
        raise error
    if not isinstance(error, OSError) or not _may_be_of_store(path, error):
        return
    filesystem, inner = open_filesystem(path)
    try:
        with filesystem.open_input_file(inner) as stream:  # here its client waits for it
            for _ in range(_REREADS):
                with contextlib.suppress(OSError):
                    stream.read_at(_ANSWER_BYTES, max(0, stream.size() - _ANSWER_BYTES))
                    return
            stream.read_at(_ANSWER_BYTES, max(0, stream.size() - _ANSWER_BYTES))
    except FileNotFoundError:
        return
    except OSError as trouble:
        raise _lasting_trouble(path, trouble) from error


_SPECIAL = (StorageError, FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)


def _may_be_of_store(path: str, error: OSError) -> bool:
    """Whether a remote store raised what has no more special kind than that."""
    remote = "://" in path and not path.startswith("file://")
    return remote and error.errno is None and not isinstance(error, _SPECIAL)


def _lasting_trouble(path: str, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: {first_line(error)}. Check the network and the credentials, and run the same "
        "command again: it goes on from here"
    )


@contextlib.contextmanager
def _waiting_is_told(path: str) -> Iterator[None]:
    """Log that a remote store lets one wait, which its client does not."""
    if "://" not in path:
        yield
        return
    told = "%s has not answered for %.0f s; still asking"
    timer = threading.Timer(_PATIENCE_SECONDS, log.warning, (told, path, _PATIENCE_SECONDS))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def in_threads(
    function: Callable[[Item], Result], items: list[Item], *, at_once: int = _PARALLEL_REQUESTS
) -> list[Result]:
    """``function`` of every item, in order, ``at_once`` at a time: for many small requests."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def _local_output(inner: str) -> Iterator[Any]:
    target = Path(inner)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise StorageError(
                f"no room to write {inner}: {error.strerror}. Make room and run the same command "
                "again: what is written stays"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its type's name without one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def create_exclusively(path: str, data: bytes) -> bool:
    """Create a file with its whole content; False, and nothing changed, where one exists.

    Locally a hard link to a finished file, on S3 a conditional put (``If-None-Match``).
    """
    if "://" not in path:
        return _link_local(path, data)
    if not path.startswith("s3://"):
        raise InputError(f"{path}: a store is a local folder or an s3:// address")
    filesystem, key = _s3_filesystem(path)
    try:
        filesystem.pipe_file(key, data, mode="create")
    except FileExistsError:
        # Its own first attempt may have arrived and only the answer been lost.
        return read_bytes(path) == data
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(
            f"cannot write {path}: {error}. Check that the bucket exists and the credentials may "
            "write to it"
        ) from error
    return True


def numbered_file(folder: str, number: int) -> str:
    """The file of a number, for :func:`create_exclusively`: who creates it has the number."""
    return join(folder, f"{number:08d}.json")


def list_numbered(folder: str) -> dict[int, str]:
    """The files that :func:`numbered_file` names, by their rising numbers."""
    names = [name.removesuffix(".json") for name in list_files(folder) if name.endswith(".json")]
    numbers = sorted(int(name) for name in names if name.isdigit())
    return {number: numbered_file(folder, number) for number in numbers}


def _link_local(path: str, data: bytes) -> bool:
    target = Path(open_filesystem(path)[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def s3_settings(address: str) -> dict[str, str]:
    """``endpoint`` and ``region`` of an ``s3://`` address: its options, else the environment's.

    Clients of S3 differ in which of these variables they read; here all are told the same.
    """
    options = dict(parse_qsl(address.partition("?")[2]))
    found = {}
    if endpoint := options.get("endpoint_override"):
        has_scheme = "://" in endpoint
        scheme = options.get("scheme", "https")
        found["endpoint"] = endpoint if has_scheme else f"{scheme}://{endpoint}"
    elif variables := [os.environ[name] for name in _S3_ENDPOINTS if os.environ.get(name)]:
        found["endpoint"] = variables[0]
    if region := options.get("region"):
        found["region"] = region
    return found


def _s3_filesystem(address: str) -> tuple[Any, str]:
    try:
        import s3fs
    except ImportError as error:
        raise InputError(f"{address}: a store on S3 needs s3fs: pip install 'shoal[s3]'") from error
    settings = s3_settings(address)
    client = {"region_name": settings["region"]} if "region" in settings else {}
    filesystem = s3fs.S3FileSystem(
        endpoint_url=settings.get("endpoint"), client_kwargs=client, use_listings_cache=False
    )
    return filesystem, open_filesystem(address)[1]
