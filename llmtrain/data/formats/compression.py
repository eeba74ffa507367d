"""Decompression of whole shards, with the algorithms that MDSWriter offers."""

from __future__ import annotations

import bz2
import gzip
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from llmtrain.errors import DataError, EnvironmentFault

# name in index.json: (module, package that brings it); both only work on whole buffers.
_WHOLE = {"br": ("brotli", "brotli"), "snappy": ("snappy", "python-snappy")}


# name in index.json: how to open such a file for reading
_OPENERS: dict[str, Callable[[Path], Any]] = {
    "zstd": zstandard.open,
    "gz": gzip.open,
    "bz2": bz2.open,
}


def decompress(algorithm: str, source: Path, target: Path) -> None:
    """Decompresses ``source`` into ``target``; ``algorithm`` as in index.json, e.g. ``zstd:7``.

    Raises DataError for a damaged file or an unknown algorithm, EnvironmentFault when the
    package for it is not installed.
    """
    name = algorithm.split(":", maxsplit=1)[0]
    try:
        if name in _OPENERS:
            with _OPENERS[name](source) as reader, target.open("wb") as plain:
                shutil.copyfileobj(reader, plain, 1 << 20)
        elif name in _WHOLE:
            target.write_bytes(_module(name).decompress(source.read_bytes()))
        else:
            raise DataError(
                f"shard {source} is compressed with {algorithm!r}, which is not known here: "
                "write the folder again with zstd"
            )
    except (DataError, EnvironmentFault):
        raise
    except OSError as error:
        if error.errno is not None:  # a full disk and the like: the caller knows what to say
            raise
        raise _damaged(source, name, error) from error
    except (EOFError, ValueError, zstandard.ZstdError, RuntimeError) as error:
        raise _damaged(source, name, error) from error


def _damaged(source: Path, name: str, error: Exception) -> DataError:
    return DataError(f"shard {source} is damaged ({name}: {error}): copy or prepare it again")


def _module(name: str) -> Any:
    """The optional module behind an algorithm."""
    module, package = _WHOLE[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentFault(
            f"shards compressed with {name} need the package {package}: run `pip install {package}`"
        ) from error
