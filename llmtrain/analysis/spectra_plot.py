"""The plot of spectra: which part of its full rank the change of each matrix needs, by block."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from llmtrain.analysis.spectra import Spectrum

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 320, 60, 170, 40, 40
_COLORS = ("#2a78d6", "#d9641a", "#12936a", "#c2860a", "#6a4fc4", "#d43b3a", "#2f9fb3", "#c64f86")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


def spectra_svg(found: Mapping[str, Sequence[Spectrum]]) -> str:
    """An SVG file's text. found: label of a model -> its spectra; each has a dash of its own, each
    kind of matrix a color. Matrices outside of blocks are left out."""
    kinds = list(
        dict.fromkeys(s.kind for ones in found.values() for s in ones if s.block is not None)
    )
    blocks = sorted({s.block for ones in found.values() for s in ones if s.block is not None})
    last = max(blocks[-1] if blocks else 1, 1)

    def x(block: int) -> float:
        return _LEFT + block / last * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _TOP + (1 - share) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-weight="bold">Rank that explains 90% of the variance of '
        "the change, over full rank, by block</text>",
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
            f'stroke="#ddd"/><text x="{_LEFT - 8}" y="{y(share) + 4:.1f}" '
            f'text-anchor="end">{share:.0%}</text>'
        )
    for block in blocks[:: max(len(blocks) // 12, 1)]:
        parts.append(
            f'<text x="{x(block):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{block}</text>'
        )
    for i, ones in enumerate(found.values()):
        for j, kind in enumerate(kinds):
            dots = [(s.block, s.rank90 / min(s.shape)) for s in ones if s.kind == kind]
            line = " ".join(f"{x(b):.1f},{y(v):.1f}" for b, v in dots if b is not None)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{_COLORS[j % len(_COLORS)]}" '
                f'stroke-width="2" stroke-dasharray="{_DASHES[i % len(_DASHES)]}"/>'
            )
    place = _WIDTH - _RIGHT + 15
    for j, kind in enumerate(kinds):
        color = _COLORS[j % len(_COLORS)]
        parts.append(
            f'<text x="{place}" y="{_TOP + 16 * j}" fill="{color}">{html.escape(kind)}</text>'
        )
    for i, label in enumerate(found):
        height = _TOP + 16 * (len(kinds) + 1 + i)
        parts.append(
            f'<line x1="{place}" x2="{place + 30}" y1="{height - 4}" y2="{height - 4}" '
            f'stroke="#333" stroke-width="2" stroke-dasharray="{_DASHES[i % len(_DASHES)]}"/>'
            f'<text x="{place + 36}" y="{height}">{html.escape(label[-18:])}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
