"""Sweeps of a hyperparameter over sizes of a model: where the optimum lies, and how it moves."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from llmtrain.train.console import table

# Label -> for each seed, domain -> held-out loss, as in ``results``.
Losses = dict[str, list[dict[str, float]]]
_COLORS = ("#2a78d6", "#d9641a", "#12936a", "#c2860a", "#6a4fc4", "#d43b3a")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 380, 300, 60, 40, 60


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a kind of model, its size, and the value of what is swept."""

    kind: str
    size: int
    value: float

    @property
    def label(self) -> str:
        """Its row among the runs of the experiment."""
        return f"{self.kind} {self.size} at {self.value:.3g}"


@dataclass(frozen=True)
class Expectation:
    """What the paper says of a kind. steps: of the grid; stays: the best values of all sizes lie
    within so many of each other; else the largest size's lies at least so many below the
    smallest's. paper: log2 of the optimum per doubling of the size, None where it says nothing."""

    text: str
    stays: bool
    steps: float
    paper: float | None = None


@dataclass(frozen=True)
class Sweep:
    """knob, size: names of what is swept and of the size. points: scale -> runs, values of a kind
    on a grid of equal factors. expects: kind -> what should come out."""

    knob: str
    size: str
    points: Callable[[str], list[Point]]
    expects: Mapping[str, Expectation]


@dataclass(frozen=True)
class Optimum:
    """The best value of one size. place: its index on the grid. exact: the place refined by the
    parabola through it and its neighbours. edge: whether the grid ends there."""

    size: int
    value: float
    place: int
    exact: float
    edge: bool


def optimum(size: int, values: Sequence[float], losses: Sequence[float]) -> Optimum:
    """The minimum of a curve. Losses that are not finite count as the worst."""
    usable = [x if math.isfinite(x) else math.inf for x in losses]
    i = min(range(len(usable)), key=lambda k: usable[k])
    edge = i in (0, len(usable) - 1)
    exact = float(i)
    if not edge and math.isfinite(usable[i - 1] + usable[i + 1]):
        left, middle, right = usable[i - 1 : i + 2]
        bend = left - 2 * middle + right
        exact += 0.5 * (left - right) / bend if bend else 0.0
    return Optimum(size, values[i], i, exact, edge)


@dataclass(frozen=True)
class Movement:
    """The optima of a kind, smallest size first, and what was expected of them."""

    kind: str
    expects: Expectation
    grid: Sequence[float]
    optima: Sequence[Optimum]

    @property
    def slope(self) -> float:
        """log2 of the best value per doubling of the size, by least squares."""
        x = [math.log2(o.size) for o in self.optima]
        step = math.log2(self.grid[1] / self.grid[0])
        y = [step * o.exact for o in self.optima]
        middle_x, middle_y = mean(x), mean(y)
        top = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
        return top / sum((a - middle_x) ** 2 for a in x)

    @property
    def word(self) -> str:
        """holds, does not hold, or why it cannot be told."""
        places = [o.place for o in self.optima]
        if self.expects.stays:
            if any(o.edge for o in self.optima):
                return "cannot be told: the grid ends at an optimum"
            return _word(max(places) - min(places) <= self.expects.steps)
        return _word(places[0] - places[-1] >= self.expects.steps)


