"""Which source gives global sample i: exact apportionment in closed form.

A stretch of constant weights is cut into blocks of at most 1,024 samples. ``Apportionment`` says
how many samples of each source lie before a block boundary; inside a block the sources' labels are
shuffled. Nothing grows with the length of the run.

Counts look ahead over the whole schedule: who is rounded up before a change of weights depends on
the weights after it. So where a schedule is changed during a run, the mixture keeps the one given
up beside the new one, and the past stays as it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.apportion import Apportionment
from llmtrain.data.order import mix, stream_key
from llmtrain.data.targets import Stretch

# First sample of a block, source index of each of its samples, and how many samples of that
# source come before each.
_Contents: TypeAlias = tuple[int, NDArray[np.int64], NDArray[np.int64]]
_KEPT = 4


def cut(schedule: Sequence[Stretch], turn: int) -> list[Stretch]:
    """The part of a schedule before global sample ``turn``."""
    return [Stretch(s.start, min(s.stop, turn), s.weights) for s in schedule if s.start < turn]


class Mixture:
    """The source of every global sample of a run, from schedules of consecutive stretches.

    names: all sources, in the order of the indices that are returned. block: samples per block.
    schedules: complete, in the order in which they were in force; each is given up at the first
    sample of the next. stretches: those in force when their samples are dealt.
    """

    def __init__(
        self,
        names: Sequence[str],
        stretches: Sequence[Stretch],
        block: int,
        seed: int,
        earlier: Sequence[Sequence[Stretch]] = (),
    ) -> None:
        """stretches: the schedule in force now. earlier: schedules that it has replaced."""
        self.names, self.block, self.seed = list(names), block, seed
        self.schedules = [list(schedule) for schedule in (*earlier, stretches)]
        self.stretches: list[Stretch] = []
        self._parts: list[tuple[Apportionment, NDArray[np.int64], NDArray[np.int64]]] = []
        self._bases = [np.zeros(len(self.names), np.int64)]
        # Count minus target at the beginning of each schedule and at the end.
        self._errors = [dict.fromkeys(self.names, Fraction(0))]
        self._turns = [schedule[0].start for schedule in self.schedules[1:]]
        for schedule, turn in zip(self.schedules, [*self._turns, stretches[-1].stop], strict=True):
            self._append(schedule, turn, Apportionment(schedule, block, self._errors[-1], turn))
        self._starts = [s.start for s in self.stretches]
        self._kept: tuple[_Contents, ...] = ()

    def _append(self, schedule: list[Stretch], turn: int, part: Apportionment) -> None:
        """Deal by ``schedule`` up to ``turn``. part: its apportionment, from here on."""
        place = {name: i for i, name in enumerate(self.names)}
        # Sources that occur only in what was given up have dealt nothing.
        columns = [j for j, name in enumerate(part.names) if name in place]
        indices = np.array([place[part.names[j]] for j in columns])
        counted = part.counts(turn)[columns]
        errors = self._errors[-1].copy()
        for stretch in cut(schedule, turn):
            self.stretches.append(stretch)
            for name, weight in stretch.weights.items():
                errors[name] -= weight * (stretch.stop - stretch.start)
        for j, count in zip(indices, counted, strict=True):
            errors[self.names[j]] += int(count)
        base = self._bases[-1].copy()
        base[indices] += counted
        self._bases.append(base)
        self._errors.append(errors)
        self._parts.append((part, np.array(columns), indices))

    def turned(self, future: Sequence[Stretch]) -> Mixture:
        """This mixture with ``future`` in force from its first sample on, which ends a block.

        The past is shared, not worked out again: a mixture that turns often stays cheap.
        """
        turn, (part, *_) = future[0].start, self._parts[-1]
        last = self.schedules[-1]
        new = Mixture.__new__(Mixture)
        new.names, new.block, new.seed = self.names, self.block, self.seed
        new.schedules = [*self.schedules, list(future)]
        new.stretches = [s for s in self.stretches if s.start < last[0].start]
        new._parts, new._bases = self._parts[:-1], self._bases[:-1]
        new._errors, new._turns = self._errors[:-1], [*self._turns, turn]
        new._append(last, turn, part)
        following = Apportionment(future, self.block, new._errors[-1], future[0].stop)
        new._append(new.schedules[-1], future[-1].stop, following)
        new._starts = [s.start for s in new.stretches]
        new._kept = ()
        return new

    @property
    def total(self) -> int:
        """Samples of the whole schedule."""
        return self.stretches[-1].stop

    def counts(self, i: int) -> NDArray[np.int64]:
        """Samples of each source among global samples [0, i): [sources] int64, 0 <= i <= total."""
        if i >= self.total:
            return self._bases[-1].copy()
        _, first = self._block(i)
        schedule = bisect_right(self._turns, first)
        part, columns, indices = self._parts[schedule]
        out = self._bases[schedule].copy()
        out[indices] += part.counts(first)[columns]
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
        index = bisect_right(self._starts, i) - 1
        start = self._starts[index]
        return index, start + (i - start) // self.block * self.block

    def _contents(self, i: int) -> _Contents:
        """The block around global sample i; the last few are kept, for several readers."""
        for kept in self._kept:
            if kept[0] <= i < kept[0] + len(kept[1]):
                return kept
        index, first = self._block(i)
        schedule = bisect_right(self._turns, first)
        part, columns, indices = self._parts[schedule]
        stop = min(first + self.block, self.stretches[index].stop)
        start = part.counts(first)[columns]
        numbers = part.counts(stop)[columns] - start
        local = np.repeat(np.arange(len(indices)), numbers)
        key = stream_key(self.seed, "block", first)
        shuffle = np.argsort(mix(np.arange(stop - first, dtype=np.uint64), key), kind="stable")
        local = local[shuffle]
        order = np.argsort(local, kind="stable")
        rank = np.arange(len(local)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        before = np.empty(len(local), np.int64)
        before[order] = rank
        before += (self._bases[schedule][indices] + start)[local]
        contents = (first, indices[local], before)
        self._kept = (contents, *self._kept[: _KEPT - 1])
        return contents
