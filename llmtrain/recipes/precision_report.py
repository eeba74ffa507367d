"""Tables, plot and verdict of the scaling laws for precision, from a grid of losses."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from llmtrain.analysis.precision_laws import (
    FULL,
    KINDS,
    PrecisionLaw,
    Rounded,
    RoundingLaw,
    Run,
    best_precision,
    explained,
    fit_precision_law,
    fit_rounding_law,
)
from llmtrain.recipes.results import error_bound
from llmtrain.train.console import table

if TYPE_CHECKING:
    from llmtrain.recipes.experiment import Experiment

Cell = Run
Rise = Rounded
# Every so many quantised runs one is left out of the fit that predicts it.
FOLDS = 4
LOWEST = 1.0
ENOUGH = 0.8
_COLORS = ("#2a78d6", "#d9641a", "#12936a")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 380, 300, 60, 46, 50


class Grid(NamedTuple):
    """Trained models, and the full-precision ones rounded afterwards."""

    cells: list[Cell]
    rises: list[Rise]


class Verdict(NamedTuple):
    """A claim, what was found, and whether it holds; decides: part of the verdict."""

    claim: str
    found: str
    holds: bool
    decides: bool = True


def _full(cell: Cell) -> bool:
    return cell.bits == (FULL,) * 3


def _alone(cell: Cell, kind: int) -> bool:
    """Whether ``kind`` alone is quantised."""
    return [i for i, b in enumerate(cell.bits) if b < FULL] == [kind]


def costs(cells: Sequence[Cell], kind: int) -> dict[float, float]:
    """Bits of ``kind`` alone -> mean rise of the loss over the same models in full precision."""
    base = {(c.n, c.d): c.loss for c in cells if _full(c)}
    found: dict[float, list[float]] = {}
    for cell in cells:
        if _alone(cell, kind):
            found.setdefault(cell.bits[kind], []).append(cell.loss - base[cell.n, cell.d])
    return {bits: mean(found[bits]) for bits in sorted(found)}


def held_out(cells: Sequence[Cell], near: PrecisionLaw) -> tuple[float, float]:
    """R^2 of losses of quantised runs, each predicted by a fit without its fold: by the law, and by
    the law of N and D alone. near: the fit of all, where those begin."""
    few = [c for c in cells if not _full(c)]
    rest = [c for c in cells if _full(c)]
    targets: list[float] = []
    by_law: list[float] = []
    by_size: list[float] = []
    for fold in range(FOLDS):
        left = few[fold::FOLDS]
        used = [*rest, *(c for c in few if c not in left)]
        blind = fit_precision_law([c._replace(bits=(FULL,) * 3) for c in used], near)
        law = fit_precision_law(used, near)
        targets += [c.loss for c in left]
        by_law += [law.loss(c.n, c.d, c.bits) for c in left]
        by_size += [blind.loss(c.n, c.d, (FULL,) * 3) for c in left]
    return explained(targets, by_law), explained(targets, by_size)


def fewest_against_most(cells: Sequence[Cell], kind: int) -> tuple[float, float]:
    """What the fewest bits of ``kind`` cost more than the most, mean over models, and its bound."""
    found = {(c.n, c.d, c.bits[kind]): c.loss for c in cells if _alone(c, kind)}
    bits = sorted({b for _, _, b in found})
    models = sorted({(n, d) for n, d, _ in found})
    gaps = [found[n, d, bits[0]] - found[n, d, bits[-1]] for n, d in models]
    return mean(gaps), error_bound(gaps)


def verdicts(
    grid: Grid, law: PrecisionLaw, rounding: RoundingLaw, r2: tuple[float, float]
) -> list[Verdict]:
    """The claims against the numbers."""
    gaps = [fewest_against_most(grid.cells, kind) for kind in range(3)]
    every = [costs(grid.cells, kind) for kind in range(3)]
    low, high = min(every[0]), max(every[0])
    least = [found[low] for found in every]
    sizes, lengths = [c.n for c in grid.cells], [c.d for c in grid.cells]
    budgets = (6 * min(sizes) * min(lengths), 6 * max(sizes) * max(lengths))
    best = [best_precision(law, c).bits for c in budgets]
    inside = all(LOWEST < b < FULL for b in best)
    return [
        Verdict(
            f"{low:.0f} bits cost more than {high:.0f}, of each kind (95% bound over models)",
            ", ".join(f"{k} {g:+.3f} ({b:.3f})" for k, (g, b) in zip(KINDS, gaps, strict=True)),
            all(gap > bound for gap, bound in gaps),
        ),
        Verdict(
            f"N_eff predicts quantised runs left out: R2 at least {ENOUGH}, above N and D alone",
            f"R2 {r2[0]:.3f}, alone {r2[1]:.3f}",
            r2[0] >= ENOUGH and r2[0] > r2[1],
        ),
        Verdict(
            "rounding after training costs more after more tokens",
            f"D^{rounding.gamma_d:.2f}",
            rounding.gamma_d > 0,
        ),
        Verdict(
            "and less for a larger model", f"N^{-rounding.gamma_n:.2f}", rounding.gamma_n > 0, False
        ),
        Verdict(
            f"at {low:.0f} bits weights lose most and keys and values least",
            ", ".join(f"{n} {v:+.3f}" for n, v in zip(KINDS, least, strict=True)),
            least[0] == max(least) and least[2] == min(least),
            False,
        ),
        Verdict(
            "the best precision lies inside 1 to 16 bits and moves less than a bit with compute",
            f"{best[0]:.1f} to {best[1]:.1f} bits",
            inside and abs(best[0] - best[1]) <= 1,
            False,
        ),
    ]


def precision_lines(grid: Grid, law: PrecisionLaw, experiment: Experiment) -> list[str]:
    """Everything that is printed and written at the end; law: fitted to the grid's cells."""
    rounding, r2 = fit_rounding_law(grid.rises), held_out(grid.cells, law)
    lines = [f"{experiment.title} (mini, {len(grid.cells)} runs; held-out loss, nats per token)"]
    sizes, lengths = sorted({c.n for c in grid.cells}), sorted({c.d for c in grid.cells})
    base = {(c.n, c.d): c.loss for c in grid.cells if _full(c)}
    rows = [("full precision: parameters", *(f"{d:,.0f} tokens" for d in lengths))]
    rows += [(f"{n:,.0f}", *(f"{base[n, d]:.4f}" for d in lengths)) for n in sizes]
    lines += table(rows)
    every = {kind: costs(grid.cells, i) for i, kind in enumerate(KINDS)}
    bits = list(every["weights"])
    rows = [("rise of the loss by few bits", *(f"{b:.0f} bits" for b in bits))]
    rows += [(kind, *(f"{found[b]:+.4f}" for b in bits)) for kind, found in every.items()]
    lines += table(rows)
    rises: dict[float, list[float]] = {}
    for rise in grid.rises:
        rises.setdefault(rise.bits, []).append(rise.rise)
    rows = [("rounded after training", *(f"{b:.0f} bits" for b in rises))]
    rows.append(("mean rise", *(f"{mean(values):+.4f}" for values in rises.values())))
    lines += table(rows)
    g = ", ".join(f"{kind} {x:.2f}" for kind, x in zip(KINDS, law.g, strict=True))
    lines += [
        f"N_eff law: {law.a:.3g} N_eff^-{law.alpha:.3f} + {law.b:.3g} D^-{law.beta:.3f} + "
        f"{law.e:.3f}; g of {g}",
        f"rounding: {rounding.c:.3g} D^{rounding.gamma_d:.3f} N^{-rounding.gamma_n:.3f} "
        f"exp(-P / {rounding.g:.3f})",
    ]
    found = verdicts(grid, law, rounding, r2)
    rows = [("claim", "found", "")]
    for v in found:
        beside = "" if v.decides else " [beside the verdict]"
        rows.append((v.claim + beside, v.found, "holds" if v.holds else "does not hold"))
    lines += [*table(rows), *experiment.paper, f"verdict: {_sentence(found)}"]
    return lines


