"""How many samples of each source lie before a block boundary, in closed form.

Under constant weights w the count of a source after n samples should be n w, off by one at most,
at every block boundary; it may never fall from one boundary to the next; and the counts of all
sources sum to n. Rounding each boundary by itself breaks the second demand, and splitting n down
a tree over the sources adds up rounding errors to 1.2 to 1.5 samples for ordinary weights.

Here time is halved instead. The counts at 1, 2, 4, 8, ... blocks are fixed one after the other.
Between two boundaries whose counts are known, those in the middle are chosen among the integers
between them, so that no count ever falls, whatever is chosen; the choice keeps the errors small
(``_settle``). A boundary n costs log2(n) choices over the sources. Nothing is stored that grows
with the run, and nothing depends on where the stretch ends, so the future may change freely.

Choosing: every source takes the count nearest to its target. Then the errors of the slow
sources are balanced among sources of alike weight, because an error of theirs lasts long and
all faster sources together carry its opposite: summed from the lightest source on, the errors
may not leave a band at any jump of the weights. What is left is taken from the sources that are
furthest ahead or behind. Errors are integers in units of 2^-50 samples: the same everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_BITS = 50
UNIT = 1 << _BITS
_HALF = UNIT >> 1
# Sources whose weights lie within `width` of each other are balanced together; the running sum
# of errors may reach `cap` where one group ends. Found by search over hard weight vectors.
_BANDS = ((1.3, UNIT), (4.0, UNIT * 6 // 10), (16.0, UNIT // 2))
# Balancing makes no error larger than this: a source at the very edge would leave no choice in
# the halves.
_EDGE = UNIT * 98 // 100
_UNBOUNDED = 1 << 62
# Boundaries remembered per stretch; as many older ones are kept while they are asked for again.
_REMEMBERED = 256


@dataclass(frozen=True)
class _State:
    """Counts [k] and errors [k] (count minus target, in UNIT) at a block boundary."""

    counts: Ints
    errors: Ints


def quantised(weights: Sequence[Fraction]) -> list[int]:
    """Weights (summing to 1) as integers that sum to UNIT, by largest remainder."""
    exact = [weight * UNIT for weight in weights]
    out = [int(value) for value in exact]
    short = UNIT - sum(out)
    for i in sorted(range(len(out)), key=lambda i: (out[i] - exact[i], i))[:short]:
        out[i] += 1
    return out


class Apportionment:
    """Counts per source among the first n samples of a stretch of constant weights.

    names: the sources of positive weight, lightest first: the order of ``counts``.
    """

    def __init__(
        self, weights: Mapping[str, Fraction], owed: Mapping[str, Fraction], block: int
    ) -> None:
        """weights: positive, summing to 1. owed: target minus count when the stretch begins.

        block: samples per block, at most 1,024.
        """
        assert len(weights) < 4096 and 1 <= block <= 1024
        self.names = sorted(weights, key=lambda name: (weights[name], name))
        self._rates = quantised([weights[name] for name in self.names])
        self._rate_array = np.array(self._rates, np.int64)
        self._block = block
        errors = np.array(
            [-round(owed.get(name, Fraction(0)) * UNIT) for name in self.names], np.int64
        )
        # Sources of weight zero keep the error they have; the others carry its opposite.
        self._carried = -int(errors.sum())
        self._bands = [(_groups(self._rates, width), cap) for width, cap in _BANDS]
        self._powers = [_State(np.zeros(len(self.names), np.int64), errors)]
        self._known: dict[int, _State] = {}
        self._older: dict[int, _State] = {}

    def counts(self, n: int) -> Ints:
        """[sources] int64, summing to n."""
        blocks, rest = divmod(n, self._block)
        low = self._boundary(blocks)
        if rest == 0:
            return low.counts.copy()
        most = self._boundary(blocks + 1).counts - low.counts
        errors = low.errors - rest * self._rate_array
        gains, _ = self._settle(np.zeros_like(errors), errors, most, rest, _EDGE)
        return low.counts + gains

    def _boundary(self, q: int) -> _State:
        """After ``q`` blocks. Some boundaries are remembered: neighbours are found faster."""
        bits = q.bit_length()
        if q & (q - 1) == 0:
            return self._power(bits)
        first, last = 1 << bits - 1, 1 << bits
        low, high = self._power(bits), self._power(bits + 1)
        while True:
            at = (first + last) // 2
            middle = self._known.get(at)
            if middle is None:
                middle = self._older.get(at) or self._halve(low, high, last - at)
                if len(self._known) >= _REMEMBERED:
                    self._known, self._older = {}, self._known
                self._known[at] = middle
            if q == at:
                return middle
            if q < at:
                last, high = at, middle
            else:
                first, low = at, middle

    def _power(self, index: int) -> _State:
        """After 2^(index - 1) blocks; index 0: the start."""
        powers = self._powers
        while len(powers) <= index:
            last, i = powers[-1], len(powers)
            samples = self._block << max(i - 2, 0)
            wanted = [
                samples * rate - error
                for rate, error in zip(self._rates, last.errors.tolist(), strict=True)
            ]
            gains = [max(0, amount // UNIT) for amount in wanted]
            errors = [gain * UNIT - amount for gain, amount in zip(gains, wanted, strict=True)]
            most = np.full(len(gains), _UNBOUNDED)
            gained, left = self._settle(np.array(gains), np.array(errors), most, samples, UNIT)
            powers = [*powers, _State(last.counts + gained, left)]
        self._powers = powers
        return powers[index]

    def _halve(self, low: _State, high: _State, blocks: int) -> _State:
        """In the middle between two states that lie twice ``blocks`` apart."""
        most = high.counts - low.counts
        errors = (low.errors + high.errors - (most & 1) * UNIT) >> 1
        gains, errors = self._settle(most >> 1, errors, most, blocks * self._block, _EDGE)
        return _State(low.counts + gains, errors)

    def _settle(
        self, gains: Ints, errors: Ints, most: Ints, total: int, edge: int
    ) -> tuple[Ints, Ints]:
        """Gains in [0, most] that sum to ``total``, with small errors; and those errors.

        gains, errors: some gains and the errors they would leave, all [k] int64. edge: largest
        error that balancing may make.
        """
        moves = np.minimum(np.maximum((_HALF - errors) >> _BITS, -gains), most - gains)
        choice = _Choice(
            (gains + moves).tolist(), (errors + (moves << _BITS)).tolist(), most.tolist()
        )
        for groups, cap in self._bands:
            sums = list(itertools.accumulate(choice.errors, initial=self._carried))
            moved = 0
            for start, stop in groups:
                running = sums[stop] + moved
                while not -cap <= running <= cap:
                    step = -1 if running > 0 else 1
                    i = choice.furthest(step, start, stop)
                    if i is None or abs(choice.errors[i] + step * UNIT) > edge:
                        break
                    choice.move(i, step)
                    running += step * UNIT
                moved = running - sums[stop]
        excess = sum(choice.gains) - total
        while excess:
            step = -1 if excess > 0 else 1
            i = choice.furthest(step, 0, len(errors))
            assert i is not None
            choice.move(i, step)
            excess += step
        return np.array(choice.gains), np.array(choice.errors)


@dataclass(frozen=True)
class _Choice:
    """Gains being chosen, the errors they leave, and the most that each may be."""

    gains: list[int]
    errors: list[int]
    most: list[int]

    def furthest(self, step: int, start: int, stop: int) -> int | None:
        """Of the sources [start, stop): furthest ahead of those that can give (step -1), or
        furthest behind of those that can take (step 1); the first of equals."""
        gains, errors, most = self.gains, self.errors, self.most
        best, found = -_UNBOUNDED, None
        if step > 0:
            for i in range(start, stop):
                if -errors[i] > best and gains[i] < most[i]:
                    best, found = -errors[i], i
        else:
            for i in range(start, stop):
                if errors[i] > best and gains[i]:
                    best, found = errors[i], i
        return found

    def move(self, i: int, step: int) -> None:
        """Give source ``i`` one more (step 1) or one less (step -1)."""
        self.gains[i] += step
        self.errors[i] += step * UNIT


def _groups(rates: Sequence[int], width: float) -> list[tuple[int, int]]:
    """Neighbours [start, stop) whose heaviest weighs at most ``width`` times the lightest."""
    starts = [0]
    for i, rate in enumerate(rates):
        if rate > width * rates[starts[-1]]:
            starts.append(i)
    return list(itertools.pairwise([*starts, len(rates)]))
