"""Which source gives global sample i: exact apportionment in closed form.

A phase of constant weights is cut into blocks of at most 1,024 samples. ``Apportionment`` says how
many samples of each source lie before a block boundary; inside a block the sources' labels are
shuffled. Nothing grows with the length of the run.

Each stretch starts from the rounding left over by the stretches before it, and depends on its own
sources only, so that appending a source changes no earlier sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.apportion import Apportionment
from llmtrain.data.order import mix, stream_key

# First sample of a block, source index of each of its samples, and how many samples of that
# source come before each.
_Contents: TypeAlias = tuple[int, NDArray[np.int64], NDArray[np.int64]]
_KEPT = 4


@dataclass(frozen=True)
class Stretch:
    """Global samples [start, stop) of constant weights (which sum to 1, all positive)."""

    start: int
    stop: int
    weights: Mapping[str, Fraction]


class Mixture:
    """The source of every global sample of a run, from consecutive stretches of weights.

    names: all sources, in the order of the indices that are returned. block: samples per block.
    """

    def __init__(
        self, names: Sequence[str], stretches: Sequence[Stretch], block: int, seed: int
    ) -> None:
        self.names, self.stretches = list(names), list(stretches)
        self.block, self.seed = block, seed
        place = {name: i for i, name in enumerate(self.names)}
        self._parts: list[Apportionment] = []
        self._indices: list[NDArray[np.int64]] = []
        self._bases = [np.zeros(len(self.names), np.int64)]
        owed = dict.fromkeys(self.names, Fraction(0))
        for stretch in self.stretches:
            part = Apportionment(stretch.weights, owed, block)
            indices = np.array([place[name] for name in part.names])
            length = stretch.stop - stretch.start
            counted = part.counts(length)
            for name, count in zip(part.names, counted, strict=True):
                owed[name] += stretch.weights[name] * length - int(count)
            base = self._bases[-1].copy()
            base[indices] += counted
            self._bases.append(base)
            self._parts.append(part)
            self._indices.append(indices)
        self._kept: tuple[_Contents, ...] = ()

    @property
    def total(self) -> int:
        """Samples of the whole schedule."""
        return self.stretches[-1].stop

    def counts(self, i: int) -> NDArray[np.int64]:
        """Samples of each source among global samples [0, i): [sources] int64, 0 <= i <= total."""
        if i >= self.total:
            return self._bases[-1].copy()
        index, first = self._block(i)
        out = self._boundary(index, first)
        if first < i:
            labels, _ = self.locate_range(first, i)
            out += np.bincount(labels, minlength=len(self.names))
        return out

    def locate(self, i: int) -> tuple[int, int]:
        """(source index, how many of that source's samples come before) of global sample i."""
        labels, before = self.locate_range(i, i + 1)
        return int(labels[0]), int(before[0])

    def locate_range(self, low: int, high: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``locate`` for global samples [low, high): two int64 arrays of that length."""
        labels, before = [], []
        i = low
        while i < high:
            first, block_labels, block_before = self._contents(i)
            stop = min(high, first + len(block_labels))
            labels.append(block_labels[i - first : stop - first])
            before.append(block_before[i - first : stop - first])
            i = stop
        if not labels:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(labels), np.concatenate(before)

    def block_end(self, i: int) -> int:
        """First block boundary at or after global sample i."""
        if i >= self.total:
            return self.total
        index, first = self._block(i)
        return i if first == i else min(first + self.block, self.stretches[index].stop)

    def _block(self, i: int) -> tuple[int, int]:
        """(stretch, first sample of the block) that global sample i lies in."""
        low, high = 0, len(self.stretches) - 1
        while low < high:
            middle = (low + high) // 2
            if i < self.stretches[middle].stop:
                high = middle
            else:
                low = middle + 1
        start = self.stretches[low].start
        return low, start + (i - start) // self.block * self.block

    def _boundary(self, index: int, first: int) -> NDArray[np.int64]:
        out = self._bases[index].copy()
        counted = self._parts[index].counts(first - self.stretches[index].start)
        out[self._indices[index]] += counted
        return out

    def _contents(self, i: int) -> _Contents:
        """The block around global sample i; the last few are kept, for several readers."""
        for kept in self._kept:
            if kept[0] <= i < kept[0] + len(kept[1]):
                return kept
        index, first = self._block(i)
        stretch, part, indices = self.stretches[index], self._parts[index], self._indices[index]
        stop = min(first + self.block, stretch.stop)
        start = part.counts(first - stretch.start)
        numbers = part.counts(stop - stretch.start) - start
        local = np.repeat(np.arange(len(indices)), numbers)
        key = stream_key(self.seed, "block", first)
        shuffle = np.argsort(mix(np.arange(stop - first, dtype=np.uint64), key), kind="stable")
        local = local[shuffle]
        order = np.argsort(local, kind="stable")
        rank = np.arange(len(local)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        before = np.empty(len(local), np.int64)
        before[order] = rank
        before += (self._bases[index][indices] + start)[local]
        contents = (first, indices[local], before)
        self._kept = (contents, *self._kept[: _KEPT - 1])
        return contents
