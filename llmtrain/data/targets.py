"""What every source should have given by any sample of a schedule, as exact fractions."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

# A sample number beyond every run.
NEVER = 1 << 62


@dataclass(frozen=True)
class Stretch:
    """Global samples [start, stop) of constant weights (which sum to 1, all positive)."""

    start: int
    stop: int
    weights: Mapping[str, Fraction]


@dataclass(frozen=True)
class Piece:
    """Samples [start, stop) in which source i gains ``rates[i]`` a sample; the rates sum to 1."""

    start: int
    stop: int
    rates: list[Fraction]


class Targets:
    """Target counts that grow in straight pieces; the last piece goes on for ever.

    All amounts are integers in units of 1 / ``unit`` sample, so that nothing is ever rounded.

    starts: [pieces] first samples. rates: [pieces][sources] amount per sample. floors, parts:
    [pieces][sources] whole samples of the target, and what it is above them, at the starts.
    """

    def __init__(self, pieces: Sequence[Piece], first: Sequence[Fraction]) -> None:
        """first: the targets at the first sample, summing to a whole number."""
        denominators = {x.denominator for piece in pieces for x in piece.rates}
        self.unit = math.lcm(*denominators, *(x.denominator for x in first))
        self.starts = [piece.start for piece in pieces]
        self.rates = [[int(x * self.unit) for x in piece.rates] for piece in pieces]
        at = [int(x * self.unit) for x in first]
        self.floors, self.parts = [], []
        for piece, rates in zip(pieces, self.rates, strict=True):
            self.floors.append([x // self.unit for x in at])
            self.parts.append([x % self.unit for x in at])
            at = [x + (piece.stop - piece.start) * r for x, r in zip(at, rates, strict=True)]
        self._by_source = [list(column) for column in zip(*self.floors, strict=True)]

    def piece(self, sample: int) -> int:
        """The piece that ``sample`` lies in."""
        return bisect_right(self.starts, sample) - 1

    def at(self, piece: int, sample: int) -> tuple[list[int], list[int]]:
        """(floors, parts) of the targets at ``sample`` in ``piece``."""
        unit, gone = self.unit, sample - self.starts[piece]
        floors, parts = [], []
        for floor, part, rate in zip(
            self.floors[piece], self.parts[piece], self.rates[piece], strict=True
        ):
            more, left = divmod(part + rate * gone, unit)
            floors.append(floor + more)
            parts.append(left)
        return floors, parts

    def due(self, piece: int, sample: int, floors: list[int], parts: list[int]) -> list[int]:
        """First sample at which each target has reached ``floors`` + 1, NEVER if it does not.

        floors, parts: of the targets at ``sample`` in ``piece``.
        """
        unit, out = self.unit, []
        last = len(self.starts) - 1
        for i, (floor, part) in enumerate(zip(floors, parts, strict=True)):
            rate, begin, left = self.rates[piece][i], sample, unit - part
            if piece < last and left > rate * (self.starts[piece + 1] - sample):
                reached = self._by_source[i]
                beyond = bisect_left(reached, floor + 1, piece + 1) - 1
                rate, begin = self.rates[beyond][i], self.starts[beyond]
                left = (floor + 1 - reached[beyond]) * unit - self.parts[beyond][i]
            out.append(begin - (-left // rate) if rate else NEVER)
        return out


def repaid(pieces: Sequence[Piece], debts: Sequence[Fraction], block: int) -> list[Piece]:
    """The pieces, with rates changed so that ``debts`` are paid back as soon as they can be.

    debts: how far each source's target lies above the one that ``pieces`` mean; they sum to 0.
    Sources above it pause, as far as they have a weight at all, and those below it gain what is
    freed. Paying takes stretches of 1, 2, 4, ... blocks. No debt ever grows; no rate is negative.
    """
    left, out, longest = list(debts), [], block
    for piece in pieces:
        at = piece.start
        while any(left) and (fits := (piece.stop - at) // block):
            length = min(longest, block << fits.bit_length() - 1)
            paid = _payment(piece.rates, left, length)
            left = [debt - amount for debt, amount in zip(left, paid, strict=True)]
            if not any(paid):
                break
            rates = [r - amount / length for r, amount in zip(piece.rates, paid, strict=True)]
            out.append(Piece(at, at + length, rates))
            at, longest = at + length, 2 * length
        if at < piece.stop:
            out.append(Piece(at, piece.stop, piece.rates))
    return out


def _payment(rates: list[Fraction], debts: list[Fraction], length: int) -> list[Fraction]:
    """What each source pays in ``length`` samples; negative: what it gets back."""
    give = [min(max(debt, Fraction(0)), r * length) for debt, r in zip(debts, rates, strict=True)]
    take = [
        max(-debt, Fraction(0)) if r else Fraction(0) for debt, r in zip(debts, rates, strict=True)
    ]
    total = min(sum(give, Fraction(0)), sum(take, Fraction(0)))
    return [a - b for a, b in zip(_first(give, total), _first(take, total), strict=True)]


def _first(amounts: list[Fraction], total: Fraction) -> list[Fraction]:
    """As much of ``amounts``, the largest first, as makes ``total``."""
    out = [Fraction(0)] * len(amounts)
    for i in sorted(range(len(amounts)), key=lambda i: (-amounts[i], i)):
        out[i] = min(amounts[i], total)
        total -= out[i]
    return out