def _sentence(found: Sequence[Verdict]) -> str:
    wrong = "; ".join(v.claim for v in found if v.decides and not v.holds)
    if not wrong:
        return "direction holds at this scale"
    return f"direction does not hold at this scale ({wrong})"


def precision_svg(grid: Grid, law: PrecisionLaw, title: str) -> str:
    """An SVG file's text: left, losses against the law's; right, the rise by bits of each kind with
    the law's curve."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{2 * _WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="16" font-weight="bold">{html.escape(title)}</text>',
    ]
    pairs = [(law.loss(c.n, c.d, c.bits), c.loss, _kind(c)) for c in grid.cells]
    ends = [x for p, t, _ in pairs for x in (p, t)]
    parts += _frame(0, "loss by the law", "loss", (min(ends), max(ends)), (min(ends), max(ends)))
    low, high = min(ends), max(ends)
    for predicted, loss, kind in pairs:
        x, y = _x(0, predicted, low, high), _y(loss, low, high)
        color = "#5d626c" if kind is None else _COLORS[kind]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    rises = [costs(grid.cells, kind) for kind in range(3)]
    top = max([*(v for r in rises for v in r.values()), 0.01])
    bottom = min([*(v for r in rises for v in r.values()), 0.0])
    parts += _frame(1, "bits", "mean rise of the loss", (2.5, 8.5), (bottom, top))
    for kind, found in enumerate(rises):
        for bits, value in found.items():
            x, y = _x(1, bits, 2.5, 8.5), _y(value, bottom, top)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_COLORS[kind]}"/>')
        parts.append(_curve(grid, law, kind, (bottom, top)))
        parts.append(
            f'<text x="{_WIDTH + _LEFT + 90 * kind}" y="{_TOP - 8}" fill="{_COLORS[kind]}">'
            f"● {KINDS[kind]}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _kind(cell: Cell) -> int | None:
    return next((kind for kind in range(3) if _alone(cell, kind)), None)


def _curve(grid: Grid, law: PrecisionLaw, kind: int, ends: tuple[float, float]) -> str:
    """The law's mean rise over the models that have this kind quantised."""
    models = [(c.n, c.d) for c in grid.cells if _alone(c, kind)]
    points = []
    for i in range(50):
        bits = 2.8 + i * 5.5 / 49
        few = tuple(bits if i == kind else FULL for i in range(3))
        rise = mean(law.loss(n, d, few) - law.loss(n, d, (FULL,) * 3) for n, d in models)
        if rise <= ends[1] + 0.1 * (ends[1] - ends[0]):
            points.append(f"{_x(1, bits, 2.5, 8.5):.1f},{_y(rise, *ends):.1f}")
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{_COLORS[kind]}"/>'


