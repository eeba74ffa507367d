"""Inside one MDS shard: where the tokens of its samples lie.

A shard is ``[uint32 samples][uint32 offsets: samples + 1][JSON][samples]``. A sample is the
sizes of its varying columns (uint32 each), then the columns. A column ``ndarray:<dtype>`` of
varying shape begins with one byte ``ndim << 2 | log2(bytes per dimension)`` and the dimensions.
With one column of a fixed shape the whole body is therefore one run of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.formats.flat import TokenRun
from llmtrain.data.formats.maps import map_file
from llmtrain.data.formats.mds_index import ShardEntry, TokenColumn
from llmtrain.errors import DataError

_PROBES = 16


class StridedRun:
    """Samples of one length at one distance: row arithmetic, no index."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows = rows
        self.length = int(rows.shape[1])

    def __len__(self) -> int:
        return int(self.rows.size)

    def __getitem__(self, window: slice, /) -> NDArray[Any]:
        low, high = int(window.start), int(window.stop)
        row, column = divmod(low, self.length)
        if high <= (row + 1) * self.length:
            return self.rows[row, column : column + high - low]
        last, rest = divmod(high, self.length)
        pieces = [self.rows[row, column:], self.rows[row + 1 : last].reshape(-1)]
        if rest:
            pieces.append(self.rows[last, :rest])
        return np.concatenate(pieces)


class SampleRun:
    """Samples of varying lengths: the byte where each begins and the tokens before it."""

    def __init__(
        self,
        body: NDArray[np.uint8],
        dtype: np.dtype[Any],
        begin: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> None:
        self.body = body
        self.dtype = dtype
        self.begin = begin
        self.before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.before[-1])

    def __getitem__(self, window: slice, /) -> NDArray[Any]:
        low, high = int(window.start), int(window.stop)
        sample = int(np.searchsorted(self.before, low, "right")) - 1
        pieces = []
        while low < high:
            first, last = int(self.before[sample]), int(self.before[sample + 1])
            if first < last:
                stop = min(high, last)
                offset = int(self.begin[sample]) + (low - first) * self.dtype.itemsize
                pieces.append(np.frombuffer(self.body, self.dtype, stop - low, offset))
                low = stop
            sample += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def starts(self, low: int, high: int) -> NDArray[np.int64]:
        """Where samples begin among tokens [low, high)."""
        first, last = np.searchsorted(self.before, (low, high))
        found: NDArray[np.int64] = self.before[first:last]
        return found


@dataclass(frozen=True)
class ShardRun:
    """The tokens of an opened shard. ``header``: bytes before the first sample.

    ``stride``: bytes from sample to sample, None when the samples differ in length.
    """

    run: TokenRun
    header: int
    stride: int | None


def open_shard(path: Path, shard: ShardEntry, column: TokenColumn) -> ShardRun:
    """Maps an uncompressed shard file and finds its tokens.

    Raises FileNotFoundError when there is no such file, DataError when it is not what the index
    describes: shorter or longer, other samples, offsets that lead nowhere.
    """
    size = path.stat().st_size
    if size != shard.raw.bytes:
        state = "is truncated" if size < shard.raw.bytes else "is too long"
        raise _damaged(path, f"{state}: {size} bytes where the index says {shard.raw.bytes}")
    if size < 8 + 4 * shard.samples:
        raise _damaged(path, f"has no room for the offsets of {shard.samples} samples")
    body = map_file(path, np.dtype(np.uint8))
    samples = int(np.frombuffer(body, "<u4", 1)[0])
    if samples != shard.samples:
        raise _damaged(path, f"holds {samples} samples where the index says {shard.samples}")
    offsets = np.frombuffer(body, "<u4", samples + 1, 4)
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 8 + 4 * samples or last != size:
        raise _damaged(path, "has offsets that do not fit its size")
    if samples == 0:
        return ShardRun(np.empty(0, column.dtype), first, None)
    if None not in shard.sizes:
        return _fixed(path, shard, column, body, first)
    return _varying(path, shard, column, body, offsets.astype(np.int64))


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"shard {path} {what}: copy it again or prepare the source again")


