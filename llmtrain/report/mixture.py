"""Realised against planned mixture.

Planned shares come from the phases in ``plan.json``; realised ones from the cumulative tokens
per source in the step records. Both are taken over exactly the same stretches, the ones between
logged steps, so that a difference is a difference and not a matter of where one looked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain.report.read import Floats, Run, lookup, number

WINDOWS = 120  # most points of a curve
FEW_WINDOWS = 12
WINDOW_SAMPLES = 1024  # a window of fewer samples shows little but the shuffle inside blocks


@dataclass(frozen=True)
class Phase:
    """A stretch [start, end) of samples. first, last: weights at its ends, source -> share."""

    start: float
    end: float
    first: dict[str, float]
    last: dict[str, float]


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


def mixture(run: Run) -> Mixture | None:
    """The mixture of a run, or None where its records count no sources."""
    names = run.sources
    position, tokens, counts = _cumulative(run, names)
    if len(position) < 2 or counts[-1].sum() <= 0:
        return None
    phases = _phases(run)
    windows = min(max(FEW_WINDOWS, int(position[-1]) // WINDOW_SAMPLES), WINDOWS, len(position) - 1)
    at = np.unique(np.linspace(0, len(position) - 1, windows + 1).round())
    cut = at.astype(np.int64)
    moved = np.diff(counts[cut], axis=0)
    total = moved.sum(axis=1)
    good = total > 0
    shares = moved[good] / total[good, None]
    planned = np.array(
        [
            [_planned(phases, name, position[a], position[b]) for name in names]
            for a, b in zip(cut[:-1][good], cut[1:][good], strict=True)
        ]
    )
    middle = (tokens[cut[:-1]] + tokens[cut[1:]])[good] / 2
    return Mixture(
        middle,
        {name: shares[:, i] for i, name in enumerate(names)},
        {name: planned[:, i] for i, name in enumerate(names)} if phases else {},
        _by_phase(phases, names, position, tokens, counts),
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
    return table[:, 0], table[:, 1], table[:, 2:]


def _phases(run: Run) -> list[Phase]:
    """Phases of ``plan.json`` with weights that sum to 1; empty where there are none."""
    found: list[Phase] = []
    start, before = 0.0, None
    entries = run.plan.get("phases")
    for entry in entries if isinstance(entries, list) else ():
        end = number(lookup(entry, "end_sample"))
        weights = _normalised(lookup(entry, "weights"))
        if not (math.isfinite(end) and weights):
            return []
        linear = lookup(entry, "ramp") == "linear" and before is not None
        first = before if linear and before is not None else weights
        found.append(Phase(start, end, first, weights))
        start, before = end, weights
    return found


def _normalised(weights: object) -> dict[str, float]:
    if not isinstance(weights, dict):
        return {}
    total = math.fsum(number(w) for w in weights.values())
    return {k: number(w) / total for k, w in weights.items()} if total > 0 else {}


def _planned(phases: Sequence[Phase], name: str, start: float, end: float) -> float:
    """Mean planned share of a source over samples [start, end)."""
    total = covered = 0.0
    for phase in phases:
        low, high = max(start, phase.start), min(end, phase.end)
        if high <= low:
            continue
        first, last = phase.first.get(name, 0.0), phase.last.get(name, 0.0)
        middle = ((low + high) / 2 - phase.start) / (phase.end - phase.start)
        total += (first + (last - first) * middle) * (high - low)
        covered += high - low
    return total / covered if covered else math.nan


def _by_phase(
    phases: Sequence[Phase], names: Sequence[str], position: Floats, tokens: Floats, counts: Floats
) -> list[PhaseShares]:
    """Shares per phase between the logged steps nearest inside its ends; one row without plan."""
    whole = Phase(0.0, float(position[-1]), {}, {})
    rows = []
    for i, phase in enumerate(phases or [whole], 1):
        a = int(np.searchsorted(position, phase.start, side="left"))
        b = int(np.searchsorted(position, phase.end, side="right")) - 1
        if b <= a:
            continue
        moved = counts[b] - counts[a]
        total = float(moved.sum())
        shares = [
            Share(
                name,
                _planned(phases, name, float(position[a]), float(position[b])),
                float(moved[j]) / total if total else math.nan,
                float(moved[j]),
            )
            for j, name in enumerate(names)
        ]
        rows.append(PhaseShares(i, float(tokens[a]), float(tokens[b]), shares))
    return rows
