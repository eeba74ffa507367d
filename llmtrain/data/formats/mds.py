"""MDS folders (mosaicml-streaming's format, and ours): local, compressed or remote."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import hashing, mds_store, remote
from llmtrain.data.formats.cache import ShardCache, default_cache_dir
from llmtrain.data.formats.flat import FlatSource, TokenRun
from llmtrain.data.formats.marks import MarkedSource
from llmtrain.data.formats.mds_index import MdsIndex, StreamInfo, parse_index, parse_stream
from llmtrain.data.formats.mds_layout import SampleRun, ShardRun, open_shard
from llmtrain.data.formats.mds_store import LocalStore, RemoteStore, ShardStore
from llmtrain.data.mds_writer import MARKS
from llmtrain.errors import DataError

log = logging.getLogger(__name__)
_REOPENS = 5  # a cached shard can be removed by another process between finding and opening it


class MdsParts:
    """The shards of an MDS folder as parts of a stream.

    ``counts``: tokens per shard. Where the encoding fixes the length of a sample the index gives
    them; where all samples of the first shard have one length they follow from the sizes of the
    other shards; else every shard is opened once and the result kept in ``memo``.
    Samples of varying length count as one document each, unless they are ``concatenated``.
    """

    def __init__(
        self, index: MdsIndex, store: ShardStore, memo: Path | None, concatenated: bool
    ) -> None:
        self.index = index
        self.store = store
        self._concatenated = concatenated
        self.indexed = False
        self.counts: Sequence[int] = self._count(memo)

    def open(self, part: int) -> TokenRun:
        return self._shard(part).run

    def gone(self, part: int) -> bool:
        return self.store.gone(self.index.shards[part])

    def starts(self, part: int, run: TokenRun, low: int, high: int) -> NDArray[np.int64]:
        if isinstance(run, SampleRun):
            return run.starts(low, high)
        length = len(run) // self.index.shards[part].samples
        return np.arange(-(-low // length) * length, high, length, dtype=np.int64)

    def verify(self) -> int:
        return sum(mds_store.verify(self.store, shard) for shard in self.index.shards)

    def _shard(self, part: int) -> ShardRun:
        """Opens a shard, again when another process has just removed it from the cache."""
        shard, column = self.index.shards[part], self.index.column
        assert column is not None
        for _ in range(_REOPENS):
            path = self.store.path(shard)
            try:
                return open_shard(path, shard, column)
            except FileNotFoundError:
                continue
        raise DataError(f"shard {path} is missing: copy it again or prepare the source again")

    def _count(self, memo: Path | None) -> list[int]:
        """Tokens of each shard."""
        shards, column = self.index.shards, self.index.column
        if column is None:
            return []
        if column.length is not None:
            return [shard.samples * column.length for shard in shards]
        first = self._shard(0)
        if first.stride is not None:
            length = len(first.run) // shards[0].samples
            # bytes before the first sample that do not depend on the number of samples
            constant = first.header - 4 * shards[0].samples
            stride = (shards[0].raw.bytes - first.header) // shards[0].samples
            if all(shard.raw.bytes == constant + (4 + stride) * shard.samples for shard in shards):
                return [shard.samples * length for shard in shards]
        self.indexed = not self._concatenated
        known = _recall(memo, len(shards))
        if known is None:
            known = [len(self._shard(part).run) for part in range(len(shards))]
            _remember(memo, known)
        return known


def open_mds(
    name: str,
    cfg: SourceConfig,
    *,
    eos_id: int | None,
    cache_dir: Path | None = None,
    concatenated: bool = False,
) -> FlatSource:
    """The stream in an MDS folder, local or remote, as a source.

    ``concatenated``: samples are pieces of one stream even where their lengths differ; otherwise
    samples of varying length are documents. ``cache_dir``: where fetched and decompressed shards
    go, at most ``cfg.cache_bytes`` for this source.

    Raises DataError naming the file and what is wrong with it.
    """
    text, stream_text, where = _read_texts(cfg.path)
    index = parse_index(text, f"{where}/index.json", cfg.dtype)
    stream = parse_stream(stream_text, f"{where}/stream.json") if stream_text else None
    cache_root = cache_dir or default_cache_dir()
    identity = hashing.digest(
        [where if remote.is_remote(where) else str(Path(where).resolve()), text.decode()]
    )
    store: ShardStore
    if remote.is_remote(cfg.path):
        cache = ShardCache(cache_root / f"{name}-{identity[:12]}", cfg.cache_bytes)
        store = RemoteStore(cfg.path, cache)
        _warn_small(name, cfg, index)
    else:
        store = _local_store(Path(where), index, cache_root / f"{name}-{identity[:12]}", cfg)
    memo = None
    if remote.is_remote(cfg.path) or cache_dir is not None or _packed(index):
        memo = cache_root / f"{name}-{identity[:12]}.counts.json"
    parts = MdsParts(index, store, memo, concatenated)
    facts: dict[str, Any] = {
        "fingerprint": _fingerprint(index, stream, parts),
        "eos_id": _eos(name, eos_id, stream),
        "num_tokens": _true_count(where, stream, index, parts),
        "text_bytes": stream.text_bytes if stream else None,
    }
    if stream is None or stream.weights is None:
        return FlatSource(name, parts, **facts)
    marks = _open_marks(name, cfg, cache_dir, sum(parts.counts))
    facts |= {"table": stream.weights, "window": stream.window}
    return MarkedSource(name, parts, marks=marks, **facts)


def _open_marks(name: str, cfg: SourceConfig, cache_dir: Path | None, total: int) -> FlatSource:
    """The folder of marks beside the tokens; DataError when it is not as long as they are."""
    where = remote.join(cfg.path, MARKS) if remote.is_remote(cfg.path) else f"{cfg.path}/{MARKS}"
    marks_cfg = dataclasses.replace(cfg, path=where, dtype=None)
    marks = open_mds(f"{name}-{MARKS}", marks_cfg, eos_id=None, cache_dir=cache_dir)
    if marks.num_tokens != total:
        raise DataError(
            f"{where} has marks for {marks.num_tokens} tokens but the shards hold {total}: they do "
            "not belong together, prepare or copy the folder again"
        )
    return marks


def _read_texts(path: str) -> tuple[bytes, bytes | None, str]:
    """The texts of index.json and of stream.json, None where there is none; and the folder."""
    if not remote.is_remote(path):
        folder = Path(path)
        try:
            text = (folder / "index.json").read_bytes()
        except OSError as error:
            raise DataError(
                f"{folder / 'index.json'} cannot be read ({error.strerror}): "
                "give the folder that holds index.json"
            ) from error
        stream = folder / "stream.json"
        return text, stream.read_bytes() if stream.exists() else None, str(folder)
    with tempfile.TemporaryDirectory(prefix="llmtrain-") as scratch:
        index, stream = Path(scratch) / "index.json", Path(scratch) / "stream.json"
        try:
            remote.fetch(remote.join(path, "index.json"), index)
        except FileNotFoundError as error:
            raise DataError(f"{error}: give the folder that holds index.json") from error
        try:
            remote.fetch(remote.join(path, "stream.json"), stream)
        except FileNotFoundError:
            return index.read_bytes(), None, path
        return index.read_bytes(), stream.read_bytes(), path


def _packed(index: MdsIndex) -> bool:
    return any(shard.packed is not None for shard in index.shards)


def _local_store(folder: Path, index: MdsIndex, cache: Path, cfg: SourceConfig) -> LocalStore:
    """A local store whose files are all there with the right sizes, else DataError."""
    store = LocalStore(folder, ShardCache(cache, cfg.cache_bytes) if _packed(index) else None)
    for shard in index.shards:
        store.check(shard)
    return store


def _warn_small(name: str, cfg: SourceConfig, index: MdsIndex) -> None:
    """Says once that shards will be fetched again and again, since the order is random."""
    total = sum(shard.raw.bytes for shard in index.shards)
    if total > cfg.cache_bytes:
        log.warning(
            "source '%s' has %.1f GB of shards and cache_bytes allows %.1f GB: shards will be "
            "fetched again during the run; raise cache_bytes or copy the folder",
            name,
            total / 1e9,
            cfg.cache_bytes / 1e9,
        )


def _eos(name: str, wanted: int | None, stream: StreamInfo | None) -> int | None:
    """The separator to use; DataError when the stream was written with another one."""
    recorded = stream.eos_id if stream else None
    if wanted is not None and recorded is not None and wanted != recorded:
        raise DataError(
            f"source '{name}' was prepared with eos id {recorded} but the run uses {wanted}: "
            "prepare it with the run's tokenizer, or set data.eos_id"
        )
    return wanted if recorded is None else recorded


def _true_count(
    where: str, stream: StreamInfo | None, index: MdsIndex, parts: MdsParts
) -> int | None:
    """Tokens without the padding of the last chunk; DataError when it cannot be."""
    if stream is None:
        return None
    total = sum(parts.counts)
    chunk = (index.column.length if index.column else None) or 1
    if not total - chunk < stream.num_tokens <= total:
        raise DataError(
            f"{where}/stream.json says {stream.num_tokens} tokens but the shards hold {total}: "
            "they do not belong together, prepare or copy the folder again"
        )
    if stream.dtype is not None and index.column and stream.dtype != index.column.dtype.name:
        raise DataError(
            f"{where}/stream.json says {stream.dtype} but the shards hold "
            f"{index.column.dtype.name}: they do not belong together, prepare the folder again"
        )
    return stream.num_tokens


def _fingerprint(index: MdsIndex, stream: StreamInfo | None, parts: MdsParts) -> str:
    """The recorded one, else from the sizes and hashes in the index.

    Where the index has no hashes, a sample of the first shard takes part: the same whether the
    folder is local or remote.
    """
    if stream is not None and stream.fingerprint:
        return stream.fingerprint
    column = index.column
    shards = [[shard.raw.bytes, shard.samples, dict(shard.raw.hashes)] for shard in index.shards]
    first: list[object] = []
    if index.shards and not index.shards[0].raw.hashes:
        first = hashing.sample(parts.store.path(index.shards[0]))
    return hashing.digest(["mds", column.dtype.name if column else "", shards, first])


def _recall(memo: Path | None, shards: int) -> list[int] | None:
    """Counts of an earlier open; None when there are none for so many shards."""
    if memo is None:
        return None
    try:
        counts = json.loads(memo.read_text())
    except (OSError, ValueError):
        return None
    return counts if isinstance(counts, list) and len(counts) == shards else None


def _remember(memo: Path | None, counts: list[int]) -> None:
    """Keeps counts for the next open; a cache that cannot be written is no fault."""
    if memo is None:
        return
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part = memo.with_name(f"{memo.name}.{os.getpid()}")
        part.write_text(json.dumps(counts))
        os.replace(part, memo)
    except OSError as error:
        log.debug("counts not kept: %s", error)
