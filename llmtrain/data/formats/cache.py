"""A folder of shard files bounded in bytes, shared by the processes of a node."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from llmtrain.errors import DataError

_STRIPES = 16
_STALE_SECONDS = 3600.0


def default_cache_dir() -> Path:
    """``$LLMTRAIN_CACHE``, or ``llmtrain/shards`` in the user's cache folder."""
    if chosen := os.environ.get("LLMTRAIN_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmtrain" / "shards"


class ShardCache:
    """Files made on demand; those used longest ago are removed beyond ``limit`` bytes.

    A file appears by an atomic rename, so that what is there is complete. Locks are file locks:
    two processes that want the same file make it once, and the lock of a killed process is free.
    While a file is made it takes room besides the limit.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot make the shard cache {folder} ({error.strerror}): set the environment "
                "variable LLMTRAIN_CACHE to a folder that can be written"
            ) from error

    def path(self, name: str) -> Path:
        """Where the file is, or would be."""
        return self.folder / quote(name, safe="")

    def get(self, name: str, size: int, make: Callable[[Path], None]) -> Path:
        """Path of the file ``name`` of ``size`` bytes; ``make(path)`` writes it when it is absent.

        Another process may remove the file again before the caller opens it: then ask again.
        Raises DataError when the file cannot fit or the disk is full.
        """
        if size > self.limit:
            raise DataError(
                f"shard {name} has {size} bytes but cache_bytes of its source is {self.limit}: "
                "raise cache_bytes"
            )
        target = self.path(name)
        if self._touch(target):
            return target
        with self._locked(f".lock-{zlib.crc32(name.encode()) % _STRIPES:02d}"):
            if self._touch(target):
                return target
            self._evict(self.limit - size)
            part = self.folder / f".{target.name}.part"
            part.unlink(missing_ok=True)
            try:
                make(part)
                os.replace(part, target)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise
                raise DataError(
                    f"cannot write shard {name} to the cache {self.folder} ({error.strerror}): "
                    "make room, lower cache_bytes or set LLMTRAIN_CACHE to another folder"
                ) from error
            finally:
                part.unlink(missing_ok=True)
        self._evict(self.limit, keep=target)
        return target

    def _touch(self, path: Path) -> bool:
        """Marks a file as used now; False when it is absent."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _evict(self, limit: int, keep: Path | None = None) -> None:
        """Removes the files used longest ago until the rest has at most ``limit`` bytes."""
        with self._locked(".lock-evict"):
            files = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    state = entry.stat()
                    if entry.name.startswith("."):
                        self._remove_stale(entry, state.st_mtime)
                    else:
                        files.append((state.st_mtime_ns, state.st_size, entry.path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= limit:
                    break
                if keep is None or Path(path) != keep:
                    Path(path).unlink(missing_ok=True)
                    total -= size

    @staticmethod
    def _remove_stale(entry: os.DirEntry[str], modified: float) -> None:
        """Removes what a killed process left half made."""
        if ".part" in entry.name and time.time() - modified > _STALE_SECONDS:
            Path(entry.path).unlink(missing_ok=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds a file lock; it works between threads too, each opens the file for itself."""
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
