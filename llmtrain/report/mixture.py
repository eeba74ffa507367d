"""Realised against planned mixture.

Planned shares come from the schedule in ``plan.json``; realised ones from the cumulative tokens
per source in the step records. Both are taken over exactly the same stretches, the ones between
logged steps, so that a difference is a difference and not a matter of where one looked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from llmtrain.errors import LlmtrainError
from llmtrain.report.read import Floats, Run, lookup, number

WINDOWS = 120  # most points of a curve
FEW_WINDOWS = 12
WINDOW_SAMPLES = 1024  # a window of fewer samples shows little but the shuffle inside blocks


@dataclass(frozen=True)
class Share:
    """A source within a phase. planned is NaN where the plan says nothing."""

    source: str
    planned: float
    realised: float
    tokens: float


@dataclass(frozen=True)
class PhaseShares:
    """What was planned and what came over the logged stretch of one phase, in tokens."""

    number: int
    start: float
    end: float
    shares: list[Share]


@dataclass(frozen=True)
class Mixture:
    """x: [n] tokens at the middle of each window; realised, planned: source -> [n] shares."""

    x: Floats
    realised: dict[str, Floats]
    planned: dict[str, Floats]
    phases: list[PhaseShares]


@dataclass(frozen=True)
class _Schedule:
    """edges: [m + 1] samples; taken: [m + 1, sources] planned samples before each edge."""

    edges: Floats
    taken: Floats

    def shares(self, low: Floats, high: Floats) -> Floats:
        """Mean planned shares over samples [low, high): [n, sources]; NaN beyond the plan."""
        columns = [
            np.interp(high, self.edges, column, right=math.nan) - np.interp(low, self.edges, column)
            for column in self.taken.T
        ]
        return np.stack(columns, axis=1) / (high - low)[:, None]


def mixture(run: Run) -> Mixture | None:
    """The mixture of a run, or None where its records count no sources."""
    names = run.sources
    position, tokens, counts = _cumulative(run, names)
    if len(position) < 2 or counts[-1].sum() <= 0:
        return None
    windows = min(max(FEW_WINDOWS, int(position[-1]) // WINDOW_SAMPLES), WINDOWS, len(position) - 1)
    cut = np.unique(np.linspace(0, len(position) - 1, windows + 1).round()).astype(np.int64)
    moved = np.diff(counts[cut], axis=0)
    good = moved.sum(axis=1) > 0
    low, high = cut[:-1][good], cut[1:][good]
    shares = moved[good] / moved[good].sum(axis=1, keepdims=True)
    schedule = _schedule(run, names)
    planned = schedule.shares(position[low], position[high]) if schedule else None
    return Mixture(
        (tokens[low] + tokens[high]) / 2,
        {name: shares[:, i] for i, name in enumerate(names)},
        {} if planned is None else {name: planned[:, i] for i, name in enumerate(names)},
        _by_phase(run, schedule, position, tokens, counts),
    )


def _cumulative(run: Run, names: Sequence[str]) -> tuple[Floats, Floats, Floats]:
    """Samples [n], tokens [n] and tokens per source [n, sources] at the logged steps, from 0."""
    rows = [
        [
            number(record.get("samples")),
            number(record.get("tokens")),
            *(number(lookup(record, "sources", name, "tokens")) for name in names),
        ]
        for record in run.steps
    ]
    table = np.array([[0.0] * (len(names) + 2), *rows], dtype=np.float64)
    table[:, 2:] = np.nan_to_num(table[:, 2:])
    table = table[np.isfinite(table).all(axis=1)]
    grows = table[1:, 0] > np.maximum.accumulate(table[:, 0])[:-1]
    table = table[np.concatenate([[True], grows])]
    return table[:, 0], table[:, 1], table[:, 2:]


def _schedule(run: Run, names: Sequence[str]) -> _Schedule | None:
    """The stretches of constant weights in ``plan.json``; None where there are none.

    ``realised`` there is the schedule in force, which is the configured one unless a resume
    changed its future.
    """
    stretches = run.plan.get("realised") or run.plan.get("configured")
    edges, taken = [0.0], [np.zeros(len(names))]
    for stretch in stretches if isinstance(stretches, list) else ():
        stop, weights = number(lookup(stretch, "stop")), lookup(stretch, "weights")
        if not isinstance(weights, dict) or not stop > edges[-1]:
            return None
        share = np.array([_fraction(weights.get(name, 0)) for name in names])
        taken.append(taken[-1] + share * (stop - edges[-1]))
        edges.append(stop)
    return _Schedule(np.array(edges), np.array(taken)) if len(edges) > 1 else None


def _fraction(value: object) -> float:
    try:
        return float(Fraction(str(value)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan


def _phase_edges(run: Run, schedule: _Schedule | None, seen: float) -> list[float]:
    """Samples where phases begin and end: the config's, as a ramp has many stretches."""
    from llmtrain.config import load_config
    from llmtrain.config.phase_ends import phase_end

    if schedule is None:
        return [0.0, seen]
    total = float(schedule.edges[-1])
    try:
        cfg = load_config(run.path / "config.yaml")
    except LlmtrainError:
        return [0.0, total]
    batch = cfg.train.global_batch_size
    ends = [phase_end(cfg, phase, int(total) // batch) for phase in cfg.data.phases[:-1]]
    return sorted({0.0, *(float(end) for end in ends if 0 < end < total), total})


def _by_phase(
    run: Run, schedule: _Schedule | None, position: Floats, tokens: Floats, counts: Floats
) -> list[PhaseShares]:
    """Shares per phase between the logged steps nearest inside its ends."""
    edges = _phase_edges(run, schedule, float(position[-1]))
    rows = []
    for i, (start, end) in enumerate(pairwise(edges), 1):
        a = int(np.searchsorted(position, start, side="left"))
        b = int(np.searchsorted(position, end, side="right")) - 1
        total = float((counts[b] - counts[a]).sum()) if a < b else 0.0
        if total <= 0:
            continue
        planned = np.full((1, counts.shape[1]), math.nan)
        if schedule is not None:
            planned = schedule.shares(position[a : a + 1], position[b : b + 1])
        shares = [
            Share(name, float(planned[0, j]), moved / total, moved)
            for j, (name, moved) in enumerate(
                zip(run.sources, (counts[b] - counts[a]).tolist(), strict=True)
            )
        ]
        rows.append(PhaseShares(i, float(tokens[a]), float(tokens[b]), shares))
    return rows