def _fixed(
    path: Path, shard: ShardEntry, column: TokenColumn, body: NDArray[np.uint8], first: int
) -> ShardRun:
    """All columns have fixed sizes: only the ends of the offsets are looked at."""
    sizes = [size or 0 for size in shard.sizes]
    stride, before = sum(sizes), sum(sizes[: column.position])
    if len(body) - first != shard.samples * stride:
        raise _damaged(path, f"does not consist of {shard.samples} samples of {stride} bytes")
    length = sizes[column.position] // column.dtype.itemsize
    return ShardRun(
        _regular(body, column.dtype, first + before, stride, (shard.samples, length)), first, stride
    )


def _regular(
    body: NDArray[np.uint8], dtype: np.dtype[Any], begin: int, stride: int, shape: tuple[int, int]
) -> TokenRun:
    """Rows at one distance; one flat array when nothing lies between them."""
    if stride == shape[1] * dtype.itemsize:
        return np.frombuffer(body, dtype, shape[0] * shape[1], begin)
    rows: NDArray[Any] = np.ndarray(
        shape, dtype, body.data, offset=begin, strides=(stride, dtype.itemsize)
    )
    return StridedRun(rows)


def _varying(
    path: Path,
    shard: ShardEntry,
    column: TokenColumn,
    body: NDArray[np.uint8],
    offsets: NDArray[np.int64],
) -> ShardRun:
    """Some column varies: the sizes inside each sample say where its tokens are."""
    varying = [i for i, size in enumerate(shard.sizes) if size is None]
    lengths = np.diff(offsets)
    if int(lengths.min()) < 4 * len(varying):
        raise _damaged(path, "has offsets that do not ascend")
    begin = offsets[:-1] + 4 * len(varying)
    size = lengths - 4 * len(varying)
    if len(shard.sizes) > 1:
        recorded = {i: _uint32(body, offsets[:-1] + 4 * k) for k, i in enumerate(varying)}
        for i, fixed in enumerate(shard.sizes[: column.position]):
            begin = begin + (recorded[i] if fixed is None else fixed)
        fixed = shard.sizes[column.position]
        size = recorded[column.position] if fixed is None else np.full_like(begin, fixed)
        if np.any(begin + size > offsets[1:]):
            raise _damaged(path, "has samples that reach over their end")
    header = _array_headers(path, column, body, begin, size)
    counts, rest = np.divmod(size - header, column.dtype.itemsize)
    if np.any(rest) or int(counts.min()) < 0:
        raise _damaged(path, f"has samples that are no whole number of {column.dtype.name} tokens")
    begin = begin + header
    stride = int(begin[1] - begin[0]) if len(begin) > 1 else int(lengths[0])
    if np.all(counts == counts[0]) and np.all(np.diff(begin) == stride) and counts[0] > 0:
        shape = (len(counts), int(counts[0]))
        run = _regular(body, column.dtype, int(begin[0]), stride, shape)
        return ShardRun(run, int(offsets[0]), stride)
    return ShardRun(SampleRun(body, column.dtype, begin, counts), int(offsets[0]), None)


def _uint32(body: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The unaligned uint32 values at some byte places."""
    gathered = body[places[:, None] + np.arange(4)]
    values: NDArray[np.int64] = gathered.view("<u4").reshape(-1).astype(np.int64)
    return values


def _array_headers(
    path: Path,
    column: TokenColumn,
    body: NDArray[np.uint8],
    begin: NDArray[np.int64],
    size: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Bytes of shape before the values of each sample; zeros where the shape is fixed.

    For one-dimensional arrays the size alone tells them, which spares touching every sample: the
    writer takes the narrowest type that holds the length. Some samples are checked, and if they
    have more dimensions the headers of all are read.
    """
    if column.kind == "bytes" or column.length is not None:
        return np.zeros_like(size)
    header = np.zeros_like(size)
    marks = np.zeros(len(size), np.uint8)
    low = 0
    for code, width in enumerate((1, 2, 4)):
        count, rest = np.divmod(size - 1 - width, column.dtype.itemsize)
        fits = (rest == 0) & (count >= low) & (count < 1 << 8 * width)
        header[fits], marks[fits] = 1 + width, 1 << 2 | code
        low = 1 << 8 * width
    probes = np.unique(np.linspace(0, len(size) - 1, _PROBES).astype(np.int64))
    if np.all(header > 0) and np.array_equal(body[begin[probes]], marks[probes]):
        return header
    if int(size.min()) < 2:
        raise _damaged(path, "has samples without an array header")
    first = body[begin]
    dimensions, width_code = (first >> 2).astype(np.int64), (first & 3).astype(np.int64)
    return np.asarray(1 + (dimensions << width_code), np.int64)
