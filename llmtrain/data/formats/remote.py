"""Fetching files from where they are: object stores, http, or a folder treated as remote."""

from __future__ import annotations

import errno
import importlib
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlparse

from llmtrain.data.streaming import import_streaming
from llmtrain.errors import DataError, EnvironmentFault

TRIES = 4
FIRST_WAIT = 0.5  # seconds before the second try, doubled each time
TIMEOUT = 60.0
MARKER = "remote:"
_BLOCK = 1 << 20
_LOCAL = threading.local()


def is_remote(path: str) -> bool:
    """Whether ``path`` is an address (``s3://``, ``https://``, ``file://``, ``remote:DIR``)."""
    return "://" in path or path.startswith(MARKER)


def join(address: str, name: str) -> str:
    """Address of a file in the folder ``address``."""
    return f"{address.rstrip('/')}/{name}"


def fetch(address: str, target: Path) -> None:
    """Copies one remote file to ``target``, trying again when the network fails.

    http and https are read here; everything else goes through the storage layer of
    mosaicml-streaming (s3, gs, oci, azure, hf, sftp ...), ``file://`` and ``remote:`` too.

    Raises FileNotFoundError when there is no such file, DataError when it cannot be had,
    EnvironmentFault when a package for this kind of address is missing.
    """
    wait = FIRST_WAIT
    for attempt in range(1, TRIES + 1):
        target.unlink(missing_ok=True)
        try:
            _fetch_once(address, target)
            return
        except (EnvironmentFault, FileNotFoundError, DataError):
            raise
        except ImportError as error:
            raise EnvironmentFault(
                f"{address} needs the package {error.name or error}: run "
                f"`pip install {error.name or 'that package'}`"
            ) from error
        except Exception as error:  # every store has its own exceptions
            if _own_disk(error, target):
                raise
            if _says_absent(error):
                raise FileNotFoundError(_absent(address)) from error
            if attempt == TRIES:
                raise DataError(
                    f"cannot fetch {address}: {_reason(error)} ({TRIES} tries): check the "
                    "address, the credentials and the network"
                ) from error
        time.sleep(wait)
        wait *= 2


def _fetch_once(address: str, target: Path) -> None:
    """One try; lets the store's exceptions through."""
    if address.startswith(("http://", "https://")):
        _fetch_http(address, target)
        return
    if address.startswith(MARKER):
        scheme, address = "", address[len(MARKER) :]
    else:
        scheme = urlparse(address).scheme
    if scheme == "file":
        scheme, address = "", unquote(urlparse(address).path)
    _downloader(scheme, address).download(address, str(target), TIMEOUT)


def _fetch_http(address: str, target: Path) -> None:
    """GET with a check of the length, since a broken connection can look like an end."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response, target.open("wb") as out:
            expected = response.headers.get("Content-Length")
            while block := response.read(_BLOCK):
                out.write(block)
            if expected is not None and out.tell() != int(expected):
                raise ConnectionError(f"connection closed after {out.tell()} of {expected} bytes")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404, 410):
            raise FileNotFoundError(_absent(address)) from error
        raise


def _downloader(scheme: str, address: str) -> Any:
    """A downloader of mosaicml-streaming's, kept per thread: their clients are not all shareable.

    A child after a fork makes its own, since connections cannot be shared with the parent.
    """
    kept = cast("dict[tuple[int, str], Any]", _LOCAL.__dict__.setdefault("downloaders", {}))
    key = (os.getpid(), scheme)
    if key not in kept:
        import_streaming()
        storage = importlib.import_module("streaming.base.storage")
        try:
            kept[key] = storage.CloudDownloader.get(address)
        except ValueError as error:
            raise DataError(
                f"{address}: mosaicml-streaming knows no store {scheme!r}: "
                "use s3://, gs://, https:// or a local folder"
            ) from error
    return kept[key]


def _own_disk(error: Exception, target: Path) -> bool:
    """Whether writing the target failed, rather than reading the store."""
    return isinstance(error, OSError) and (
        error.errno in (errno.ENOSPC, errno.EDQUOT)
        or str(error.filename or "").startswith(str(target))
    )


def _absent(address: str) -> str:
    return f"{address} does not exist, or these credentials may not read it"


def _says_absent(error: Exception) -> bool:
    """Whether a store's exception means that there is no such object to read.

    Stores answer "forbidden" for absent objects to those who may not list the folder.
    """
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("403", "404", "AccessDenied", "NoSuchKey") or type(error).__name__ in (
        "NotFound",
        "EntryNotFoundError",
        "ResourceNotFoundError",
    )


def _reason(error: Exception) -> str:
    """The first line of an exception."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