def _x(panel: int, value: float, low: float, high: float) -> float:
    room = _WIDTH - _LEFT - 20
    return panel * _WIDTH + _LEFT + (value - low) / (high - low) * room


def _y(value: float, low: float, high: float) -> float:
    return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _frame(
    panel: int, below: str, beside: str, x: tuple[float, float], y: tuple[float, float]
) -> list[str]:
    """Axes with a few numbers."""
    left, bottom = panel * _WIDTH + _LEFT, _HEIGHT - _BOTTOM
    right = (panel + 1) * _WIDTH - 20
    parts = [
        f'<path d="M{left},{_TOP} V{bottom} H{right}" fill="none" stroke="#888"/>',
        f'<text x="{(left + right) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{below}</text>',
        f'<text x="{left}" y="{_TOP - 22}" fill="#5d626c">{beside}</text>',
    ]
    for i in range(4):
        value = y[0] + (y[1] - y[0]) * i / 3
        parts.append(
            f'<text x="{left - 6}" y="{_y(value, *y) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
        value = x[0] + (x[1] - x[0]) * i / 3
        if math.isfinite(value):
            parts.append(
                f'<text x="{_x(panel, value, *x):.1f}" y="{bottom + 18}" text-anchor="middle">'
                f"{value:.2f}</text>"
            )
    return parts
