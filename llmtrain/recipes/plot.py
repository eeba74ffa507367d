"""The plot of an experiment: loss against the baseline by run and domain, with error bars."""

from __future__ import annotations

import html
from statistics import mean, stdev

from llmtrain.recipes.results import Losses

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, SLOT = 720, 320, 70, 20, 40, 60, 104
COLORS = ("#2a78d6", "#d9641a", "#12936a", "#c2860a", "#6a4fc4", "#d43b3a", "#2f9fb3", "#c64f86")


def svg(title: str, losses: Losses, baseline: str) -> str:
    """An SVG file's text. Bars: one standard deviation over seeds of the paired differences."""
    labels = [label for label in losses if label != baseline]
    domains = list(losses[baseline][0])
    points = [
        (i, j, [run[d] - base[d] for run, base in zip(losses[x], losses[baseline], strict=True)])
        for i, x in enumerate(labels)
        for j, d in enumerate(domains)
    ]
    ends = [mean(v) + s * stdev(v) for _, _, v in points for s in (-1, 1)]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    room = 0.08 * (high - low) or 0.01
    low, high = low - room, high + room

    width = max(WIDTH, LEFT + RIGHT + SLOT * len(labels))

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    slot = (width - LEFT - RIGHT) / max(len(labels), 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="{LEFT}" y="31" fill="#5d626c">held-out loss minus that of '
        f"{html.escape(baseline)}, nats per token; below 0 is better</text>",
    ]
    for k in range(5):
        value = low + (high - low) * (k + 0.5) / 5
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:+.3f}</text>'
        )
    parts.append(
        f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#888"/>'
    )
    for i, label in enumerate(labels):
        x = LEFT + slot * (i + 0.5)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{html.escape(label)}</text>"
        )
    for i, j, values in points:
        x = LEFT + slot * (i + (j + 1) / (len(domains) + 1))
        color, middle, spread = COLORS[j % len(COLORS)], mean(values), stdev(values)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(middle - spread):.1f}" '
            f'y2="{y(middle + spread):.1f}" stroke="{color}" stroke-width="2"/>'
            f'<circle cx="{x:.1f}" cy="{y(middle):.1f}" r="4" fill="{color}"/>'
        )
    for j, domain in enumerate(domains):
        parts.append(
            f'<text x="{LEFT + 110 * j}" y="{HEIGHT - 14}" fill="{COLORS[j % len(COLORS)]}">'
            f"● {html.escape(domain)}</text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
