"""The safetensors file format: written as a stream with its checksum, read by byte ranges.

A safetensors file is an 8-byte little-endian header length, a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` (offsets count from the end of the
header) and the raw row-major bytes. Writing it here, and not through the safetensors package,
keeps one block in memory instead of the whole file and hashes the bytes on their way out;
reading with ``pread`` turns a failing disk into an exception, where a memory map would end the
process with SIGBUS.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from llmtrain.errors import CheckpointError

BLOCK_BYTES = 16 << 20
ALGORITHM = "xxh3_64"
# Size in bytes of an element of each dtype, by the name safetensors gives it.
ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
_MAX_HEADER = 1 << 30
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype by safetensors' name, shape, bytes [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FileSum:
    """A finished file: its name, size in bytes and xxh3_64 checksum in hex."""

    name: str
    bytes: int
    digest: str


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], notes: dict[str, str] | None = None
) -> tuple[bytes, list[Entry]]:
    """Header bytes for (name, dtype, shape) in the order they will be written, and their places.

    notes: free text stored under ``__metadata__``. The caller puts wide dtypes first where a
    reader shall be able to map the data as typed arrays.
    """
    header: dict[str, Any] = {"__metadata__": notes} if notes else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    entries = [
        Entry(
            name,
            dtype,
            tuple(shape),
            len(raw) + header[name]["data_offsets"][0],
            len(raw) + header[name]["data_offsets"][1],
        )
        for name, dtype, shape in tensors
    ]
    return raw, entries


class HashingFile:
    """A new file that is hashed while it is written and is on the disk when ``finish`` returns.

    Raises OSError as the system does (no space, read-only, file too large).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = xxhash.xxh3_64()
        self._bytes = self._begun = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data`` (any contiguous buffer)."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            self._hash.update(block)
            while len(block):
                block = block[os.write(self._fd, block) :]
        self._bytes += len(view)
        if self._bytes - self._begun >= BLOCK_BYTES:
            _start_flushing(self._fd, self._begun, self._bytes - self._begun)
            self._begun = self._bytes

    def finish(self) -> FileSum:
        """Flush to the disk, close, and return size and checksum."""
        try:
            os.fsync(self._fd)
        finally:
            self.close()
        return FileSum(self.path.name, self._bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Close without flushing; harmless when already closed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _start_flushing(fd: int, offset: int, count: int) -> None:
    """Let the disk begin with these bytes while more are being made; does nothing off Linux.

    Without it the system keeps the whole file in memory until the flush at the end.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).sync_file_range(
            fd, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE
        )


def write_small(path: Path, data: bytes) -> FileSum:
    """Write and flush a small file in one go."""
    file = HashingFile(path)
    try:
        file.write(data)
        return file.finish()
    finally:
        file.close()


def hash_file(path: Path) -> str:
    """Checksum of a whole file, read block by block; raises OSError."""
    digest = xxhash.xxh3_64()
    buffer = bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return str(digest.hexdigest())


def hash_bytes(data: bytes) -> str:
    """Checksum of ``data``."""
    return str(xxhash.xxh3_64(data).hexdigest())


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises CheckpointError naming the file when it is missing, cut short or not safetensors.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is not a whole safetensors file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header") from error
    entries = {}
    try:
        for name, fields in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + int(offset) for offset in fields["data_offsets"])
            shape = tuple(int(n) for n in fields["shape"])
            entry = Entry(name, fields["dtype"], shape, begin, end)
            if end - begin != math.prod(shape) * ITEMSIZE[entry.dtype]:
                raise ValueError(name)
            entries[name] = entry
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged safetensors header") from error
    last = max((entry.end for entry in entries.values()), default=8 + length)
    if last != size:
        raise CheckpointError(f"{path} is cut short: {size} bytes where {last} are needed")
    return entries


def read_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill ``buffer`` (bytes) from ``offset`` of an open file; CheckpointError when it ends."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done : done + BLOCK_BYTES]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if count == 0:
            raise CheckpointError(f"{path} is cut short at byte {offset + done}")
        done += count
