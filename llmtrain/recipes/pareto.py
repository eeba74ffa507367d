"""The plot of what was learned against what was forgotten."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.recipes.plot import COLORS

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 400, 70, 190, 50, 50


@dataclass(frozen=True)
class Point:
    """A run: gained on the target, lost on the source, in nats per token; size: its duration."""

    label: str
    learned: float
    forgot: float
    size: int


def pareto_svg(title: str, points: Sequence[Point], domains: tuple[str, str]) -> str:
    """An SVG file's text: learned to the right, forgotten upwards; best is right and low.

    Points of one label are joined in the order of their size, and larger ones are larger. domains:
    names of the target and the source.
    """
    xs, ys = [p.learned for p in points] + [0.0], [p.forgot for p in points] + [0.0]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)

    def x(value: float) -> float:
        return _LEFT + (value - low_x) / (high_x - low_x or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high_y - value) / (high_y - low_y or 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    base = _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="{_LEFT}" y="35" fill="#5d626c">up: forgotten ({html.escape(domains[1])}); '
        f"right: learned ({html.escape(domains[0])}); nats per token; larger: longer</text>",
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" '
        f'height="{base - _TOP}" fill="none" stroke="#bbb"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        across, up = low_x + share * (high_x - low_x), low_y + share * (high_y - low_y)
        parts.append(
            f'<text x="{x(across):.1f}" y="{base + 18}" text-anchor="middle">{across:.2f}</text>'
            f'<text x="{_LEFT - 8}" y="{y(up) + 4:.1f}" text-anchor="end">{up:.2f}</text>'
        )
    sizes = sorted({point.size for point in points})
    for i, label in enumerate(dict.fromkeys(point.label for point in points)):
        color = COLORS[i % len(COLORS)]
        own = sorted((p for p in points if p.label == label), key=lambda p: p.size)
        line = " ".join(f"{x(p.learned):.1f},{y(p.forgot):.1f}" for p in own)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}"/>')
        for p in own:
            parts.append(
                f'<circle cx="{x(p.learned):.1f}" cy="{y(p.forgot):.1f}" '
                f'r="{4 + 2 * sizes.index(p.size)}" fill="{color}"/>'
            )
        parts.append(
            f'<text x="{_WIDTH - _RIGHT + 14}" y="{_TOP + 14 + 18 * i}" fill="{color}">'
            f"● {html.escape(label)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