def _word(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def movements(sweep: Sweep, losses: Losses, scale: str) -> list[Movement]:
    """The optimum of every kind and size, of losses averaged over seeds and domains."""
    found = []
    points = sweep.points(scale)
    for kind, expects in sweep.expects.items():
        own = [p for p in points if p.kind == kind]
        grid = sorted({p.value for p in own})
        optima = [
            optimum(size, grid, [_loss(losses, Point(kind, size, v)) for v in grid])
            for size in sorted({p.size for p in own})
        ]
        found.append(Movement(kind, expects, grid, optima))
    return found


def _loss(losses: Losses, point: Point) -> float:
    return mean(mean(seed.values()) for seed in losses[point.label])


def sweep_lines(title: str, sweep: Sweep, losses: Losses, paper: Sequence[str]) -> list[str]:
    """The result of a miniature: a table per kind, the movements and the verdict."""
    seeds = len(next(iter(losses.values())))
    lines = [f"{title} (mini, {seeds} seed{'s' * (seeds > 1)}; held-out loss, nats per token)"]
    moved = movements(sweep, losses, "mini")
    for move in moved:
        rows = [(f"{move.kind}: {sweep.size}", *(f"{v:.3g}" for v in move.grid), "best")]
        for best in move.optima:
            cells = (_loss(losses, Point(move.kind, best.size, v)) for v in move.grid)
            mark = f"{best.value:.3g}" + (" (edge)" if best.edge else "")
            rows.append((str(best.size), *(f"{x:.4f}" for x in cells), mark))
        lines += table(rows)
    rows = [("claim", "best values by size", f"slope in {sweep.size}", "paper", "")]
    for move in moved:
        best_values = ", ".join(f"{o.value:.3g}" for o in move.optima)
        said = "" if move.expects.paper is None else f"{move.expects.paper:+.2f}"
        rows.append((move.expects.text, best_values, f"{move.slope:+.2f}", said, move.word))
    lines += [*table(rows), *paper, f"verdict: {sweep_verdict(moved)}"]
    return lines


def sweep_verdict(moved: Sequence[Movement]) -> str:
    """The sentence computed from the movements."""
    wrong = [f"{m.expects.text}: {m.word}" for m in moved if m.word != "holds"]
    if not wrong:
        return "direction holds at this scale"
    return f"direction does not hold at this scale ({'; '.join(wrong)})"


def sweep_svg(title: str, sweep: Sweep, losses: Losses) -> str:
    """An SVG file's text: a panel per kind, a curve per size, a ring around each optimum."""
    moved = movements(sweep, losses, "mini")
    total = _WIDTH * len(moved)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{total}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="16" font-weight="bold">{html.escape(title)}</text>',
    ]
    for i, move in enumerate(moved):
        parts += _panel(move, sweep, losses, i * _WIDTH)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(move: Movement, sweep: Sweep, losses: Losses, start: int) -> list[str]:
    curves = [[_loss(losses, Point(move.kind, o.size, v)) for v in move.grid] for o in move.optima]
    finite = [x for curve in curves for x in curve if math.isfinite(x)]
    low = min(finite)
    # Runs far off would flatten the rest: what lies beyond is drawn at the top.
    high = min(max(finite), low + 4 * (max(min(curve) for curve in curves) - low + 0.1))
    last = max(len(move.grid) - 1, 1)

    def x(k: int) -> float:
        return start + _LEFT + k / last * (_WIDTH - _LEFT - 20)

    def y(value: float) -> float:
        clear = value if math.isfinite(value) else high
        share = (high - min(clear, high)) / (high - low or 1.0)
        return _TOP + share * (_HEIGHT - _TOP - _BOTTOM)

    base = _HEIGHT - _BOTTOM
    name = html.escape(f"{move.kind}: held-out loss by {sweep.knob}")
    parts = [f'<text x="{start + _LEFT}" y="31" fill="#5d626c">{name}</text>']
    for k, value in enumerate(move.grid):
        parts.append(
            f'<text x="{x(k):.1f}" y="{base + 18}" text-anchor="middle">{value:.2g}</text>'
        )
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        parts.append(
            f'<text x="{start + _LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{value:.2f}</text>"
        )
    for j, (best, curve) in enumerate(zip(move.optima, curves, strict=True)):
        color = _COLORS[j % len(_COLORS)]
        dots = " ".join(f"{x(k):.1f},{y(value):.1f}" for k, value in enumerate(curve))
        parts.append(f'<polyline points="{dots}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(
            f'<circle cx="{x(best.place):.1f}" cy="{y(curve[best.place]):.1f}" r="5" '
            f'fill="white" stroke="{color}" stroke-width="2"/>'
        )
        parts.append(
            f'<text x="{start + _LEFT + 75 * j}" y="{_HEIGHT - 14}" fill="{color}">'
            f"{html.escape(sweep.size)} {best.size}</text>"
        )
    return parts
