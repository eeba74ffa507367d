"""Text files on disk: finding them, and decompressing them while counting what was read."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import xxhash

from llmtrain.errors import DataError

PACKED = (".gz", ".zst")
READ_SIZE = 1 << 20


def find_files(name: str, patterns: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    """Files meant by ``patterns`` (files, folders, globs with ``**``), each once, sorted.

    Folders are searched to any depth for names with one of ``endings`` (empty: all), plain or
    compressed, hidden ones left out. DataError names the source and the pattern without a match.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            matches = list(_walk(path, endings))
        elif os.path.isfile(path):
            matches = [path]
        else:
            matches = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        if not matches:
            kind = " or ".join(endings) or "any"
            why = f"holds no {kind} files" if os.path.isdir(path) else "matches no file"
            raise DataError(f"source {name!r}: path {pattern!r} {why}; correct its paths")
        found.update(dict.fromkeys(sorted(matches)))
    if not found:
        raise DataError(f"source {name!r} has no paths; give files, folders or globs")
    return list(found)


def _walk(folder: str, endings: tuple[str, ...]) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [d for d in folders if not d.startswith(".")]
        for name in names:
            plain = name.removesuffix(".gz").removesuffix(".zst").lower()
            if not name.startswith(".") and (not endings or plain.endswith(endings)):
                yield os.path.join(root, name)


def listing(paths: Iterable[str]) -> dict[str, object]:
    """Number, total bytes and a hash of the names and sizes of ``paths``: cheap to compare."""
    digest, total, count = xxhash.xxh64(), 0, 0
    for path in paths:
        size = os.stat(path).st_size
        digest.update(f"{Path(path).name}\0{size}\n".encode())
        total, count = total + size, count + 1
    return {"files": count, "bytes": total, "listing": digest.hexdigest()}


@contextmanager
def open_bytes(path: str, progress: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """Open ``path`` for reading bytes, decompressed by its ending (.gz, .zst).

    ``progress`` is told the number of bytes taken from disk. DataError for a missing or unreadable
    file and for damaged or truncated compression.
    """
    try:
        with open(path, "rb", buffering=0) as raw:
            counted = _Counted(raw, progress)
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=counted, mode="rb") as packed:
                    yield io.BufferedReader(packed, READ_SIZE)
            elif path.endswith(".zst"):
                yield io.BufferedReader(_ZstdReader(counted), READ_SIZE)
            else:
                yield io.BufferedReader(counted, READ_SIZE)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or truncated: {error}; fetch it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


class _Counted(io.RawIOBase):
    """A raw file that reports how many bytes were taken from it."""

    def __init__(self, raw: io.FileIO, progress: Callable[[int], None]) -> None:
        self._raw = raw
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = self._raw.readinto(buffer) or 0
        self._progress(count)
        return count


class _ZstdReader(io.RawIOBase):
    """Decompressed zstd frames; unlike the library's own reader, a truncated end is an error."""

    def __init__(self, raw: io.RawIOBase) -> None:
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._fault = zstandard.ZstdError
        self._frame = self._new()
        self._inside = False  # some bytes of the current frame were read
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._out:
            if not self._more():
                return 0
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count

    def _more(self) -> bool:
        if self._frame.eof:
            packed = self._frame.unused_data
            self._frame, self._inside = self._new(), False
        else:
            packed = b""
        packed = packed or self._raw.read(READ_SIZE >> 2) or b""
        if not packed:
            if self._inside:
                raise EOFError("the last zstd frame has no end")
            return False
        self._inside = True
        try:
            self._out = memoryview(self._frame.decompress(packed))
        except self._fault as error:
            raise EOFError(str(error)) from error
        return True
