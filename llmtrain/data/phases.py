"""Mixture phases of a config as stretches of global samples, and how they may change later."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from llmtrain.config.phase_ends import phase_end
from llmtrain.config.schema import PhaseConfig, RunConfig
from llmtrain.data.mixture import Mixture, cut
from llmtrain.data.online import known_until
from llmtrain.data.replay import Replay, with_replay
from llmtrain.data.targets import Stretch
from llmtrain.errors import DataError

# A linear ramp is this many steps of constant weights at most, each of whole blocks; every step
# has the ramp's mean over it, so that the totals are those of the straight line.
RAMP_STEPS = 256


def stretches_of(cfg: RunConfig, total_samples: int, replay: Replay | None = None) -> list[Stretch]:
    """The configured schedule over global samples [0, total_samples).

    replay: the earlier run of ``data.replay``.
    """
    steps = total_samples // cfg.train.global_batch_size
    phases = cfg.data.phases or [PhaseConfig(weights=cfg.data.weights)]
    out: list[Stretch] = []
    start, before = 0, None
    for i, phase in enumerate(phases):
        stop = phase_end(cfg, phase, steps)
        stop = total_samples if i == len(phases) - 1 else min(stop, total_samples)
        weights = _normalised(phase.weights)
        if stop > start:
            if phase.ramp == "linear" and before is not None:
                out += _ramp(start, stop, before, weights, cfg.data.block_size)
            else:
                out.append(Stretch(start, stop, _positive(weights)))
        start, before = max(stop, start), weights
    if replay is not None and cfg.data.replay is not None:
        section, batch = cfg.data.replay, cfg.train.global_batch_size
        begin = section.start.samples(cfg.data.seq_len, batch, steps)
        return with_replay(out, replay, Fraction(str(section.fraction)), begin)
    turn = known_until(cfg, steps, 0)
    if turn is not None and out[-1].start < turn < out[-1].stop:
        # Blocks end where weights change online, so that a change needs to wait for no block.
        last = out.pop()
        out += [Stretch(last.start, turn, last.weights), Stretch(turn, last.stop, last.weights)]
    return out


def _normalised(weights: dict[str, float]) -> dict[str, Fraction]:
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


def _positive(weights: dict[str, Fraction]) -> dict[str, Fraction]:
    return {name: weight for name, weight in weights.items() if weight > 0}


def _ramp(
    start: int, stop: int, old: dict[str, Fraction], new: dict[str, Fraction], block: int
) -> list[Stretch]:
    blocks = -(-(stop - start) // block)
    pieces = min(RAMP_STEPS, blocks)
    edges = [start + min(i * blocks // pieces * block, stop - start) for i in range(pieces)]
    edges.append(stop)
    out = []
    for low, high in itertools.pairwise(edges):
        done = Fraction(low + high - 2 * start, 2 * (stop - start))
        weights = {
            name: old.get(name, Fraction(0)) * (1 - done) + new.get(name, Fraction(0)) * done
            for name in {**old, **new}
        }
        out.append(Stretch(low, high, _positive(weights)))
    return out


def to_json(stretches: Sequence[Stretch]) -> list[dict[str, Any]]:
    """Stretches as JSON values; weights as exact fractions in text."""
    return [
        {"start": s.start, "stop": s.stop, "weights": {n: str(w) for n, w in s.weights.items()}}
        for s in stretches
    ]


def from_json(items: Sequence[dict[str, Any]]) -> list[Stretch]:
    """Inverse of ``to_json``."""
    return [
        Stretch(s["start"], s["stop"], {n: Fraction(w) for n, w in s["weights"].items()})
        for s in items
    ]


def first_difference(old: Sequence[Stretch], new: Sequence[Stretch]) -> int | None:
    """First global sample whose weights or end differ; None when none does.

    Where stretches of equal weights are cut makes no difference.
    """
    old, new = _joined(old), _joined(new)
    for ours, theirs in zip(old, new, strict=False):
        if ours.start != theirs.start or ours.weights != theirs.weights:
            return min(ours.start, theirs.start)
        if ours.stop != theirs.stop:
            return min(ours.stop, theirs.stop)
    if len(old) == len(new):
        return None
    longer = old if len(old) > len(new) else new
    return longer[min(len(old), len(new))].start


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Neighbours of equal weights made one."""
    out: list[Stretch] = []
    for stretch in stretches:
        same = out and out[-1].weights == stretch.weights
        start = out.pop().start if same else stretch.start
        out.append(Stretch(start, stretch.stop, stretch.weights))
    return out


def _phases(stretches: Sequence[Stretch]) -> list[tuple[int, Mapping[str, Fraction]]]:
    return [(stretch.start, stretch.weights) for stretch in _joined(stretches)]


def continue_schedule(
    realised: Mixture, configured: Sequence[Stretch], planned: Sequence[Stretch], consumed: int
) -> list[list[Stretch]]:
    """The schedules of a resumed run: those that were in force, then what is planned now.

    realised: of the run so far; configured: what its config said; planned: what the config says
    now; consumed: global samples already seen. The past must agree; where the future differs the
    new schedule takes over at the next block boundary, since a block that has begun is shuffled
    as a whole. Raises DataError naming the sample where the past differs.
    """
    difference = first_difference(configured, planned)
    schedules = realised.schedules
    if difference is None:
        return schedules
    if difference < consumed:
        raise DataError(
            f"data.phases or data.weights: the schedule differs from sample {difference} on, but "
            f"{consumed} samples have been seen; only the future may change. Put the earlier "
            "weights back (phases in dur move with train.duration), or start a new run under "
            "another name"
        )
    current, end = schedules[-1], planned[-1].stop
    last = [s for s in current if s.start < difference or s is current[0]][-1]
    whole = last.start + (difference - last.start) // realised.block * realised.block
    only_the_end = _phases(configured) == _phases(planned)
    if only_the_end and consumed <= whole:
        # No block seen so far was cut by the end: nothing before it changes.
        kept = [s for s in current if s.start < end or s is current[0]]
        return [*schedules[:-1], [*kept[:-1], Stretch(kept[-1].start, end, kept[-1].weights)]]
    turn = realised.block_end(difference)
    if only_the_end:
        # Weights that were changed online stay as they are.
        planned = [Stretch(0, end, current[-1].weights)]
    past = [schedule for schedule in schedules if schedule[0].start < turn]
    future = [Stretch(max(s.start, turn), s.stop, s.weights) for s in planned if s.stop > turn]
    return [*past, future] if future else [*past[:-1], cut(past[-1], turn)]
