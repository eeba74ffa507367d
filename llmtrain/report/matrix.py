"""The page of a sequence of tasks: the matrix of losses as a heat map."""

from __future__ import annotations

import html
from collections.abc import Sequence

from llmtrain.report.page import html_table, page, section

CELL_W, CELL_H, LEFT, TOP = 96, 34, 150, 30


def render_matrix(
    title: str,
    tasks: Sequence[str],
    matrix: Sequence[Sequence[float]],
    facts: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
) -> str:
    """The HTML page. matrix[i][j]: loss of task j after task i. facts: name and value of tiles.

    rows: of the table below the heat map, the first one its head.
    """
    tiles = "".join(
        f"<div class='tile'><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in facts
    )
    body = (
        f"<header><h1>{html.escape(title)}</h1></header>"
        + section("Result", f"<div class='tiles'>{tiles}</div>")
        + section("Held-out loss of every task after every task", heat_map(tasks, matrix))
        + section("Runs", html_table(rows[0], rows[1:], 1))
    )
    return page(f"llmtrain: {title}", body)


def heat_map(tasks: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """An SVG figure: darker cells lie further above the least loss of their column."""
    least = [min(row[j] for row in matrix) for j in range(len(tasks))]
    most = max((v - least[j] for row in matrix for j, v in enumerate(row)), default=0.0) or 1.0
    width, height = LEFT + CELL_W * len(tasks) + 8, TOP + CELL_H * len(matrix) + 8
    parts = [
        f'<text class="tick" x="{LEFT + CELL_W * (j + 0.5):.0f}" y="{TOP - 10}" '
        f'text-anchor="middle">{html.escape(name)}</text>'
        for j, name in enumerate(tasks)
    ]
    for i, row in enumerate(matrix):
        y = TOP + CELL_H * i
        label = html.escape(f"after {tasks[i]}")
        parts.append(
            f'<text class="tick" x="{LEFT - 10}" y="{y + CELL_H / 2 + 4:.0f}" '
            f'text-anchor="end">{label}</text>'
        )
        for j, value in enumerate(row):
            x, share = LEFT + CELL_W * j, (value - least[j]) / most
            edge = ' stroke="currentColor"' if i == j else ""
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{CELL_W - 2}" height="{CELL_H - 2}" rx="3" '
                f'fill="#d9641a" fill-opacity="{0.06 + 0.6 * share:.3f}"{edge}/>'
                f'<text class="tick" x="{x + CELL_W / 2:.0f}" y="{y + CELL_H / 2 + 4:.0f}" '
                f'text-anchor="middle" style="fill: var(--ink)">{value:.4f}</text>'
            )
    return (
        f'<figure class="card"><svg viewBox="0 0 {width} {height}" '
        f'style="max-width: {width}px" role="img" '
        f'aria-label="matrix of losses">{"".join(parts)}</svg><p class="note">Colour: how far a '
        "loss lies above the least of its column, on one scale for all; outlined: right after "
        "the task.</p></figure>"
    )
