"""Files that only one of several writers can create, on a local disk or on S3.

Everything that must happen once (taking a lease, numbering a publication) is a file created so.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from pipelines.errors import InputError
from pipelines.storage import open_filesystem, read_bytes

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
