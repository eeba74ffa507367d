"""Memory maps: opening one file, and a bound on how many are open in the process."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import DataError


def map_file(path: Path, dtype: np.dtype[Any], *, offset: int = 0, count: int = -1) -> NDArray[Any]:
    """``count`` items of ``dtype`` from byte ``offset`` of a file, as a read-only mapped array.

    A plain array over the map, not ``np.memmap``: slicing the subclass costs more than copying
    a window. The map lives as long as an array over it does. The array may be unaligned.

    Raises FileNotFoundError when the file is gone, DataError when it cannot be mapped.
    """
    if count == 0:
        return np.empty(0, dtype)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        view = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = "it is empty" if isinstance(error, ValueError) else error.strerror
        if isinstance(error, OSError) and error.errno == errno.ENODEV:
            reason = "its file system has no memory maps: copy it to a local disk"
        raise DataError(f"cannot map {path}: {reason}") from error
    finally:
        os.close(descriptor)
    return np.frombuffer(view, dtype, count=count, offset=offset)


class MapOwner(Protocol):
    """Something that keeps maps and can drop one of them."""

    def drop(self, part: int) -> None:
        """Forget the map of ``part``; the next access opens it again."""
        ...


class MapPool:
    """Bounds the number of open maps over all sources: the one opened first goes first.

    Access is random, so age of opening is as good a rule as age of use, and it costs the reader
    nothing. A map costs a file descriptor; the bound follows the limit of the process.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[tuple[int, int], weakref.ref[Any]] = OrderedDict()
        self._lock = threading.Lock()
        _reset_after_fork(self, lambda pool: setattr(pool, "_lock", threading.Lock()))

    def __len__(self) -> int:
        return len(self._open)

    def add(self, owner: MapOwner, part: int) -> None:
        """Notes a map that was just opened and drops the oldest ones beyond the bound."""
        dropped = []
        with self._lock:
            self._open[id(owner), part] = weakref.ref(owner)
            while len(self._open) > self.limit:
                dropped.append(self._open.popitem(last=False))
        for (_, old), reference in dropped:
            target = reference()
            if target is not None:
                target.drop(old)

    def remove(self, owner: MapOwner, part: int) -> None:
        """Notes that the owner has dropped a map itself."""
        with self._lock:
            self._open.pop((id(owner), part), None)


def _reset_after_fork(item: MapPool, reset: Callable[[MapPool], None]) -> None:
    """Calls ``reset(item)`` in every child: a lock held in the parent would never be released."""
    reference = weakref.ref(item)

    def in_child() -> None:
        alive = reference()
        if alive is not None:
            reset(alive)

    os.register_at_fork(after_in_child=in_child)


def _descriptors() -> int:
    """A quarter of the descriptors this process may have, the rest is for everybody else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(32, min(4096, soft // 4))


POOL = MapPool(_descriptors())
