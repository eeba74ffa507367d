"""Which source gives global sample i: exact apportionment in closed form.

A phase of constant weights is cut into blocks of at most 1,024 samples. How many samples of each
source lie before a block boundary is found by splitting the number of samples down a binary tree
over the sources: a node with n samples gives floor(share n + offset) of them to its left child
and the rest to its right one. Both are monotone in n, so no block ever owes a source a negative
number; they sum to n exactly; and a child's error is at most share times its parent's plus one
half, so the tree is built to keep the worst leaf's bound small (balanced where weights are
alike, a dominating source near the root). Inside a block the sources' labels are shuffled.

Nothing grows with the length of the run: a position costs one walk down the tree. Each phase
starts a tree of its own whose offsets carry the rounding left over from the phases before, and
depends on its own sources only, so that appending a source changes no earlier sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.order import mix, stream_key

_CANDIDATES = 6
_HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Stretch:
    """Global samples [start, stop) of constant weights (which sum to 1, all positive)."""

    start: int
    stop: int
    weights: Mapping[str, Fraction]


@dataclass(frozen=True)
class _Leaf:
    name: str
    weight: Fraction


@dataclass(frozen=True)
class _Join:
    """An inner node; bounds: per leaf, (its weight, sum of weight/ancestor's over the joins)."""

    left: _Leaf | _Join
    right: _Leaf | _Join
    weight: Fraction


def _tree(weights: Mapping[str, Fraction]) -> _Leaf | _Join:
    """Join light nodes first, always the pair whose worst leaf ends with the smallest bound."""
    nodes: list[tuple[_Leaf | _Join, list[tuple[float, float]]]] = [
        (_Leaf(name, weight), [(float(weight), 0.0)]) for name, weight in sorted(weights.items())
    ]
    while len(nodes) > 1:
        nodes.sort(key=lambda node: float(node[0].weight))
        best: tuple[float, int, int] | None = None
        for j in range(1, min(_CANDIDATES, len(nodes))):
            for i in range(j):
                total = float(nodes[i][0].weight + nodes[j][0].weight)
                worst = max(t + w / total for k in (i, j) for w, t in nodes[k][1])
                if best is None or worst < best[0] - 1e-12:
                    best = (worst, i, j)
        assert best is not None
        _, i, j = best
        (right, more), (left, leaves) = nodes.pop(j), nodes.pop(i)
        weight = left.weight + right.weight
        bounds = [(w, t + w / float(weight)) for w, t in leaves + more]
        # A leaf that is lighter and less burdened than another can never become the worst one.
        kept = [b for b in bounds if not any(o[0] > b[0] and o[1] >= b[1] for o in bounds)]
        nodes.append((_Join(left, right, weight), kept))
    return nodes[0][0]


@dataclass(frozen=True)
class _Split:
    """left = (numerator * n + offset) // denominator; children are indices, leaves negative."""

    numerator: int
    offset: int
    denominator: int
    left: int
    right: int


class _Apportionment:
    """Counts per source among the first n samples of one stretch."""

    def __init__(self, stretch: Stretch, owed: Mapping[str, Fraction]) -> None:
        """owed: target minus count of each source when the stretch begins."""
        self.names = sorted(stretch.weights)
        self._place = {name: i for i, name in enumerate(self.names)}
        self._splits: list[_Split] = []
        self._root, _ = self._add(_tree(stretch.weights), owed)

    def _add(self, node: _Leaf | _Join, owed: Mapping[str, Fraction]) -> tuple[int, Fraction]:
        """Store a node; returns its index and what its sources are owed together."""
        if isinstance(node, _Leaf):
            return -1 - self._place[node.name], owed.get(node.name, Fraction(0))
        left, owed_left = self._add(node.left, owed)
        right, owed_right = self._add(node.right, owed)
        share = node.left.weight / node.weight
        together = owed_left + owed_right
        offset = _HALF + owed_left - share * together
        denominator = share.denominator * 2**16
        scaled = min(max(int(offset * denominator), 0), denominator - 1)
        self._splits.append(_Split(share.numerator * 2**16, scaled, denominator, left, right))
        return len(self._splits) - 1, together

    def counts(self, n: int) -> NDArray[np.int64]:
        """[sources of the stretch] int64, summing to n."""
        out = np.zeros(len(self.names), np.int64)
        stack = [(self._root, n)]
        while stack:
            index, count = stack.pop()
            if index < 0:
                out[-1 - index] = count
                continue
            split = self._splits[index]
            left = (split.numerator * count + split.offset) // split.denominator
            stack.append((split.left, left))
            stack.append((split.right, count - left))
        return out


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
        self._parts: list[_Apportionment] = []
        self._indices: list[NDArray[np.int64]] = []
        self._bases = [np.zeros(len(self.names), np.int64)]
        owed = dict.fromkeys(self.names, Fraction(0))
        for stretch in self.stretches:
            part = _Apportionment(stretch, owed)
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
        self._last: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

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

    def _contents(self, i: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
        """(first sample, labels, before) of the block around global sample i; the last is kept."""
        last = self._last
        if last is not None and last[0] <= i < last[0] + len(last[1]):
            return last
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
        self._last = (first, indices[local], before)
        return self._last
