"""Where the shards of an MDS folder are: a local folder or a remote one behind a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from llmtrain.data.formats import remote
from llmtrain.data.formats.cache import ShardCache
from llmtrain.data.formats.compression import decompress
from llmtrain.data.formats.hashing import mismatch
from llmtrain.data.formats.mds_index import FileEntry, ShardEntry
from llmtrain.errors import DataError

_FETCHES = 2  # a second fetch for a file that arrived damaged


class ShardStore(Protocol):
    """Gives uncompressed shard files."""

    def path(self, shard: ShardEntry) -> Path:
        """The shard as a local file. A cached one may vanish again at any time."""
        ...

    def gone(self, shard: ShardEntry) -> bool:
        """Whether a cached shard has been removed from its cache."""
        ...


class LocalStore:
    """Shards in a local folder. Compressed ones are decompressed into ``cache``, None if none."""

    def __init__(self, folder: Path, cache: ShardCache | None) -> None:
        self.folder = folder
        self.cache = cache

    def path(self, shard: ShardEntry) -> Path:
        plain = self.folder / shard.raw.basename
        if self.cache is None or shard.packed is None or plain.exists():
            return plain
        packed = self.folder / shard.packed.basename

        def make(target: Path) -> None:
            if not packed.exists():
                raise DataError(f"shard {packed} is missing: copy it again")
            decompress(shard.compression or "", packed, target)
            _check_file(target, shard.raw, str(packed))

        return self.cache.get(shard.raw.basename, shard.raw.bytes, make)

    def gone(self, shard: ShardEntry) -> bool:
        if self.cache is None or shard.packed is None:
            return False
        return not self.cache.path(shard.raw.basename).exists() and not (
            (self.folder / shard.raw.basename).exists()
        )

    def check(self, shard: ShardEntry) -> None:
        """Raises DataError when a file of the shard is missing or has another size."""
        plain = self.folder / shard.raw.basename
        entry = shard.raw if shard.packed is None or plain.exists() else shard.packed
        _check_size(self.folder / entry.basename, entry)


class RemoteStore:
    """Shards at a remote address, fetched on first use into ``cache`` and verified."""

    def __init__(self, address: str, cache: ShardCache) -> None:
        self.address = address
        self.cache = cache

    def path(self, shard: ShardEntry) -> Path:
        def make(target: Path) -> None:
            if shard.packed is None:
                self._fetch(shard.raw, target)
                return
            packed = target.with_name(target.name + ".packed")
            try:
                self._fetch(shard.packed, packed)
                decompress(shard.compression or "", packed, target)
            finally:
                packed.unlink(missing_ok=True)
            _check_file(target, shard.raw, remote.join(self.address, shard.packed.basename))

        return self.cache.get(shard.raw.basename, shard.raw.bytes, make)

    def gone(self, shard: ShardEntry) -> bool:
        return not self.cache.path(shard.raw.basename).exists()

    def _fetch(self, entry: FileEntry, target: Path) -> None:
        """Fetches one file; once more when it does not arrive as the index describes it."""
        address = remote.join(self.address, entry.basename)
        for attempt in range(1, _FETCHES + 1):
            try:
                remote.fetch(address, target)
                _check_file(target, entry, address)
                return
            except FileNotFoundError as error:
                raise DataError(f"shard {error}: upload the folder again") from error
            except DataError:
                if attempt == _FETCHES:
                    raise


def _check_size(path: Path, entry: FileEntry, name: str | None = None) -> None:
    """The file exists and is as long as the index says, else DataError."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(
            f"shard {name or path} is missing: copy it again or prepare the source again"
        ) from error
    if size != entry.bytes:
        state = "is truncated" if size < entry.bytes else "is too long"
        raise DataError(
            f"shard {name or path} {state}: {size} bytes where the index says {entry.bytes}: "
            "copy it again or prepare the source again"
        )


def _check_file(path: Path, entry: FileEntry | None, name: str | None = None) -> None:
    """Size and recorded hash of a file, else DataError."""
    if entry is None:
        return
    _check_size(path, entry, name)
    if wrong := mismatch(path, entry.hashes):
        raise DataError(
            f"shard {name or path} is damaged, {wrong}: copy it again or prepare the source again"
        )


def verify(store: ShardStore, shard: ShardEntry) -> bool:
    """Compares a shard with its recorded hash; False when none is recorded."""
    _check_file(store.path(shard), shard.raw)
    return bool(shard.raw.hashes)
