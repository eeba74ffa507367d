"""How many samples of each source lie before a block boundary: the nearest whole numbers.

The target of a source after t samples, T(t), is the sum of its weights so far. Its count must be T
rounded down or up at every block boundary, so that it is less than one sample off; counts may
never fall, and they sum to t. Rounding each boundary by itself breaks the second demand. Dealing
samples one by one, always to the source whose next one is due first, meets all three (Tijdeman,
"The chairman assignment problem", 1980), but sample 10^9 then takes 10^9 steps. Here time is
halved instead, and each choice in the middle is made such that both halves stay possible.

Words. At time t a source is *between* two whole numbers unless T(t) is one; it is *up* if its
count is T rounded up. It is *due* when T next reaches a whole number: by then it must be up. It
was *released* when T last was one: up to then it could not be up. f is the fraction of T.

Rule. A state (who is up) at time t is sound if, with sums over the fractions at t,
    (1) among the sources due after b, at most ceil(sum of f) are up, for every b > t;
    (2) among the sources released before a, at least floor(sum of f) are up, for every a < t.

Theorem. Let the states at lo < hi be sound ((1) for b < hi at lo; (2) for a > lo at hi) and no
count fall from lo to hi. Then for every t between there is a state that is sound ((1) for b < hi,
(2) for a > lo) and above the one at lo and below the one at hi. So halving never gets stuck.

Proof. U_b: the sources between at t and due after b; V_a: those released before a. U_b shrinks as
b grows, V_a grows with a: (1) and (2) are capacities and demands along two chains, and the states
are the integral flows from one to the other, with the source's own arc fixed to 1 in W+ (up at lo,
not due by t) and to 0 in W- (not up at hi, not due before hi). By Hoffman's theorem there is
one unless a cut forbids it, and a cut that is not already implied by another is a pair (U_b, V_a),
either of which may be empty or everything:
    floor(f(V_a)) <= ceil(f(U_b)) + |V_a - U_b - W-| - |(U_b - V_a) & W+|.
W- lies in every U_b and W+ in every V_a, so for non-empty pairs the right side is ceil(f(U_b)) +
|V_a - U_b|, and the fractions themselves show that it is enough. Without U it says that at least
floor(f(V_a)) sources of V_a are outside W-: that is (2) at hi, as fractions only grow until then.
Without V it is (1) at lo in the same way. With hi at infinity W- is empty and nothing else changes.

Choice. Go through the sources in the order of their release and add up f. Whenever the sum passes
a whole number, the released source that is due first goes up; those of W+ before all others, those
of W- never. The demands (2) are slots, the sources that may fill a slot become more from one to
the next: a matroid, whose greedy choice has, for every b, the fewest members due after b. If any
state is sound, this one is.

Nothing here needs constant weights: phases, ramps, weights of 0 and new sources are kinks of T. The
ends of the pieces of T are chosen one after another (hi at infinity, dues from the whole schedule,
whose last piece goes on for ever, so that lengthening it changes nothing); in the last piece 1, 2,
4, ... blocks; everything else by halving. A boundary costs log2(blocks) choices over the sources.
A schedule of more than 1,024 blocks makes the first, at most some thousand, at the start and keeps
them: for 10^6 blocks of 50 sources a tenth of a second and 5 MB. It is a cache: it changes nothing.

A source of weight 0 is never due and may only wait. A sample that is owed to it could by the rule
be dealt late; so it stays as it is wherever a sound state allows it, and when weights become 0, as
many of those sources are up as they are owed together.

A schedule that starts with errors of an earlier one (a plan changed on resume) may have no sound
start. No method can then promise 1: of 2m sources at fraction 1/2, m are up; drop just these, and
when the others' targets, equal, have the fraction 1/2 - 1/m, one of them is 3/2 - 1/m behind. Then
the part of the errors that is needed for a sound start moves into the targets, and is paid back as
fast as weights allow (``repaid``): the error is below 1 plus what is not yet paid, and below 2 for
errors below 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.targets import NEVER, Piece, Stretch, Targets, repaid

# Middles of spans of more than so many blocks are found at the start and kept; of longer schedules
# about as many in all. Of the other boundaries as many as ``_REMEMBERED`` are, and as many older
# ones while they are asked for again.
_SPAN = 1024
_KEPT = 1024
_REMEMBERED = 256
# Samples beyond every run.
_FAR = 1 << 50
# Due sample of a source that may not go up.
_BARRED = NEVER + 1


class _State(NamedTuple):
    """A sample number; count, target rounded down and what the target is above that, by source."""

    sample: int
    counts: list[int]
    floors: list[int]
    parts: list[int]


class Apportionment:
    """Counts per source since the beginning of a schedule.

    names: every source that has weight or error, in alphabetical order: the order of ``counts``.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        block: int,
        errors: Mapping[str, Fraction] | None = None,
        used: int | None = None,
    ) -> None:
        """stretches: consecutive, each cut into blocks of ``block`` samples from its start.

        errors: count minus target when the schedule begins, summing to 0. used: sample up to which
        counts will be asked for most; they are prepared.
        """
        ahead = {name: error for name, error in (errors or {}).items() if error}
        self.names = sorted({*ahead, *(name for s in stretches for name in s.weights)})
        self._block = block
        nothing = Fraction(0)
        pieces = [
            Piece(s.start, s.stop, [s.weights.get(name, nothing) for name in self.names])
            for s in stretches
        ]
        # Counts may not depend on the end, so that a longer last phase changes nothing.
        pieces[-1] = Piece(pieces[-1].start, _FAR, pieces[-1].rates)
        owed = [ahead.get(name, nothing) for name in self.names]
        for eighths in range(9):
            moved = [error * eighths / 8 for error in owed]
            first = [part - error for part, error in zip(moved, owed, strict=True)]
            self._targets = Targets(repaid(pieces, moved, block) if any(moved) else pieces, first)
            targets = self._targets
            start = _State(pieces[0].start, [0] * len(owed), targets.floors[0], targets.parts[0])
            if max(map(abs, first)) < 1 and self._good_start(start):
                break
        self._ends = [start]
        for piece, sample in enumerate(self._targets.starts[1:]):
            self._ends.append(self._open(piece, self._ends[-1], sample))
        self._powers = [self._ends[-1]]
        self._kept: dict[tuple[int, int], _State] = {}
        self._known: dict[tuple[int, int], _State] = {}
        self._older: dict[tuple[int, int], _State] = {}
        stop = stretches[-1].stop if used is None else used
        blocks = (stop - stretches[0].start) // block
        self._span = max(_SPAN, -(-blocks // _KEPT))
        self._keep_middles(stop)

    def _keep_middles(self, stop: int) -> None:
        """Find the kept boundaries before sample ``stop``: no other then takes many choices."""
        block, last = self._block, len(self._ends) - 1
        spans = [
            (piece, 0, -((low.sample - high.sample) // block))
            for piece, (low, high) in enumerate(itertools.pairwise(self._ends))
        ]
        end = (stop - self._ends[last].sample) // block
        spans += [(last, 1 << bit, 2 << bit) for bit in range(max(end, 0).bit_length())]
        while spans:
            piece, first, final = spans.pop()
            middle = (first + final) // 2
            if final - first > self._span and (piece < last or first < end):
                self._boundary(piece, middle)
                spans += [(piece, first, middle), (piece, middle, final)]

    def counts(self, sample: int) -> NDArray[np.int64]:
        """[sources] int64, summing to the samples from the beginning to ``sample``."""
        piece = self._targets.piece(sample)
        blocks, rest = divmod(sample - self._targets.starts[piece], self._block)
        low = self._boundary(piece, blocks)
        if rest:
            low = self._between(piece, low, sample, self._boundary(piece, blocks + 1))
        return np.array(low.counts, np.int64)

    def _boundary(self, piece: int, q: int) -> _State:
        """After ``q`` blocks of a piece. Some are remembered: neighbours are found faster."""
        start, block = self._targets.starts[piece], self._block
        if piece + 1 < len(self._ends):
            first, low, high = 0, self._ends[piece], self._ends[piece + 1]
            last = -((start - high.sample) // block)
            if q in (first, last):
                return high if q else low
        else:
            bits = q.bit_length()
            low = self._power(bits)
            first = 1 << bits >> 1
            if q == first:
                return low
            last, high = 1 << bits, self._power(bits + 1)
        while True:
            at = (first + last) // 2
            place = piece, at
            middle = self._kept.get(place) or self._known.get(place)
            if middle is None:
                middle = self._older.get(place) or self._between(
                    piece, low, start + at * block, high
                )
                self._remember(place, middle, last - first > self._span)
            if q == at:
                return middle
            if q < at:
                last, high = at, middle
            else:
                first, low = at, middle

    def _remember(self, place: tuple[int, int], state: _State, keep: bool) -> None:
        if keep:
            self._kept[place] = state
            return
        if len(self._known) >= _REMEMBERED:
            self._known, self._older = {}, self._known
        self._known[place] = state

    def _power(self, index: int) -> _State:
        """After 2^(index - 1) blocks of the last piece; index 0: its start."""
        powers, piece = self._powers, len(self._ends) - 1
        while len(powers) <= index:
            sample = self._ends[-1].sample + (self._block << len(powers) - 1)
            powers = [*powers, self._open(piece, powers[-1], sample)]
        self._powers = powers
        return powers[index]

    def _between(self, piece: int, low: _State, sample: int, high: _State) -> _State:
        """The state at ``sample`` between two states of a piece."""
        unit, gap, end, n = self._targets.unit, sample - low.sample, high.sample, len(self.names)
        floors, parts, early, later, owed = [], [], [], [], 0
        for i, rate, before, floor, count, most, top in zip(
            range(n),
            self._targets.rates[piece],
            low.parts,
            low.floors,
            low.counts,
            high.counts,
            high.floors,
            strict=True,
        ):
            part = before + rate * gap
            if part < unit:
                # Nothing was released since ``low``.
                owed += part
                if count > floor:
                    early.append(i - n)
                elif part and top > floor:
                    early.append((sample - (part - unit) // rate) * n + i)
                elif most > floor:
                    early.append(end * n + i)
                floors.append(floor)
                parts.append(part)
                continue
            more, left = divmod(part, unit)
            now = floor + more
            if left:
                if top > now:
                    due = sample - (left - unit) // rate
                else:
                    due = end if most > now else _BARRED
                later.append((sample + -left // rate, i, due * n + i))
            floors.append(now)
            parts.append(left)
        counts = _deal(floors, parts, early, later, owed, unit)
        assert counts is not None
        return _State(sample, counts, floors, parts)

    def _open(self, piece: int, low: _State, sample: int) -> _State:
        """The state at ``sample``, after ``low`` in ``piece``; no later state is known."""
        targets = self._targets
        unit, rates = targets.unit, targets.rates[piece]
        floors, parts = targets.at(piece, sample)
        after = targets.piece(sample)
        dues = targets.due(after, sample, floors, parts)
        still = [
            _BARRED if rate == 0 and count == floor else due
            for rate, count, floor, due in zip(rates, low.counts, floors, dues, strict=True)
        ]
        counts = _settle(low, sample, floors, parts, rates, still, unit)
        # Of the sources that stop here, as many go up as they are owed together.
        stopped = [i for i, rate in enumerate(targets.rates[after]) if not rate and parts[i]]
        stopped.sort(key=lambda i: -parts[i])
        owed = sum(parts[i] for i in stopped) // unit
        best = counts
        while counts is not None and _sound(counts, floors, parts, dues, unit):
            best = counts
            short = owed - sum(counts[i] - floors[i] for i in stopped)
            free = [i for i in stopped if counts[i] == floors[i] and sample < still[i] < _BARRED]
            if short <= 0 or not free:
                break
            for i in stopped:
                if counts[i] > floors[i] or i in free[:short]:
                    still[i] = sample
            counts = _settle(low, sample, floors, parts, rates, still, unit)
        if best is None or not _sound(best, floors, parts, dues, unit):
            best = _settle(low, sample, floors, parts, rates, dues, unit)
            assert best is not None
        return _State(sample, best, floors, parts)

    def _good_start(self, start: _State) -> bool:
        """Whether the state at the beginning is sound, and stopped sources owe nothing more."""
        targets, parts = self._targets, self._targets.parts[0]
        dues = targets.due(0, start.sample, start.floors, parts)
        stopped = [i for i, rate in enumerate(targets.rates[0]) if not rate and parts[i]]
        up = sum(start.counts[i] - start.floors[i] for i in stopped)
        owed = sum(parts[i] for i in stopped) // targets.unit
        return up >= owed and _sound(start.counts, start.floors, parts, dues, targets.unit)


def _settle(
    low: _State,
    sample: int,
    floors: list[int],
    parts: list[int],
    rates: list[int],
    dues: list[int],
    unit: int,
) -> list[int] | None:
    """The counts at ``sample`` by the rule above; None if too few sources may go up.

    floors, parts: of the targets. dues: _BARRED: the source may not go up.
    """
    n, owed, early, later = len(floors), 0, [], []
    for i, part in enumerate(parts):
        # Sources that are up already come first of all.
        key = i - n if low.counts[i] > floors[i] else dues[i] * n + i
        if low.floors[i] == floors[i]:
            owed += part
            if part and key < _BARRED * n:
                early.append(key)
        elif part:
            later.append((sample + -part // rates[i], i, key))
    return _deal(floors, parts, early, later, owed, unit)


def _deal(
    floors: list[int],
    parts: list[int],
    early: list[int],
    later: list[tuple[int, int, int]],
    owed: int,
    unit: int,
) -> list[int] | None:
    """The greedy choice; keys are a due sample times the sources, plus the source.

    early: keys of the sources released before the last state; owed: the sum of the parts of all of
    those, also of the ones that may not go up. later: (released, source, key) of the others.
    """
    counts, n = floors.copy(), len(floors)
    never = _BARRED * n
    heapify(early)
    later.sort()
    for _ in range(owed // unit):
        if not early:
            return None
        counts[heappop(early) % n] += 1
    owed %= unit
    for _, i, key in later:
        if key < never:
            heappush(early, key)
        owed += parts[i]
        if owed >= unit:
            if not early:
                return None
            owed -= unit
            counts[heappop(early) % n] += 1
    return counts


def _sound(
    counts: list[int], floors: list[int], parts: list[int], dues: list[int], unit: int
) -> bool:
    """Whether at most ceil(sum of fractions) of the sources due after b are up, for every b."""
    up = total = 0
    order = sorted((i for i, part in enumerate(parts) if part), key=lambda i: -dues[i])
    for place, i in enumerate(order):
        up += counts[i] - floors[i]
        total += parts[i]
        ended = place + 1 == len(order) or dues[order[place + 1]] < dues[i]
        if ended and up > -(-total // unit):
            return False
    return True
