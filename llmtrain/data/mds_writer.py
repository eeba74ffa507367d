"""Writing token streams as MDS shards, the format of mosaicml-streaming (version 2).

A stream is cut into chunks of a fixed number of tokens; a chunk is one MDS sample with the single
column ``tokens``. The shard files and ``index.json`` are byte for byte what its MDSWriter writes
for the same samples (compressed frames may differ between zstd libraries; they decode the same).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.errors import ConfigError

CHUNK_TOKENS = 1024
INDEX = "index.json"
STREAM = "stream.json"
MARKS = "marks"  # folder beside the shards: a byte for each token of a stream with weights
STARTS = 0x80  # in such a byte: the token begins a document; the other bits: number of its weight
MAX_SHARD_BYTES = (1 << 32) - 1  # offsets inside a shard are uint32


def token_dtype(vocab_size: int) -> str:
    """``uint16`` where all ids fit, else ``uint32``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def zstd_level(compression: str | None) -> int | None:
    """The level in ``zstd`` or ``zstd:N``; None for no compression. ConfigError for all else."""
    if not compression:
        return None
    name, _, level = compression.partition(":")
    if name == "zstd" and (not level or (level.isdigit() and 1 <= int(level) <= 22)):
        return int(level or 3)
    raise ConfigError(
        f"prepare.compression: {compression!r} is not known; write zstd or zstd:1 to zstd:22"
    )


def write_file(path: Path, content: bytes) -> None:
    """Write ``path`` whole: aside first, then renamed, so that it is never seen half written."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


class ShardWriter:
    """Appends tokens to the MDS folder ``folder``, holding at most one open shard in memory.

    dtype: ``uint16`` or ``uint32``. shard_bytes: largest shard file before compression, except
    that a shard holds at least one chunk. shards: index entries of the shards written so far.
    open_tokens: what is not yet in a shard.
    digest: xxh64 chained over the chunks in shards, whatever the size of the shards. ``resume``
    continues from those three as they were; files of later shards are overwritten.
    """

    def __init__(
        self, folder: Path, dtype: str, shard_bytes: int, compression: str | None = None
    ) -> None:
        self.folder = folder
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.level = zstd_level(compression)
        self._config: dict[str, Any] = {
            "column_encodings": [f"ndarray:{dtype}:{CHUNK_TOKENS}"],
            "column_names": ["tokens"],
            "column_sizes": [CHUNK_TOKENS * self.dtype.itemsize],
            "compression": compression or None,
            "format": "mds",
            "hashes": ["xxh64"],
            "size_limit": shard_bytes,
            "version": 2,
        }
        self._header = json.dumps(self._config, sort_keys=True).encode()
        room = shard_bytes - 8 - len(self._header)
        self._capacity = max(1, room // (CHUNK_TOKENS * self.dtype.itemsize + 4)) * CHUNK_TOKENS
        self.shards: list[dict[str, Any]] = []
        self.digest = b""
        self._pieces: list[NDArray[Any]] = []
        self._waiting = 0
        folder.mkdir(parents=True, exist_ok=True)

    def resume(
        self, shards: list[dict[str, Any]], digest: bytes, open_tokens: NDArray[Any]
    ) -> None:
        """Continue a stream of which ``shards`` are on disk and ``open_tokens`` are not."""
        self.shards, self.digest = list(shards), digest
        self._pieces = [open_tokens.astype(self.dtype)]
        self._waiting = len(open_tokens)

    @property
    def open_tokens(self) -> NDArray[Any]:
        """Tokens that are not yet in a shard."""
        if len(self._pieces) != 1:
            self._pieces = [np.concatenate([np.zeros(0, self.dtype), *self._pieces])]
        return self._pieces[0]

    def append(self, tokens: NDArray[Any]) -> None:
        """Add ``tokens`` at the end of the stream; full shards go to disk."""
        self._pieces.append(tokens.astype(self.dtype))
        self._waiting += len(tokens)
        if self._waiting < self._capacity:
            return
        waiting = self.open_tokens
        full = self._waiting // self._capacity * self._capacity
        for start in range(0, full, self._capacity):
            self._write_shard(waiting[start : start + self._capacity])
        self._pieces = [waiting[full:].copy()]
        self._waiting -= full

    def finish(self, padding: int) -> None:
        """Fill the last chunk with token ``padding``, write the last shard and the index."""
        rest = self.open_tokens
        if len(rest):
            fill = np.full(-len(rest) % CHUNK_TOKENS, padding, self.dtype)
            self._write_shard(np.concatenate([rest, fill]))
        self._pieces, self._waiting = [], 0
        index = json.dumps({"version": 2, "shards": self.shards}, sort_keys=True)
        write_file(self.folder / INDEX, index.encode())

    def _write_shard(self, tokens: NDArray[Any]) -> None:
        count = len(tokens) // CHUNK_TOKENS
        size = CHUNK_TOKENS * self.dtype.itemsize
        first = 4 + 4 * (count + 1) + len(self._header)
        offsets = (first + size * np.arange(count + 1, dtype=np.uint64)).astype("<u4")
        head = np.array([count], "<u4").tobytes() + offsets.tobytes() + self._header
        body = tokens.tobytes()
        for start in range(0, len(body), size):
            self.digest = xxhash.xxh64(self.digest + body[start : start + size]).digest()
        raw = head + body
        name = f"shard.{len(self.shards):05}.mds"
        entry = {**self._config, "raw_data": _described(name, raw), "samples": count}
        entry["zip_data"] = None
        if self.level is not None:
            import zstandard

            name, raw = f"{name}.zstd", zstandard.ZstdCompressor(level=self.level).compress(raw)
            entry["zip_data"] = _described(name, raw)
        write_file(self.folder / name, raw)
        self.shards.append(entry)


def _described(name: str, content: bytes) -> dict[str, Any]:
    hashes = {"xxh64": xxhash.xxh64(content).hexdigest()}
    return {"basename": name, "bytes": len(content), "hashes": hashes}
