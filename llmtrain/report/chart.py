"""Line charts as inline SVG: static without scripts, with hover and toggles through report.js.

Coordinates of the data travel beside the drawing as JSON, so that the hover shows values and
not pixels. Colours are classes ``c0`` .. ``c7`` and ``ink``, defined for light and dark pages
in report.css.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmtrain.report.numbers import bounds, fixed, linear_ticks, log_ticks, short
from llmtrain.report.read import Floats, Series

WIDTH, HEIGHT = 560, 236
LEFT, TOP, RIGHT, BOTTOM = 50, 8, 10, 32
COLORS = 8
DASHES = ("", "7 3", "2 3")


@dataclass(frozen=True)
class Line:
    """A curve. key: what the legend toggles (a run, a source); color: palette index, -1: ink."""

    key: str
    curve: Series
    color: int
    faint: bool = False  # raw values behind a smoothed curve: no legend entry, no hover
    dashed: bool = False  # planned or reference values: no legend entry
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at x. kind: bad, resume, checkpoint or other."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """What is drawn. head_cut: leave the first 2% of x out when choosing the y range."""

    title: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    note: str = ""
    log: bool = False
    zero: bool = False
    head_cut: bool = False
    form: Callable[[float], str] = field(default=fixed)
    tick: Callable[[float], str] = field(default=short)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            v = np.log10(values) if self.log else values
        low, high = (math.log10(e) if self.log else e for e in (self.low, self.high))
        place = self.start + (v - low) / (high - low) * (self.end - self.start)
        far = 4 * max(WIDTH, HEIGHT)  # the clip path hides what lies outside
        return np.clip(np.nan_to_num(place, nan=far, posinf=far, neginf=-far), -far, far)

    def at(self, value: float) -> float:
        return float(self(np.array([value]))[0])


def draw(chart: Chart, number: int) -> str:
    """The chart as an HTML figure; ``number`` makes its ids unique on the page."""
    lines = [line for line in chart.lines if len(line.curve)]
    head = f"<figcaption>{html.escape(chart.title)}</figcaption>"
    if not lines:
        return f'<figure class="card">{head}<p class="empty">no values yet</p></figure>'
    log = chart.log and all((line.curve.y > 0).all() for line in lines)
    x, y = _scales(chart, lines, log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">',
        f'<clipPath id="clip{number}"><rect x="{LEFT}" y="{TOP - 2}" '
        f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM + 4}"/></clipPath>',
        *_grid(x, y, chart.tick),
        *(_mark(mark, x) for mark in chart.marks if x.low <= mark.x <= x.high),
        f'<g clip-path="url(#clip{number})">',
        *(_path(line, x, y) for line in lines),
        "</g>",
        *(_dots(line, x, y) for line in lines),
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>',
    ]
    note = f'<p class="note">{html.escape(chart.note)}</p>' if chart.note else ""
    data = _data(lines, x, chart.form)
    return (
        f'<figure class="card chart">{head}{_legend(lines, chart.form)}{"".join(parts)}'
        f'{note}<script type="application/json">{data}</script></figure>'
    )


def _scales(chart: Chart, lines: Sequence[Line], log: bool) -> tuple[_Scale, _Scale]:
    x_low, x_high = bounds(np.concatenate([line.curve.x for line in lines]))
    x_low = min(x_low, 0.0)
    x_high = x_high if x_high > x_low else x_low + 1
    cut = x_low + 0.02 * (x_high - x_low) if chart.head_cut else x_low
    seen = [line.curve.y[line.curve.x >= cut] for line in lines]
    if not any(map(len, seen)):
        seen = [line.curve.y for line in lines]
    y_low, y_high = bounds(np.concatenate(seen))
    if chart.zero and not log:
        y_low = min(0.0, y_low)
    if log:
        room = max((y_high / y_low) ** 0.06, 1.02)
        y_low, y_high = y_low / room, y_high * room
    else:
        room = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
        y_low, y_high = (y_low if chart.zero and y_low == 0 else y_low - room), y_high + room
    return (
        _Scale(x_low, x_high, LEFT, WIDTH - RIGHT),
        _Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, log),
    )


def _grid(x: _Scale, y: _Scale, tick: Callable[[float], str]) -> list[str]:
    parts = []
    for value in log_ticks(y.low, y.high) if y.log else linear_ticks(y.low, y.high):
        place = y.at(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" '
            f'y2="{place:.1f}"/><text class="tick" x="{LEFT - 6}" y="{place + 3.5:.1f}" '
            f'text-anchor="end">{tick(value)}</text>'
        )
    for value in linear_ticks(x.low, x.high, 6):
        place = x.at(value)
        anchor = "end" if place > WIDTH - RIGHT - 14 else "middle"
        parts.append(
            f'<text class="tick" x="{place:.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="{anchor}">{short(value)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">tokens</text>'
    )
    return parts


def _mark(mark: Mark, x: _Scale) -> str:
    place = x.at(mark.x)
    top = HEIGHT - BOTTOM - 6 if mark.kind == "checkpoint" else TOP
    return (
        f'<line class="mark {mark.kind}" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" '
        f'y2="{HEIGHT - BOTTOM}"><title>{html.escape(mark.text)}</title></line>'
    )


def _color(line: Line) -> str:
    return "ink" if line.color < 0 else f"c{line.color % COLORS}"


def _dash(line: Line) -> str:
    if line.dashed:
        return "3 4"
    return DASHES[line.color // COLORS % len(DASHES)] if line.color >= 0 else ""


def _attributes(line: Line, kind: str) -> str:
    classes = [kind, _color(line), *["faint"] * line.faint, *["planned"] * line.dashed]
    return f'class="{" ".join(classes)}" data-key="{html.escape(line.key)}"'


def _path(line: Line, x: _Scale, y: _Scale) -> str:
    places = zip(x(line.curve.x), y(line.curve.y), strict=True)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dash = f' stroke-dasharray="{_dash(line)}"' if _dash(line) else ""
    return f'<polyline {_attributes(line, "line")}{dash} points="{points}"/>'


def _dots(line: Line, x: _Scale, y: _Scale) -> str:
    """Dots of a line with few points; of a lone point always, as it has no line to be seen by."""
    if not (line.dots and len(line.curve) <= 60) and len(line.curve) != 1:
        return ""
    return "".join(
        f'<circle {_attributes(line, "dot")} cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'
        for a, b in zip(x(line.curve.x), y(line.curve.y), strict=True)
    )


def _legend(lines: Sequence[Line], form: Callable[[float], str]) -> str:
    parts = []
    for line in lines:
        if line.faint or line.dashed:
            continue
        key = html.escape(line.key)
        swatch = (
            f'<svg viewBox="0 0 18 8"><line class="line {_color(line)}" x1="0" x2="18" y1="4" '
            f'y2="4" stroke-dasharray="{_dash(line)}"/></svg>'
        )
        parts.append(
            f'<button type="button" class="key" data-key="{key}" aria-pressed="true" '
            f'title="show or hide {key}">{swatch}{key} <b>{form(float(line.curve.y[-1]))}</b>'
            "</button>"
        )
    return f'<div class="legend">{"".join(parts)}</div>'


def _data(lines: Sequence[Line], x: _Scale, form: Callable[[float], str]) -> str:
    """What the hover needs: the x scale in drawing units, and every line's points with texts."""
    shown = [
        {
            "key": line.key + (" (planned)" if line.dashed else ""),
            "group": line.key,
            "color": _color(line),
            "x": [float(f"{v:.6g}") for v in line.curve.x],
            "y": [form(float(v)) for v in line.curve.y],
        }
        for line in lines
        if not line.faint
    ]
    return embed({"x": [x.low, x.high, x.start, x.end], "lines": shown})


def embed(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
