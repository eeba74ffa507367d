"""A folder of an object store, through fsspec; every call to it is tried again when it fails."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.checkpoint.layout import parse_step
from llmtrain.errors import CheckpointError, EnvironmentFault

# Without this file a folder counts for nothing.
COMPLETE = "COMPLETE"
TRIES, FIRST_WAIT = 5, 1.0
T = TypeVar("T")


class Objects:
    """What lies under ``address/name``; folders there are one deep, their files have plain names.

    address: any fsspec address; credentials come from the environment alone. wait: called with the
    seconds before another try. Raises EnvironmentFault where the package for such addresses is
    missing or the address holds a password; the methods raise CheckpointError.
    """

    def __init__(self, address: str, name: str, wait: Callable[[float], None] = time.sleep) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        if _holds_secret(address):
            raise EnvironmentFault(
                "checkpoint.remote: the address holds a user, a password or a token, which would "
                "end up in logs and configs; give credentials by the environment"
            )
        if not address.strip():
            raise EnvironmentFault("checkpoint.remote: is empty; give an address, or null")
        try:
            self.fs, root = url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise EnvironmentFault(
                f"checkpoint.remote: {address.partition('://')[0]} addresses cannot be used "
                f"({error}); install the fsspec package for them, such as s3fs or gcsfs"
            ) from error
        if isinstance(self.fs, LocalFileSystem):  # a folder that other machines have too
            self.fs.auto_mkdir = True
        self.address, self._wait = address, wait
        self._root = f"{root.rstrip('/')}/{name}"

    def again(self, what: str, action: Callable[[], T]) -> T:
        """``action``, tried again with growing pauses; CheckpointError when it keeps failing."""
        pause = FIRST_WAIT
        for attempt in range(1, TRIES + 1):
            try:
                return action()
            except Exception as error:  # every store has its own exceptions
                if attempt == TRIES:
                    raise CheckpointError(
                        f"{what}: {self.address} failed {TRIES} times, the last time with "
                        f"{type(error).__name__}: {error}"
                    ) from error
            self._wait(pause * random.uniform(0.5, 1.0))
            pause *= 2
        raise AssertionError

    def folders(self) -> list[str]:
        """Names of the folders, in no order."""

        def look() -> list[str]:
            self.fs.invalidate_cache()
            if not self.fs.exists(self._root):
                return []
            found = self.fs.ls(self._root, detail=False)
            return [str(path).rstrip("/").rpartition("/")[2] for path in found]

        return self.again("the copies cannot be listed", look)

    def put(self, source: Path, name: str, what: str) -> None:
        """Copy a file of this machine to ``name``."""
        self.again(what, partial(self.fs.put_file, str(source), f"{self._root}/{name}"))

    def get(self, name: str, target: Path, what: str) -> bool:
        """Copy ``name`` to a file of this machine; False where it is not there."""
        where = f"{self._root}/{name}"
        try:
            self.again(what, partial(self.fs.get_file, where, str(target)))
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def complete(self, folder: str, marker: dict[str, Any], what: str) -> None:
        """Write the marker that makes a folder count."""
        data, where = json.dumps(marker).encode(), f"{self._root}/{folder}/{COMPLETE}"
        self.again(what, lambda: self.fs.pipe_file(where, data))

    def marker(self, folder: str) -> dict[str, Any] | None:
        """What a folder's marker says; None without one, or where it is not as we write it."""

        def look() -> bytes | None:
            try:
                return bytes(self.fs.cat_file(f"{self._root}/{folder}/{COMPLETE}"))
            except FileNotFoundError:
                return None

        text = self.again(f"the marker of {folder} cannot be read", look)
        return None if text is None else _parsed(text)

    def steps(self) -> list[int]:
        """Steps of complete copies, oldest first."""
        return sorted(self.markers())

    def markers(self) -> dict[int, dict[str, Any]]:
        """Step -> marker of the steps' folders that are complete."""
        found: dict[int, dict[str, Any]] = {}
        for name in self.folders():
            step = parse_step(name)
            marker = None if step is None else self.marker(name)
            if step is not None and marker is not None:
                found[step] = marker
        return found

    def forget(self, folder: str, what: str) -> None:
        """Remove a folder, its marker before the rest."""
        where = f"{self._root}/{folder}"

        def remove() -> None:
            self.fs.invalidate_cache()
            if not self.fs.exists(where):
                return
            if self.fs.exists(f"{where}/{COMPLETE}"):
                self.fs.rm_file(f"{where}/{COMPLETE}")
            self.fs.rm(where, recursive=True)

        self.again(what, remove)


def _holds_secret(address: str) -> bool:
    """Whether an address has a user or a query, where passwords and tokens are written.

    In Azure's container@account.host the container is no user.
    """
    scheme, _, rest = address.partition("://")
    place = rest.partition("/")[0]
    azure = scheme in ("abfs", "abfss") and ":" not in place
    return "?" in address or ("@" in place and not azure)


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A marker; None where it is not as we write it, as if it were not there."""
    try:
        marker = json.loads(text)
        files, permanent = marker["files"], marker["permanent"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    base, life = marker.get("base"), marker.get("life")
    good = isinstance(files, list) and all(isinstance(name, str) for name in files)
    good &= base is None or (isinstance(base, str) and re.fullmatch("[0-9a-f]+", base) is not None)
    facts = {"files": files, "permanent": bool(permanent), "life": life, "base": base}
    return facts if good else None
